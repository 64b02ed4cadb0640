from __future__ import annotations

import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# one place per process for the code of folders that bring some: once imported from, it cannot be moved
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")

import pytest

from llm_streamline import oracle
from llm_streamline.scoring import continuations, evaluator, peak, speed
from tests import fresh, tiny

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def no_modules_left() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """What is imported stays: a run collects several times, and would look through all of torch each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_rounds() -> None:
    """What is timed in tests is not read for its speed, and what is asked or written not for its quality."""
    speed.SECONDS, speed.FEWEST = 0.1, 2
    continuations.QUESTIONS, evaluator.NEW = 20, 16


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """The product's own processes are forked from one that has imported everything, not begun anew."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (oracle, peak):
            patch.setattr(module, "subprocess", SimpleNamespace(run=fresh.run, DEVNULL=subprocess.DEVNULL))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, text and reference numbers that live beside the repository."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"{SHARED} with the reference numbers is not here")
    return SHARED


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny.make_documents(300))
