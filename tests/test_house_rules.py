"""The rules that keep the house in order."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_streamline.recipe_file import make_recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "llm_streamline"
MODULES = sorted(path for path in SOURCE.rglob("*.py"))
PRODUCT = [path for path in MODULES if "demo" not in path.relative_to(SOURCE).parts]
STAGES = {"analyze", "rank", "choose", "train", "linear", "assemble", "scoring", "report", "figures", "page"}
CONDUCTORS = {
    "run",
    "rounds",
    "selection",
    "starts",
    "training",
    "healing",
    "preview",
    "cli",
    "commands",
    "demonstration",
    "__init__",
    "__main__",
    "sweep",
    "chain",
    "export",
}
FAMILY_NAMES = re.compile(
    r"\b(llama|opt|mistral|mixtral|qwen\w*|gemma\w*|phi3?|gpt2|gpt_neox?|bloom|falcon|olmo\w*|granite|starcoder\w*|smollm\w*|"
    r"cohere\w*|deepseek\w*|glm\w*|exaone\w*|baichuan|\w*mamba2?|jamba|lfm\w*|kimi_linear|\w+_hybrid)\b",
    re.IGNORECASE,
)
PROGRAM = re.compile(r"llama[._-]cpp(\.Llama)?")  # bears the name of a family


def imported(path: Path) -> set[str]:
    """The package's own modules that a module imports, by first name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_streamline"):
            tail = (node.module or "").split(".")[1:]
            names |= {tail[0]} if tail else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.stem)
def test_no_family_is_named_outside_families(path):
    if path.name == "architectures.py":
        assert FAMILY_NAMES.search(path.read_text(encoding="utf-8"))
        return
    assert not FAMILY_NAMES.findall(PROGRAM.sub("", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.stem)
def test_only_the_conductors_import_stages(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in CONDUCTORS:
        return
    assert not (imported(path) & (STAGES | CONDUCTORS)) - {own}


def test_importing_the_package_loads_nothing_heavy_and_changes_nothing():
    script = (
        "import random, logging, sys; state = random.getstate(); import llm_streamline;"
        "assert random.getstate() == state and not logging.root.handlers;"
        "assert not {'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.stem)
def test_modules_say_what_they_are_for(path):
    if path.name != "__main__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_every_module_has_its_tests():
    elsewhere = {"demonstration": "demo", "readers": "sources", "parquet": "sources", "oracle": "assemble"}
    elsewhere |= {
        "passages": "train",
        "history": "train",
        "interruption": "snapshot",
        "networks": "replacement",
        "custom_code": "replacement",
    }
    elsewhere |= {
        "layerwise": "offload",
        "memory": "offload",
        "spool": "offload",
        "stored": "offload",
        "probe": "estimate",
        "preview": "run",
        "quantities": "recipe",
        "schema": "recipe",
        "precision": "optimizers",
        "commands": "cli",
        "architectures": "families",
        "family": "families",
        "staying": "choose",
        "removal": "choose",
        "conflicts": "recipe",
        "lighter": "chain",
    }
    elsewhere |= {
        "presets": "recipe",
        "replace": "recipe",
        "recipe_file": "recipe",
        "sizes": "estimate",
        "shape": "choose",
        "answers": "stability",
    }
    elsewhere |= {"training": "run", "tracking": "run", "losses": "objective", "folding": "linear", "heal": "student"}
    elsewhere |= {
        "packing": "text",
        "sweep_figure": "sweep",
        "charts": "page",
        "verdict": "page",
        "record": "choose",
        "runtime": "recipe",
    }
    elsewhere |= {"workspace": "run", "records": "choose", "errors": "cli"}
    elsewhere |= {"inventory": "checkpoint", "fidelity": "checkpoint", "fingerprints": "checkpoint"}
    elsewhere |= {
        "evaluation": "evaluate",
        "flags": "cli",
        "comparison": "findings",
        "tables": "scoreboard",
        "crossing": "rank",
        "similarity": "analyze",
        "ranking": "rank",
        "selection": "rank",
        "figures": "report",
    }
    covered = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    modules = {path.stem for path in PRODUCT if path.parent == SOURCE and not path.stem.startswith("__")}
    assert {elsewhere.get(name, name) for name in modules} <= covered


def test_shipped_recipes_parse():
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        make_recipe({}, file)


def test_the_bundled_files_are_small():
    assert all(path.stat().st_size < 8e6 for path in SOURCE.rglob("*") if path.is_file())


@pytest.mark.parametrize("page", ["cli", "families"])
def test_the_generated_pages_are_fresh(page):
    script = ROOT / "docs" / f"make_{page}.py"
    code = f"import runpy; m = runpy.run_path({str(script)!r}); print(m['page'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), f"run python {script}"
