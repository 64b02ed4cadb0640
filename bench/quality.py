"""Ways to shorten a model on equal tokens, row by row: excess loss, stability and accuracy on text no stage has read.

`python -m bench.quality ROWS --model MODEL --data TEXT.jsonl --heldout TEXT.jsonl --questions TASK.jsonl
    [--methods NAME ...] [--remove 25% 42%] [--seeds 0 1 2] [--tokens 500k 50k]`

adds to the folder ROWS what is not there yet, one file per row, so that it can be stopped at any time, and says how
long the rest will take by the rows that are there (those of a second budget lie in ROWS-50k; of several models, each
with its own text and questions in the same order, in ROWS/NAME); with OMP_NUM_THREADS=1 one for each core, with other
--seeds each;
`python -m bench.quality_table ROWS` prints what has come in. Rows that have been measured lie in `bench/measured`.
All methods at both shares with three seeds take about 10 CPU hours for a model of 10 M parameters and 5 for the
bundled one: a night on two cores, one process each. `bench.control` adds the dense model trained on the same text.
Without --heldout a row is judged on the validation part of the training text alone, which is what settings are chosen
by.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.depths import Peak
from bench.packed import packable, packed_answers
from bench.rows import SUFFIX, check_row, judged_by, read_row, write_row
from llm_streamline import compress, run, selection
from llm_streamline.checkpoint import Source, context_length, load_config, load_model, load_tokenizer
from llm_streamline.errors import UserError
from llm_streamline.families import layers_of
from llm_streamline.memory import held, release
from llm_streamline.precision import multiplies_bfloat16
from llm_streamline.progress import say
from llm_streamline.quantities import parse_count
from llm_streamline.recipe import Recipe, Runtime
from llm_streamline.records import Fit, runs_of
from llm_streamline.scoring.perplexity import token_losses
from llm_streamline.scoring.questions import Question, Row, answers, encode, read_questions
from llm_streamline.scoring.texts import read_text, windows

DENSE = "dense"
MANY = 5000  # questions, from which on the choices of one share a forward
DOCUMENT_TOKENS = 1024  # of each held-out document, from its beginning
TEXT_TOO = "nmse:0.3,kl+0.3lm:0.7"
METHODS: dict[str, dict[str, Any]] = {  # what of a recipe each sets; the tokens are the same for all that train
    "none": {"replace": "none"},
    "default": {},
    "paper": {"preset": "paper"},
    "paper-random": {"preset": "paper-random"},
    **{f"paper-{name}": {"preset": f"paper-{name}", "custom_code": True} for name in ("ffn", "swiglu")},
    "paper-none": {"preset": "paper-none"},
    "healed": {"heal": "all"},
    "default-text": {"loss": TEXT_TOO},
    "healed-text": {"heal": "all", "heal_loss": TEXT_TOO},
    "healed-kl": {"heal": "all", "heal_loss": "nmse:0.3,kl:0.7"},
    **{name: {"preset": name} for name in ("lora", "uidl", "last-n-head", "shortgpt", "sleb", "laco")},
    **{name: {"preset": name} for name in ("replaceme", "replaceme-cosine")},
    **{name: {"preset": name, "custom_code": True} for name in ("linearpatch", "linearpatch-kl", "ghost")},
}
# of which the map lies between two layers: it is to be no layer that is kept
BETWEEN = ("linearpatch", "linearpatch-kl", "ghost")


def given(text: str) -> tuple[str, dict[str, Any]]:
    """A method by its name, or 'NAME::key=value;key=value' for one that is being tried."""
    name, colon, values = text.partition("::")
    if not colon and name not in METHODS:
        sys.exit(f"--methods {text} is not known: give one of {', '.join(METHODS)}, or NAME::key=value;key=value.")
    return name, METHODS[name] if not colon else dict(pair.split("=", 1) for pair in values.split(";"))


def learns_text(name: str) -> bool:
    """Whether a method's loss is in part that of the text's next tokens."""
    losses = Recipe(model="", **METHODS[name]).trained_by
    return any(part.kind == "lm" or part.text for objective in losses for part in objective.parts)


def asked(name: str, remove: str, layers: int) -> str:
    """What a method is given as --remove, so that of every method as many of the model's own layers go, net."""
    if name not in BETWEEN:
        return remove
    net = int(float(remove.rstrip("%")) * layers / 100 + 0.5) if remove.endswith("%") else int(remove)
    return str(net - 1)


class Remembered:
    """A stage that is the same for several methods, done once: what it costs is in the first one's row."""

    def __init__(self, stage: Callable[..., Any], key: Callable[..., Any]) -> None:
        self._stage, self._key, self._found = stage, key, {}  # type: ignore[var-annotated]

    def __call__(self, *given: Any) -> Any:
        key = self._key(*given)
        if key not in self._found:
            self._found[key] = self._stage(*given)
        return self._found[key]


