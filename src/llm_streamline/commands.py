"""The commands: each calls what it is for and prints what came out. Heavy imports are left to each of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_streamline.flags import command_line

if TYPE_CHECKING:
    from rich.table import Table

    from llm_streamline.evaluation import Request, Result
    from llm_streamline.recipe import Recipe, Runtime
    from llm_streamline.records import Record

_WIDE = 400
_LLAMA_CPP = "The folder of llama.cpp's source, whose converter writes GGUF. [default: $LLAMA_CPP, or the PATH]"


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
        *([report.chain_table(result.chain)] if result.chain else []),
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

    With --remove, --max-params or --select, also what each window of that length would cost, by every score, where
    several may go and the model fits in memory or a score is named.
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
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", help="Compare this program with transformers instead: llama.cpp, onnxruntime or vllm."
        ),
    ] = None,
    llama_cpp: Annotated[Path | None, typer.Option("--llama-cpp", help=_LLAMA_CPP)] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Check in a fresh process that a folder computes what it should, or that another program computes the same."""
    from llm_streamline import oracle

    if runtime:
        _in_runtime(folder, runtime, llama_cpp, json_output)
        return
    found = oracle.verify(folder, trust_remote_code)
    lines = [f"problem: {problem}" for problem in found.problems] or [
        f"verified: logits within {found.logits_error:.1e}, cached = uncached generation, "
        f"{found.parameters:,} parameters in {found.tensors} tensors"
    ]
    _print(json_output, found, [*lines, *(f"limit: {limit}" for limit in found.limits)])
    if not found.passed:
        raise typer.Exit(1)


def _in_runtime(folder: Path, runtime: str, llama_cpp: Path | None, json_output: bool) -> None:
    from llm_streamline.export import compare_runtime
    from llm_streamline.report import compared_lines

    found = compare_runtime(str(folder), runtime, llama_cpp)
    _print(json_output, found, [*(f"problem: {problem}" for problem in found.problems), *compared_lines(found)])
    if found.problems:
        raise typer.Exit(1)


def export(
    model: Annotated[str, typer.Argument(help="A model folder, a run folder, or 'bundled'.")],
    to: Annotated[str, typer.Option("--to", help="The format: gguf (llama.cpp) or onnx (ONNX Runtime).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new file, for onnx the new folder.")],
    number_format: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Number format: for gguf f32, f16, bf16, q8_0, q4_k_m and the like; for onnx f32 alone. [default: the "
            "model's, for onnx f32]",
        ),
    ] = None,
    llama_cpp: Annotated[Path | None, typer.Option("--llama-cpp", help=_LLAMA_CPP)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Write a model for another program, and compare what that computes with transformers where it is installed."""
    from llm_streamline.export import export
    from llm_streamline.report import compared_lines

    found = export(model, to, output, number_format, llama_cpp)
    size = f"{found.path}: {found.number_format}, {found.bytes / 1e6:.1f} MB"
    _print(json_output, found, [size, *(line for check in found.checks for line in compared_lines(check))])


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


def adapter(
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter of the dense model, as peft saves it.")],
    model: Annotated[Path, typer.Argument(help="The run folder of the shortened model, or the model folder in it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new adapter's folder.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Renumber an existing LoRA adapter of the dense model for its shortened one.

    What adapts a layer that stays is kept as it is; what adapts one that is gone is left out.
    """
    from llm_streamline.adapters import remap_adapter

    found = remap_adapter(adapter, model, output)
    gone = ", ".join(map(str, found.layers_left_out))
    left_out = f"; {found.left_out} of layers {gone} left out" if found.left_out else ""
    _print(json_output, found, [f"{found.kept} tensors of layers and {found.outside} others kept{left_out}: {output}"])


def text_model(
    model: Annotated[str, typer.Argument(help="A model that also sees or hears: its folder, or its name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read weights in pickle form where there are no others.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """Write the text model inside one that also sees or hears as a model of its own, to be shortened.

    The weights stay as they are; what is written is checked against the whole model on text.
    """
    from llm_streamline.checkpoint import Source
    from llm_streamline.tower import write_text_model

    found = write_text_model(Source(model, allow_pickle), output)
    kinds = f"{found.text_type} out of {found.model_type}"
    counts = f"{found.parameters:,} parameters, {found.left_out:,} left out"
    _print(json_output, found, [f"{output}: {kinds}, {counts}, logits within {found.logits_error:.1e}"])


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

    width = None if sys.stdout.isatty() else _WIDE  # in a file or pipe nothing is to be cut off
    console = Console(highlight=False, soft_wrap=True, width=width)
    for line in lines:
        console.print(line, markup=False) if isinstance(line, str) else console.print(line)
