"""The command line: thin, with the flags of `flags.py` and heavy imports left to the commands.

`llm-streamline --help` answers before pydantic is loaded: only the command that is called gets its flags.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_streamline import __version__
from llm_streamline.errors import StreamlineError, WorkerLost
from llm_streamline.flags import NOT_ESTIMATE, NOT_EVALUATE, NOT_SWEEP, ONLY_COMPRESS, command_line, with_flags
from llm_streamline.interruption import stop_at_once

if TYPE_CHECKING:
    from rich.table import Table

    from llm_streamline.evaluation import Request, Result
    from llm_streamline.recipe import Recipe, Runtime
    from llm_streamline.records import Record

_INTERRUPTED = 130
_WIDE = 160


def _examples(*lines: str) -> str:
    """The end of a help page; `tests/test_cli.py` runs every line of it."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def compress(recipe: Recipe, runtime: Runtime) -> None:
    """Replace redundant layers and write a verified HuggingFace folder."""
    from llm_streamline import preview, run

    if runtime.dry_run:
        plan = preview.plan_only(recipe, runtime)
        _print(runtime.json_output, plan, [run.describe(plan)])
        return
    result = run.compress(recipe, runtime)
    _print(runtime.json_output, result, _summary(result))


def _summary(result: Result) -> list[str | Table]:
    from llm_streamline import report

    return [
        report.summary_table(result.plan, result.scores),
        *report.summary_lines(result),
        *report.kept_lines(result.evaluation),
        f"report    {result.report}",
    ]


def sweep(recipe: Recipe, runtime: Runtime) -> None:
    """Shorten a model at several ratios, --remove 10%,20%,30%, and show what each costs: the paper's Figure 4.

    Every ratio is a run of its own in OUT/remove-RATIO; what an earlier, also an interrupted, sweep in OUT has finished
    is not repeated. OUT/sweep.json and OUT/sweep.png have all of them.
    """
    from llm_streamline import report
    from llm_streamline.run import describe
    from llm_streamline.sweep import FIGURE, plans, sweep

    if runtime.dry_run:
        found = plans(recipe, runtime)
        as_json = {ratio: json.loads(plan.model_dump_json()) for ratio, plan in found.items()}
        _print(runtime.json_output, as_json, [f"{ratio:<5} {describe(plan)}" for ratio, plan in found.items()])
        return
    done = sweep(recipe, runtime)
    _print(runtime.json_output, done, [report.sweep_table(done), f"figure    {runtime.output}/{FIGURE}"])


def analyze(recipe: Recipe, runtime: Runtime) -> None:
    """Measure how little every run of layers changes the hidden state.

    With --remove, --max-params or --select, also what each window of that length would cost, by every score.
    """
    from llm_streamline import preview, report

    similarity, ranking, folder = preview.analyze_model(recipe, runtime)
    best = report.window_table(similarity, recipe.protect_first, recipe.protect_last)
    files = f"similarity.json, similarity.png and heat-map.png are in {folder}"
    lines = [report.layer_table(similarity), best, *(report.ranking_lines(ranking) if ranking else []), files]
    both = {"similarity": similarity.model_dump(), "ranking": ranking.model_dump()} if ranking else similarity
    _print(runtime.json_output, both, lines)


