from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llm_streamline.conflicts import without_effect
from llm_streamline.errors import UserError
from llm_streamline.objective import LOSS
from llm_streamline.presets import PRESETS
from llm_streamline.quantities import counted, parse_count
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.recipe_file import changed_keys, make_recipe, to_yaml


@pytest.mark.parametrize(
    ("text", "count"), [("250k", 250_000), ("1.5M", 1_500_000), ("5B", 5 * 10**9), (7, 7), ("12", 12)]
)
def test_counts(text, count):
    assert parse_count(text) == count


def test_one_of_a_thing_is_no_several():
    assert [counted(number, "layer") for number in (0, 1, 2000)] == ["0 layers", "1 layer", "2,000 layers"]


@pytest.mark.parametrize("text", ["1.5", "0.6", "1.2345k"])
def test_half_a_count_is_refused_and_not_rounded(text):
    with pytest.raises(UserError, match=rf"--epochs was given '{text}' .*no whole number"):
        Recipe(model="m", epochs=text)


def test_yaml_reads_back_as_an_equal_recipe():
    recipe = make_recipe({"model": "m", "data": ["a.txt"], "preset": "paper", "tokens": "10k"})
    assert Recipe(**yaml.safe_load(to_yaml(recipe))) == recipe


def test_a_file_says_nothing_of_how_much_goes_where_a_flag_does(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nremove: 25%\ntokens: 10k\n", encoding="utf-8")
    recipe = make_recipe({"window": "3:6"}, tmp_path / "r.yaml")
    assert (recipe.remove, recipe.window, recipe.tokens) == (None, "3:6", 10_000)
    assert make_recipe({}, tmp_path / "r.yaml").remove == "25%"


def test_a_preset_gives_way_to_a_file_and_that_to_flags(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\npreset: paper\nlr: 3.0e-4\nclip: 2.0\n")
    recipe = make_recipe({"clip": 1.0}, tmp_path / "r.yaml")
    assert (recipe.loss, recipe.lr, recipe.clip, recipe.protect_first) == ("mse", 3e-4, 1.0, 0)


def test_presets_are_the_papers_settings():
    papers = {name: own for name, own in PRESETS.items() if name.startswith("paper")}
    for name, own in papers.items():
        recipe = make_recipe({"model": "m", "preset": name, "custom_code": True})
        assert (recipe.loss, recipe.lr, recipe.min_lr, recipe.weight_decay) == ("mse", 2e-4, 5e-5, 1e-3)
        assert (recipe.warmup, recipe.clip, recipe.protect_first, recipe.protect_last) == (0.01, 5.0, 0, 0)
        assert all(getattr(recipe, key) == value for key, value in own.items())
    assert set(papers) == {"paper", "paper-none", "paper-random", "paper-ffn", "paper-swiglu"}


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("shortgpt", ("none", "influence", "none")),
        ("sleb", ("none", "greedy", "none")),
        ("uidl", ("none", "cosine", "lora:64")),
        ("lora", ("none", "cosine", "lora:16")),
        ("last-n-head", ("none", "last", "last:3+norm+head")),
        ("laco", ("merged", "cosine", "none")),
        ("replaceme", ("linear", "cosine", "none")),
        ("replaceme-cosine", ("linear", "cosine", "none")),
        ("linearpatch", ("linear:patch", "cosine", "none")),
        ("linearpatch-kl", ("linear:patch", "cosine", "none")),
        ("ghost", ("linear:free", "cosine", "none")),
    ],
)
def test_presets_of_other_methods(preset, values):
    recipe = Recipe(model="m", preset=preset, custom_code=True)
    losses = {"linearpatch": "nmse", "linearpatch-kl": "kl:100", "ghost": "mse"}
    wanted = {"replaceme": "mse", "replaceme-cosine": "cosine", **losses}.get(preset, LOSS)
    assert (recipe.replace, recipe.select, recipe.heal) == values
    inner = preset in ("sleb", "linearpatch", "linearpatch-kl", "ghost")  # neither end, as in their authors' code
    below = int(inner or preset.startswith("replaceme"))  # a folded map needs a layer below its window
    assert (recipe.protect_first, recipe.protect_last, recipe.init) == (below, int(inner), None)
    assert recipe.heal_loss == ("lm" if recipe.heals else None) and recipe.loss_used == wanted
    assert recipe.solved == (recipe.replace.startswith("linear") and preset != "linearpatch-kl")


def test_rates_of_presets_never_change():
    keys = ("optimizer", "lr", "min_lr", "weight_decay", "temperature", "heal_lr")
    own = {name: {key: values[key] for key in keys if key in values} for name, values in PRESETS.items()}
    paper = {"optimizer": "adamw", "lr": 2e-4, "min_lr": 5e-5, "weight_decay": 1e-3}
    patch = {"optimizer": "adamw", "lr": 1e-4, "min_lr": 5e-6, "weight_decay": 1e-4, "temperature": 1.0}
    others = {"lora": {"heal_lr": 2e-4}, "uidl": {"heal_lr": 3e-4}, "last-n-head": {"optimizer": "adamw"}}
    assert {name: values for name, values in own.items() if values} == {
        **{f"paper{kind}": paper for kind in ("", "-random", "-ffn", "-swiglu", "-none")},
        **others,
        "linearpatch-kl": patch,
    }


@pytest.mark.parametrize("preset", ["paper-ffn", "paper-swiglu"])
def test_presets_of_networks_ask_for_code_to_be_allowed(preset):
    with pytest.raises(UserError, match="allow it with --custom-code"):
        Recipe(model="m", preset=preset)


