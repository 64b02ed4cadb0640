"""Every recipe, dry-run on a small model of as many layers; and what it makes of the model that it names."""

from __future__ import annotations

import copy
import json
from itertools import takewhile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from llm_streamline.checkpoint import without_weights
from llm_streamline.families import parameter_counts
from llm_streamline.mixture import SLIMPAJAMA
from llm_streamline.preview import plan_only
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.recipe_file import make_recipe
from llm_streamline.records import ModelShape, Window
from llm_streamline.removal import check_request, net_layers, parameters_after
from tests import tiny

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
LLAMA_3 = {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8}
# the named models' configurations, and what is left of them: the published 4.7B and 5.4B, three quarters of an OPT
REAL: dict[str, tuple[PretrainedConfig, int]] = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig(), 4_714_582_016),
    "meta-llama/Llama-3.1-8B": (LlamaConfig(**LLAMA_3), 5_412_917_248),
    "facebook/opt-1.3b": (OPTConfig(**dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 2048), ffn_dim=8192,
                                    num_hidden_layers=24, num_attention_heads=32), 1_013_608_448),
    "facebook/opt-2.7b": (OPTConfig(**dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 2560), ffn_dim=10_240,
                                    num_hidden_layers=32, num_attention_heads=32), 2_022_184_960),
    "facebook/opt-6.7b": (OPTConfig(**dict.fromkeys(("hidden_size", "word_embed_proj_dim"), 4096), ffn_dim=16_384,
                                    num_hidden_layers=32, num_attention_heads=32), 5_047_435_264),
}  # fmt: skip


# what its first comment says of published figures
PUBLISHED = {
    "llama-2-4.7b": "54.1 on average of 59.7",
    "llama-3.1-5.4b": "58.2 on average of 64.0",
    "paper-25": "92-93 % of the classification accuracy",
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_published_figures_come_first(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    assert PUBLISHED.get(file.stem, "whose figures are not at hand") in " ".join(comment)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_gradients_are_clipped_as_in_the_released_code(file):
    recipe = make_recipe({}, file)
    assert recipe.clip == {"lm": 1.0, "mse": 5.0}[recipe.loss]


def shape_of(recipe: Recipe) -> ModelShape:
    total, layers = parameter_counts(without_weights(REAL[recipe.model][0]))
    return ModelShape(name=recipe.model, model_type="", total=total, layers=layers)


@pytest.mark.parametrize("file", [file for file in RECIPES if file.stem != "paper-25"], ids=lambda file: file.stem)
def test_a_recipe_makes_what_was_published(file):
    recipe = make_recipe({}, file)
    shape = shape_of(recipe)
    start = check_request(shape, recipe)[0]
    net = net_layers(recipe, shape)
    window = Window(start=start, stop=start + net + recipe.occupied)
    left = parameters_after(shape, window, recipe.occupied)
    assert left == REAL[recipe.model][1]


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of every domain of the paper's mixture."""
    documents = tiny.make_documents(400)
    names = list(SLIMPAJAMA)
    rows = [
        {"text": text, "meta": {"redpajama_set_name": names[number % len(names)]}}
        for number, text in enumerate(documents)
    ]
    file = tmp_path_factory.mktemp("domains") / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def small_model(folder: Path, layers: int, kind: str) -> Path:
    config = copy.deepcopy(tiny.CONFIGS[kind])
    config.num_hidden_layers = layers
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_planned_on_a_small_model_of_as_many_layers(file, domains, tmp_path):
    own = make_recipe({}, file)
    config = REAL[own.model][0] if own.model in REAL else LlamaConfig(num_hidden_layers=12)
    model = small_model(tmp_path / "model", config.num_hidden_layers, config.model_type)
    sizes = {"tokens": "2k", "calibration_tokens": "1k", "validation_tokens": "512", "block": 32}
    recipe = make_recipe({"model": str(model), "data": str(domains), **sizes}, file)
    plan = plan_only(recipe, Runtime(quiet=True, compute="float32", dry_run=True))
    wanted = int(own.remove) if own.remove.isdigit() else config.num_hidden_layers // 4
    assert (plan.net, plan.occupied, plan.num_layers) == (wanted, own.occupied, config.num_hidden_layers)