def verify(
    folder: Annotated[Path, typer.Argument(help="A run folder or the model folder in it.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that lies in the folder.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Check in a fresh process that a folder computes what it should."""
    from llm_streamline import oracle

    found = oracle.verify(folder, trust_remote_code)
    lines = [f"problem: {problem}" for problem in found.problems] or [
        f"verified: logits within {found.logits_error:.1e}, cached = uncached generation, "
        f"{found.parameters:,} parameters in {found.tensors} tensors"
    ]
    _print(json_output, found, [*lines, *(f"limit: {limit}" for limit in found.limits)])
    if not found.passed:
        raise typer.Exit(1)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")] = Path("demo-run"),
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Shorten the bundled model and ask it questions before and after."""
    from llm_streamline import demonstration
    from llm_streamline.recipe import Runtime

    result, answers = demonstration.demo(Runtime(output=output, command=command_line()))
    line = "accuracy " + " ".join(f"{name} {value:.2f}" for name, value in answers.items())
    _print(json_output, {"accuracy": answers, **json.loads(result.model_dump_json())}, [*_summary(result), line])


def estimate(recipe: Recipe, runtime: Runtime) -> None:
    """Tell what a run takes before it is begun: memory, disk, tokens and time of every stage.

    From the configuration alone, and a layer of the model's kind that is timed for a moment; no weights are read.
    """
    from llm_streamline import preview, report

    found = preview.estimate_only(recipe, runtime)
    _print(runtime.json_output, found, [report.estimate_table(found), *report.estimate_lines(found)])


def families(
    json_output: Annotated[bool, typer.Option("--json", help="Print the list as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """List the model types that are proven, and why the others are refused."""
    from rich.table import Table

    from llm_streamline.families import known_families

    found = known_families()
    table = Table("model_type", "status", "what was proven, or why not")
    for row in found:
        table.add_row(*row.values())
    _print(json_output, found, [table])


def stability(
    before: Annotated[Path, typer.Argument(help="The dense model's items: a file or folder.")],
    after: Annotated[Path, typer.Argument(help="The shortened model's items on the same tasks.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Compare two models' answers, item by item: stability, flips, accuracy.

    Reads our items, lm-eval's samples_*.jsonl and OpenCompass's prediction folders, whichever a path holds.
    """
    from llm_streamline.report import macro_lines, stability_lines, stability_table
    from llm_streamline.scoring.items import read_items
    from llm_streamline.scoring.stability import compare_tasks, macro

    found = compare_tasks(read_items(before), read_items(after))
    mean = macro(found)
    as_json = {"tasks": [json.loads(one.model_dump_json()) for one in found], "macro": mean}
    _print(json_output, as_json, [stability_table(found), *macro_lines(mean, len(found)), *stability_lines(found)])


def evaluate(request: Request, runtime: Runtime) -> None:
    """Ask models questions and let them predict text, and compare their answers with the dense model's.

    Writes every answer to OUT/items/MODEL/TASK.jsonl, all figures to OUT/evaluation.json, and a page to judge by,
    OUT/report.html. What an earlier, also an interrupted, evaluation in OUT has finished is not repeated.
    """
    from llm_streamline.report import evaluation_lines
    from llm_streamline.run import evaluate

    found = evaluate(request, runtime)
    _print(runtime.json_output, found, [*evaluation_lines(found), f"report    {runtime.output}/report.html"])


def _print(as_json: bool, record: Record | dict[str, Any] | list[dict[str, str]], lines: list[Any]) -> None:
    """Results on stdout: as JSON where asked for, else as tables and lines for people."""
    if as_json:
        print(json.dumps(record, indent=1) if isinstance(record, (dict, list)) else record.model_dump_json(indent=1))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else _WIDE  # in a file or pipe nothing has to be cut off
    console = Console(highlight=False, soft_wrap=True, width=width)
    for line in lines:
        console.print(line, markup=False) if isinstance(line, str) else console.print(line)


def _version(show: bool) -> None:
    if show:
        print(f"llm-streamline {__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, tuple[Callable[..., None], str, set[str] | None]] = {
    "compress": (
        compress,
        _examples(
            "llm-streamline compress bundled --data bundled -o shorter --remove 25% --tokens 20k",
            "llm-streamline compress bundled --data bundled -o cut --window 4:7 --replace none --tasks none",
            "llm-streamline compress bundled --data bundled --remove 3 --dry-run --json",
        ),
        {"beside"},
    ),
    "sweep": (
        sweep,
        _examples(
            "llm-streamline sweep bundled --data bundled --remove 10%,40% --preset paper --dry-run",
            "llm-streamline sweep bundled --data bundled --remove 2,4 --replace none --tasks none -o sweep --json",
        ),
        NOT_SWEEP,
    ),
    "estimate": (
        estimate,
        _examples(
            "llm-streamline estimate bundled --remove 25%",
            "llm-streamline estimate bundled --tokens 20k --memory 1GB --json",
        ),
        NOT_ESTIMATE,
    ),
    "analyze": (
        analyze,
        _examples(
            "llm-streamline analyze bundled --data bundled -o analysis",
            "llm-streamline analyze bundled --data bundled -o analysis --calibration-tokens 20k --json",
            "llm-streamline analyze bundled --data bundled -o ranked --calibration-tokens 20k --remove 25%",
        ),
        ONLY_COMPRESS,
    ),
    "verify": (verify, _examples("llm-streamline verify shorter", "llm-streamline verify shorter/model --json"), None),
    "evaluate": (
        evaluate,
        _examples(
            "llm-streamline evaluate shorter --against bundled --tasks questions.jsonl --text text.jsonl -o eval",
            "llm-streamline evaluate shorter --tasks questions.jsonl --limit 5 -o some --json",
        ),
        NOT_EVALUATE,
    ),
    "stability": (
        stability,
        _examples(
            "llm-streamline stability predictions/before predictions/after",
            "llm-streamline stability logs/dense logs/shorter --json",
        ),
        None,
    ),
    "families": (families, _examples("llm-streamline families", "llm-streamline families --json"), None),
    "demo": (demo, _examples("llm-streamline demo -o demo-run"), None),
}


def make_app(called: str | None) -> typer.Typer:
    """The commands, of which only the one that is called has its flags."""
    app = typer.Typer(
        name="llm-streamline",
        help="Make a HuggingFace causal language model shallower, keep what it knew, and prove it.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    for name, (command, examples, without) in COMMANDS.items():
        if without is not None:
            command = with_flags(command, without) if name == called else _named(command)
        app.command(name, epilog=examples)(command)
    return app


def _named(command: Callable[..., None]) -> Callable[[], None]:
    """A command's place in the list of commands, without its flags."""

    def stands_in() -> None:
        raise AssertionError("only the command that is called is run")

    stands_in.__doc__ = command.__doc__
    return stands_in


def main(arguments: list[str] | None = None) -> None:
    """The console script.

    Exit codes: 0 done, 1 not verified, 2 refused, 3 unexpected, 4 a worker lost, 130 or 143 interrupted.
    Of several processes of one run, only the first says why it ends, unless they lose one another.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    follows = int(os.environ.get("RANK", 0)) > 0
    try:
        called = next((argument for argument in arguments if argument in COMMANDS), None)
        with stop_at_once():
            code = make_app(called)(args=arguments, standalone_mode=False, prog_name="llm-streamline")
    except StreamlineError as error:
        if follows and not isinstance(error, WorkerLost):
            raise SystemExit(error.exit_code) from None
        _end(str(error), error.exit_code, arguments)
    except Exception as error:
        if hasattr(error, "format_message"):  # what the command-line library refuses
            _end(f"{error.format_message()} See 'llm-streamline --help'.", 2, arguments)
        what = (str(error).splitlines() or [""])[0]
        _end(
            f"unexpected {type(error).__name__}: {what} (repeat with --debug for the trace, and report it).",
            3,
            arguments,
        )
    if code == _INTERRUPTED:
        _end("interrupted; the same command continues after the last finished stage.", _INTERRUPTED, arguments)
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _end(message: str, code: int, arguments: list[str]) -> None:
    if "--debug" in arguments:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
