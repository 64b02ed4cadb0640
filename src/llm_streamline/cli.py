"""The command line: thin, with the flags of `flags.py` and heavy imports left to the commands.

`llm-streamline --help` answers before pydantic is loaded: only the command that is called gets its flags.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from llm_streamline import __version__, commands
from llm_streamline.errors import StreamlineError, WorkerLost
from llm_streamline.flags import NOT_ESTIMATE, NOT_EVALUATE, NOT_SWEEP, ONLY_COMPRESS, with_flags
from llm_streamline.interruption import stop_at_once

_INTERRUPTED = 130


def _examples(*lines: str) -> str:
    """The end of a help page; `tests/test_cli.py` runs every line of it."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


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
        commands.compress,
        _examples(
            "llm-streamline compress bundled --data bundled -o shorter --remove 25% --tokens 20k",
            "llm-streamline compress bundled --data bundled -o cut --window 4:7 --replace none --tasks none",
            "llm-streamline compress bundled --data bundled --remove 3 --dry-run --json",
        ),
        {"beside"},
    ),
    "sweep": (
        commands.sweep,
        _examples(
            "llm-streamline sweep bundled --data bundled --remove 10%,40% --preset paper --dry-run",
            "llm-streamline sweep bundled --data bundled --remove 2,4 --replace none --tasks none -o sweep --json",
        ),
        NOT_SWEEP,
    ),
    "estimate": (
        commands.estimate,
        _examples(
            "llm-streamline estimate bundled --remove 25%",
            "llm-streamline estimate bundled --tokens 20k --memory 1GB --json",
        ),
        NOT_ESTIMATE,
    ),
    "analyze": (
        commands.analyze,
        _examples(
            "llm-streamline analyze bundled --data bundled -o analysis",
            "llm-streamline analyze bundled --data bundled -o analysis --calibration-tokens 20k --json",
            "llm-streamline analyze bundled --data bundled -o ranked --calibration-tokens 20k --remove 25%",
        ),
        ONLY_COMPRESS,
    ),
    "verify": (
        commands.verify,
        _examples("llm-streamline verify shorter", "llm-streamline verify shorter/model --json"),
        None,
    ),
    "export": (
        commands.export,
        _examples(
            "llm-streamline export shorter --to gguf -o shorter.gguf",
            "llm-streamline export shorter --to gguf --type q8_0 -o shorter-q8_0.gguf --json",
            "llm-streamline export shorter --to onnx -o shorter-onnx",
        ),
        None,
    ),
    "evaluate": (
        commands.evaluate,
        _examples(
            "llm-streamline evaluate shorter --against bundled --tasks questions.jsonl --text text.jsonl -o eval",
            "llm-streamline evaluate shorter --tasks questions.jsonl --limit 5 -o some --json",
        ),
        NOT_EVALUATE,
    ),
    "stability": (
        commands.stability,
        _examples(
            "llm-streamline stability predictions/before predictions/after",
            "llm-streamline stability logs/dense logs/shorter --json",
        ),
        None,
    ),
    "adapter": (
        commands.adapter,
        _examples("llm-streamline adapter lora-of-bundled shorter -o lora-of-shorter"),
        None,
    ),
    "text-model": (
        commands.text_model,
        _examples("llm-streamline text-model vision-model -o text-model"),
        None,
    ),
    "families": (commands.families, _examples("llm-streamline families", "llm-streamline families --json"), None),
    "demo": (commands.demo, _examples("llm-streamline demo -o demo-run"), None),
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
