from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from llm_streamline import assemble as assemble_module
from llm_streamline import card, oracle, run, verdict
from llm_streamline.evaluation import Evaluation
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Manifest
from tests import evaluations, tiny

APACHE = "\n   Apache License\n   Version 2.0, January 2004\n"


@pytest.fixture
def source(tmp_path):
    return tiny.make_folder(tmp_path / "source", "llama")


@pytest.fixture
def shorten(source, text_file, tmp_path, monkeypatch):
    """Shorten `source` by two layers; gives the model folder."""
    monkeypatch.setattr(assemble_module, "verify", oracle.check)

    def call(**changes):
        small = {"tokens": 4000, "calibration_tokens": 2000, "validation_tokens": 2000, "remove": "2"}
        recipe = Recipe(model=str(source), data=(str(text_file),), **{"replace": "none", **small, **changes})
        run.compress(
            recipe, Runtime(output=tmp_path / "out", quiet=True, tasks=("none",), command="llm-streamline compress `x`")
        )
        return tmp_path / "out" / "model"

    return call


def files_of(folder):
    return card.source_files(str(folder))


def test_the_card_passes_the_hubs_own_reading_and_writing(shorten, source):
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, fr]\nsurprise: 1\n---\nText\n")
    folder = shorten()
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.to_dict() == metadata_load(folder / "README.md")
    assert ModelCardData(**loaded.data.to_dict()).to_yaml() == loaded.data.to_yaml()
    assert loaded.data.license == "mit" and loaded.data.language == ["en", "fr"]
    assert loaded.data.library_name == "transformers" and loaded.data.pipeline_tag == "text-generation"
    assert "llm-streamline" in loaded.data.tags and "surprise" not in loaded.data.to_dict()
    assert "base_model" not in loaded.data.to_dict()  # a folder is none on the Hub


def test_it_holds_scores_plan_recipe_command_and_versions(shorten, tmp_path):
    folder = shorten()
    manifest = Manifest.read(folder / oracle.MANIFEST)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card.card_text(manifest) and text.endswith("\n")
    for loss in (manifest.scores.dense, manifest.scores.cut, manifest.scores.saved):
        assert f"{loss.nats:.4f} ± {loss.se:.4f}" in text
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert f"```yaml\n{recipe}```\n" in text and yaml.safe_load(recipe)["remove"] == "2"
    for words in (str(manifest.plan), manifest.plan.why, manifest.command, manifest.versions["torch"]):
        assert words in text, words
    assert "trust_remote_code" not in text
    told = " ".join(text.split())
    assert f"were not trained on. *Cut* is the source with {verdict.cut(manifest.plan)}." in told, "nothing was picked"


def test_a_folder_with_code_of_its_own_says_how_to_load_it(shorten):
    text = (shorten(replace="ffn", custom_code=True) / "README.md").read_text(encoding="utf-8")
    assert text.count("(folder, trust_remote_code=True)") == 2 and "- custom_code" in text


def test_a_card_without_scores_says_so(shorten):
    manifest = Manifest.read(shorten() / oracle.MANIFEST).model_copy(update={"scores": None})
    assert "Not measured yet" in card.card_text(manifest)


def test_an_evaluation_is_in_the_card_and_in_its_metadata(shorten, tmp_path):
    manifest = Manifest.read(shorten() / oracle.MANIFEST)
    found = evaluations.of_a_run()
    card.write_card(manifest, tmp_path, found)
    loaded = ModelCard.load(tmp_path / "README.md")
    results = {one.dataset_name: (one.metric_type, one.metric_value) for one in loaded.data.eval_results}
    assert results == {"questions": ("accuracy", 0.86), "few": ("accuracy", 0.75)}  # of the others one is at chance
    assert ModelCardData(**loaded.data.to_dict()).to_yaml() == loaded.data.to_yaml()
    for line in (
        *("| `questions` | 0.900 | 0.860 | 0.940 | 100 of 100 | 6.0% |", "| `recall` | 0.600 | 0.360 |  |  | 36.0% |"),
        *(
            "| `guessed` | (0.440) | (0.440) | (0.520) | 50 of 50 | 48.0% |",
            "| `few` | 0.750 | 0.750 | (0.900) | 6 of 100",
        ),
        *(
            "| saved | 1 | 128 + 32 | 5,000 | 1.31x [1.21, 1.41] | 80 |",
            "| saved | 750,000 | 3 MB | 2.05 kB | 600 MB |",
        ),
        *("decode 1.31x as fast, 25% fewer bytes.\n\n", found.warnings[0]),
    ):
        assert line in loaded.text, line
    assert "These losses say nothing" not in loaded.text


def test_without_an_evaluation_that_ranks_there_are_no_results(shorten):
    manifest = Manifest.read(shorten() / oracle.MANIFEST)
    assert "## Evaluation" not in card.card_text(manifest) and "model-index" not in card.card_text(manifest)
    texts = [evaluations.model(label, texts=[evaluations.text()]) for label in ("dense", "saved")]
    text = card.card_text(manifest, Evaluation(against="dense", models=texts))
    assert "has 1.00 times the perplexity on stories" in text and "model-index" not in text and "| task |" not in text
    cut = evaluations.pair().model_copy(update={"models": evaluations.pair().models[:1]})
    assert card.card_text(manifest, cut) == card.card_text(manifest)


def test_licence_files_go_along(shorten, source):
    (source / "LICENSE.txt").write_text(APACHE)
    (source / "NOTICE").write_text("Thanks")
    folder = shorten()
    assert (folder / "LICENSE.txt").read_text() == APACHE and (folder / "NOTICE").read_text() == "Thanks"
    assert metadata_load(folder / "README.md")["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text, expected",
    [
        (APACHE, {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright (c) 2024", {"license": "mit"}),
        ("Our Own Terms", {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}),
    ],
)
def test_licences_known_by_their_text(tmp_path, text, expected):
    (tmp_path / "LICENSE").write_text(text)
    assert card.origin(str(tmp_path), files_of(tmp_path)) == expected


@pytest.mark.parametrize("text", ["no metadata", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n"])
def test_a_sources_card_may_hold_anything(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card.origin(str(tmp_path), files_of(tmp_path)) == {}


def test_a_hub_name_is_the_base_model():
    assert card.origin("someone/something", card.source_files("someone/something")) == {
        "base_model": "someone/something"
    }


def test_manifests_from_before_the_card_are_still_read(shorten, tmp_path):
    folder = shorten()
    values = json.loads((folder / oracle.MANIFEST).read_text())
    del values["origin"]
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert Manifest.read(tmp_path / "old.json").origin == {}