def test_presets_hold_in_python_too():
    assert Recipe(model="m", preset="paper") == make_recipe({"model": "m", "preset": "paper"})
    assert Recipe(model="m", preset="paper", loss="nmse").loss == "nmse"
    with pytest.raises(UserError, match="preset 'papyrus' is not known"):
        Recipe(model="m", preset="papyrus")


def test_changed_keys_are_named_as_flags():
    old, new = Recipe(model="m", lr=1e-3), Recipe(model="m", lr=2e-3, protect_first=0)
    assert changed_keys(old, new) == ["--protect-first", "--lr"]


def test_layers_occupied():
    counts = {kind: Recipe(model="m", replace=kind).occupied for kind in ("none", "layer", "layer:2", "mlp")}
    assert counts == {"none": 0, "layer": 1, "layer:2": 2, "mlp": 1}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"select": "last", "windows": 2, "replace": "none"}, "--select last takes the layers below the protected end"),
        ({"lerning_rate": 1}, "'lerning_rate' is not known; the nearest is"),
        ({"los": "mse"}, "'los' is not known; the nearest is 'loss'"),
        ({"replace": "mlpp"}, "--replace was given 'mlpp'.*none; layer"),
        ({"replace": "layer:0"}, "--replace was given 'layer:0'"),
        ({"tokens": "many"}, "--tokens was given 'many' .*such as 250k"),
        ({"tokens": 0}, "--tokens was given 0"),
        ({"lr": -1}, "--lr was given -1"),
        ({"remove": "8", "window": "1:2"}, "--remove and --window were given; give one of"),
        ({"window": "30:21"}, "--window 30:21 is no run of layers"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
        ({"preset": "papyrus"}, "preset 'papyrus' is not known; choose one of paper"),
        ({"block": 1}, "--block was given 1"),
        ({"seed": 2**70}, "--seed was given"),
        ({"dtype": "int8"}, "--dtype was given 'int8'"),
    ],
)
def test_mistakes_are_one_sentence(values, words):
    with pytest.raises(UserError, match=words) as caught:
        make_recipe({"model": "m", **values})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("paper", {"replace": "none"}),
        ("paper", {"replace": "linear"}),
        ("paper-random", {"replace": "linear:free", "custom_code": True}),
        ("lora", {"heal": "none"}),
        ("linearpatch-kl", {"loss": "nmse", "custom_code": True}),
        ("linearpatch-kl", {"replace": "none"}),
        ("paper", {"lr": None, "min_lr": None}),
    ],
)
def test_what_is_given_takes_the_meaning_of_what_a_preset_sets(preset, values, tmp_path):
    recipe, file = Recipe(model="m", preset=preset, **values), tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert make_recipe({}, file) == recipe, "also where it was taken away"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"replace": "none", "lr": 1e-3, "epochs": 2}, "with --replace none: --epochs, --lr"),
        ({"replace": "none", "loss": "kl"}, "with --replace none: --loss"),
        (
            {"replace": "none", "heal": "all", "loss": "kl", "lr": 1e-3},
            "with --replace none: --loss; healing has a --heal-loss",
        ),
        ({"replace": "merged", "optimizer": "adamw"}, "with --replace merged: --optimizer"),
        ({"replace": "linear", "batch": 2, "loss": "mse"}, "with --replace linear: --batch"),
        ({"preset": "paper", "replace": "none", "lr": 1.0}, "with --replace none: --lr"),
        ({"preset": "paper-none"}, None),
        ({"lr": 1e-3}, None),
        ({"preset": "lora"}, None),
    ],
)
def test_what_has_no_effect_is_told(values, told):
    assert without_effect(Recipe(model="m", **values)) == (told and f"without effect {told}")


def test_yaml_means_what_the_flags_mean(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ndata: a.txt\nwindow: 21:30\nseed: 3\ntokens: 250k\nlr: 1e-4\n")
    recipe = make_recipe({}, file)
    assert (recipe.window, recipe.seed, recipe.tokens, recipe.lr) == ("21:30", 3, 250_000, 1e-4)
    assert recipe.data == ("a.txt",)
    assert Recipe(model="m", remove=8) == Recipe(model="m", remove="8")


def test_unreadable_recipe_files(tmp_path):
    (tmp_path / "key.yaml").write_text("on: 1\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name in ("key.yaml", "list.yaml", "broken.yaml", "missing.yaml"):
        with pytest.raises(UserError, match=name):
            make_recipe({}, tmp_path / name)


def test_recipe_and_runtime_share_no_field():
    assert not set(Recipe.model_fields) & set(Runtime.model_fields)
    assert all(field.description for schema in (Recipe, Runtime) for field in schema.model_fields.values())


def test_data_takes_paths_and_no_empty_name():
    assert Recipe(model="m", data=Path("a.txt")).data == ("a.txt",)
    assert Recipe(model="m", data=[Path("a.txt"), "b.txt"]).data == ("a.txt", "b.txt")
    with pytest.raises(UserError, match="a name is empty"):  # as an unset shell variable gives it
        Recipe(model="m", data="")


def test_a_format_to_be_exported_to_is_called_for_everywhere():
    recipe = make_recipe({"model": "m", "for": "gguf"})
    assert recipe.for_ == "gguf" and "\nfor: gguf\n" in to_yaml(recipe)
    assert make_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    assert changed_keys(recipe, make_recipe({"model": "m"})) == ["--for"]
    with pytest.raises(
        UserError, match=r"--for was given 'onnx'.*it takes: A format that the model is to be exported to"
    ):
        make_recipe({"model": "m", "for": "onnx"})