def remember() -> None:
    """Similarities and rankings: of one text in one order, for windows of one length."""
    run.measure = Remembered(run.measure, lambda work: work.inputs().model_dump_json())  # type: ignore[assignment]

    def ranked(model: Any, blocks: Any, batch: int, windows: Any, by: str, *_: Any) -> Any:
        free = not any(layer._forward_hooks for layer in layers_of(model))  # else some layers stand aside
        return (model.name_or_path, blocks.numpy().tobytes(), tuple(map(str, windows)), by) if free else object()

    selection.rank = Remembered(selection.rank, ranked)  # type: ignore[assignment]
    selection.survey = Remembered(selection.survey, ranked)  # type: ignore[assignment]


class Judge:
    """The text and the questions that models are judged by."""

    def __init__(self, model: str, heldout: Path | None, questions: Path | None) -> None:
        self.by = judged_by(heldout=heldout, questions=questions)
        source = Source(model)
        config = load_model(source, torch.float32).config
        tokenizer, context = load_tokenizer(source, config.vocab_size), context_length(config)
        block = min(2048, context)
        ids = (
            [tokenizer.encode(document, verbose=False) for document in read_text(heldout).documents] if heldout else []
        )
        cut = (some[:DOCUMENT_TOKENS] for some in ids)
        self._windows = [one for number, some in enumerate(cut) for one in windows(number, some, block, block - 1)]
        self._questions = read_questions(questions) if questions else []
        self._rows = encode(tokenizer, self._questions, context)

    def row(self, model: PreTrainedModel) -> dict[str, Any]:
        """Per document the summed loss in nats and the tokens; per question its choices' PPL and what is right.

        Matrix products are in bfloat16 where those are fast, which has moved an excess of 0.2306 nats by 0.00001.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16("cpu")):
            return {"judged_by": self.by, **self._row(model)}

    def _row(self, model: PreTrainedModel) -> dict[str, Any]:
        losses = token_losses(model, [window.ids for window in self._windows], None, lambda done: None)
        documents: dict[int, list[float]] = {}
        for window, loss in zip(self._windows, losses, strict=True):
            found = documents.setdefault(window.document, [0.0, 0])
            found[0] += float(loss[-window.new :].double().sum())
            found[1] += window.new
        return {"documents": list(documents.values()), "items": self._items(model)}

    def _items(self, model: PreTrainedModel) -> list[list[Any]]:
        """Per question its choices' PPL, and whether stability and accuracy call it right."""
        many = len(self._questions) >= MANY
        together = [many and packable(rows) for rows in self._rows]
        alone, packed = (self._asked(together, wanted) for wanted in (False, True))
        items = {
            False: iter(answers(model, *alone, "questions", quiet=True) if alone[0] else ()),
            True: iter(packed_answers(model, *packed, "questions")),
        }
        found = [next(items[shared]) for shared in together]
        return [[item.ppl, item.right, bool(item.likeliest_right)] for item in found]

    def _asked(self, together: list[bool], wanted: bool) -> tuple[list[Question], list[list[Row]]]:
        """The questions, with their rows, of which the choices share a forward, or do not."""
        places = [place for place, shared in enumerate(together) if shared == wanted]
        return [self._questions[place] for place in places], [self._rows[place] for place in places]


def shortened(values: dict[str, Any], scratch: Path, judge: Judge) -> dict[str, Any]:
    """One run's row. Errors: UserError where the method cannot be applied."""
    release()
    started, spent, before = time.perf_counter(), time.process_time(), held()
    out = scratch / "run"
    with Peak() as peak:
        result = compress(Recipe(**values), Runtime(output=out, tasks=("none",), quiet=True))
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}
    scores, fits = result.scores, [fit for fit in (result.fit, result.healing) if isinstance(fit, Fit)]
    row |= {"memory": peak.bytes - before, "training_seconds": sum(fit.seconds for fit in fits)}
    row |= {"window": ",".join(map(str, runs_of(result.plan.gone))), "parameters": result.plan.parameters_after}
    row |= {"trained": max([fit.trained_parameters for fit in fits], default=0), "tokens": sum(f.tokens for f in fits)}
    row["losses"] = [fit.loss for fit in fits]  # a default may become another
    row |= {"validation": scores.excess(scores.saved), "validation_dense": scores.dense.nats}
    row |= {"compute": "bfloat16" if multiplies_bfloat16("cpu") else "float32"}
    custom = result.plan.custom_code
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32, trust_remote_code=custom)
    row |= judge.row(model.eval())
    shutil.rmtree(out)
    return row


class Wanted(NamedTuple):
    """A row that is to be measured."""

    file: Path
    name: str
    remove: str
    seed: int
    values: dict[str, Any]


