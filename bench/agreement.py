"""`python -m bench.agreement MODEL QUESTIONS.jsonl ...`: our answers against the lm_eval command line's, item for item.

Both compute in float32 on the CPU. Prints per file how many items there are, on how many the two disagree about what is
right, and the largest difference of a summed log-likelihood; exits 1 where they disagree anywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llm_streamline.answers import Item
from llm_streamline.scoring.items import read_items

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


def ours(model: str, questions: Path, folder: Path) -> dict[str, Item]:
    command = [
        "llm-streamline",
        "evaluate",
        model,
        "--tasks",
        str(questions),
        "-o",
        str(folder),
        "--compute",
        "float32",
    ]
    subprocess.run([*command, "--device", "cpu", "--quiet"], check=True, stdout=subprocess.DEVNULL)
    return read_items(folder / "items")[questions.stem]


def theirs(model: str, questions: Path, folder: Path) -> list[dict]:
    """lm-eval's logged samples in the order of the file."""
    yaml = folder / f"{questions.stem}.yaml"
    yaml.write_text(TASK.format(name=questions.stem, file=questions.resolve()))
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    command += ["--tasks", str(yaml), "--batch_size", "16", "--log_samples", "--output_path", str(folder / "log")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (log,) = (folder / "log").rglob("samples_*.jsonl")
    return sorted(map(json.loads, log.read_text(encoding="utf-8").split("\n")[:-1]), key=lambda row: row["doc_id"])


def compare(model: str, questions: Path) -> int:
    """The number of items on which the two disagree."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine, rows = list(ours(model, questions, folder / "ours").values()), theirs(model, questions, folder)
    disagree, largest = 0, 0.0
    for item, row in zip(mine, rows, strict=True):
        scores = [float(answer[0]) for answer in row["filtered_resps"]]
        assert item.log_likelihoods and item.gold == str(row["target"])
        largest = max(largest, *(abs(a - b) for a, b in zip(item.log_likelihoods, scores, strict=True)))
        disagree += item.likeliest_right != (row["acc"] == 1.0)
    right = sum(bool(item.likeliest_right) for item in mine)
    print(f"{questions.stem}: {len(mine)} items, {right} right, {disagree} disagreements, {largest:.1e} nats apart")
    return disagree


if __name__ == "__main__":
    sys.exit(any([compare(sys.argv[1], Path(file)) for file in sys.argv[2:]]))