def described(values: dict[str, Any]) -> dict[str, str]:
    """What of a recipe a row is kept with, so that it is not taken for another's: files by their names alone."""
    files = ("model", "data")
    named = {key: Path(str(value)).name if key in files else str(value) for key, value in values.items()}
    return {**named, "tokens": str(parse_count(str(values["tokens"])))}


def budgets(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options for each budget alone: the first one's rows lie in ROWS, those of N more tokens in ROWS-N."""
    for number, tokens in enumerate(options.tokens):
        rows = options.rows.with_name(f"{options.rows.name}-{tokens}") if number else options.rows
        yield argparse.Namespace(**{**vars(options), "tokens": tokens, "rows": rows})


def models(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options for each model alone, with its own text; of several models the rows lie in ROWS/NAME."""
    own, count = ("data", "heldout", "questions"), len(options.model)
    names = [Path(model).name for model in options.model]
    if len(set(names)) < count:
        sys.exit(f"--model {' '.join(options.model)}: two have the same name; rows are kept by names, so give others.")
    texts = {key: getattr(options, key) or [None] * count for key in own}
    for key, given in texts.items():
        if len(given) != count:
            sys.exit(f"--{key} has to be given once for each of the {count} models, in their order.")
    for number, (model, name) in enumerate(zip(options.model, names, strict=True)):
        rows = options.rows / name if count > 1 else options.rows
        its = {"model": model, "rows": rows, **{key: given[number] for key, given in texts.items()}}
        yield argparse.Namespace(**{**vars(options), **its})


def leagues(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options for each model with each budget."""
    for one in models(options):
        yield from budgets(one)


def missing(options: argparse.Namespace, by: dict[str, str]) -> list[Wanted]:
    """The rows that were asked for and are not there, all methods of one seed and share in a row."""
    found, layers = [], load_config(Source(options.model)).num_hidden_layers
    for seed in options.seeds:
        for remove in options.remove:
            for name, values in map(given, options.methods):
                file = options.rows / f"{name}-{remove.rstrip('%')}-{seed}{SUFFIX}"
                base = {"model": options.model, "data": options.data, "tokens": options.tokens, "seed": seed}
                base["remove"] = asked(name, remove, layers)
                found.append(Wanted(file, name, remove, seed, {**base, **values}))
    there = [one for one in found if one.file.exists()]
    for one in there:
        check_row(one.file, asked=described(one.values), judged_by=by)
    return [one for one in found if one not in there]


def outlook(folder: Path, left: list[Wanted]) -> str:
    """How many rows are to go, and how long they take by what those that are there took."""
    known: dict[str, list[float]] = {}
    for file in folder.glob(f"*{SUFFIX}"):
        row = read_row(file)
        if "seconds" in row:
            known.setdefault(row["method"], []).append(row["seconds"])
    if not known:
        return f"{len(left)} rows to go"
    means = {name: sum(own) / len(own) for name, own in known.items()}
    usual = sum(means.values()) / len(means)
    return f"{len(left)} rows to go, about {sum(means.get(one.name, usual) for one in left) / 3600:.1f} h"


def add_dense(options: argparse.Namespace, judge: Judge) -> None:
    """The dense model's own row, which all others are read beside."""
    file, asked = options.rows / f"{DENSE}{SUFFIX}", {"model": Path(options.model).name}
    if file.exists():
        check_row(file, asked=asked, judged_by=judge.by)
    else:
        model = load_model(Source(options.model), torch.float32)
        write_row(file, {"method": DENSE, "asked": asked, **judge.row(model)})


def add_rows(options: argparse.Namespace) -> None:
    options.rows.mkdir(parents=True, exist_ok=True)
    remember()
    judge = Judge(options.model, options.heldout, options.questions)
    wanted = missing(options, judge.by)
    add_dense(options, judge)
    for number, one in enumerate(wanted):
        say(outlook(options.rows, wanted[number:]), False)
        with tempfile.TemporaryDirectory() as scratch:
            try:
                row = shortened(one.values, Path(scratch), judge)
            except UserError as error:
                say(f"{one.file.name}: {error}", False)
                continue
        told = {"method": one.name, "remove": one.remove, "seed": one.seed, "asked": described(one.values)}
        write_row(one.file, {**told, **row})
        say(f"{one.file.name}: excess {row['validation']:.4f} nats, {row['seconds']:.0f} s", False)


def flags(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--heldout", nargs="+", type=Path)
    parser.add_argument("--questions", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--remove", nargs="+", default=["25%", "42%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", nargs="+", default=["500k"])
    return parser


def main() -> None:
    for options in leagues(flags(__doc__).parse_args()):
        add_rows(options)


if __name__ == "__main__":
    main()
