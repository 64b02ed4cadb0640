"""Runtime: how to make what a Recipe asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from llm_streamline.quantities import Duration, Size
from llm_streamline.schema import Schema, as_several


class Runtime(Schema):
    """How to make it: nothing here changes what is asked for, though number formats change the last bits."""

    output: Path | None = Field(None, description="The run folder; OUT/model is the HuggingFace folder.")
    device: str = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number format to compute in; auto takes bfloat16 where the machine multiplies it fast.",
    )
    memory: Size | None = Field(
        None,
        description="Memory to keep within, e.g. 16GB; a model that needs more is read from the disk layer by layer. "
        "[default: what the machine, or the container, has]",
    )
    threads: int | None = Field(None, gt=0, description="CPU threads. [default: torch's choice]")
    tasks: Annotated[tuple[str, ...], BeforeValidator(as_several)] = Field(
        ("quick",),
        description="What to ask the dense, the cut and the saved model in the end, as evaluate takes it, besides "
        "questions of the run's own text; or none, to evaluate nothing. Repeat it for several. [default: quick]",
    )
    then: Literal["int8", "int4", "w4a16"] | None = Field(
        None,
        description="Also write the shortened model with fewer bits per weight, and ask it what the others are: int8, "
        "a folder for transformers with torchao, OUT/model-int8; int4, a file for llama.cpp, OUT/model-q4_k_m.gguf; "
        "w4a16, 4 bits too, a folder for vLLM by llm-compressor, OUT/model-w4a16.",
    )
    beside: Annotated[tuple[str, ...], BeforeValidator(as_several)] = Field(
        (),
        description="A dense model to show on the same axes, such as the next smaller one of the family. Repeat it for "
        "several.",
    )
    cache: Size | None = Field(
        None,
        description="With several --epochs: keep states on the disk, in as many bytes at most, e.g. 20GB, so that the "
        "frozen layers run once; used where it is measured to be faster. [default: no cache]",
    )
    checkpoint_every: Duration = Field(
        300.0,
        description="How often training writes its state, from which the same command continues after any "
        "interruption, e.g. 2s, 5m or 1h. [default: 5m]",
    )
    fresh: bool = Field(False, description="Begin again: delete what an earlier run left in the output folder.")
    worker_timeout: Duration = Field(
        600.0,
        description="How long the processes of one run, as torchrun starts them, wait for one another before they "
        "give up, e.g. 30s or 10m. [default: 10m]",
    )
    tracker: str | None = Field(
        None,
        description="Also log the training curve to an accelerate tracker: tensorboard, wandb, trackio, ...",
    )
    allow_pickle: bool = Field(False, description="Load a checkpoint in pickle form (it can run code).")
    trust_remote_code: bool = Field(False, description="Run model code that comes with the checkpoint.")
    dry_run: bool = Field(False, description="Print the plan and stop; write nothing.")
    json_output: bool = Field(False, alias="json", description="Print the result as JSON on stdout.")
    quiet: bool = Field(False, description="No progress on stderr.")
    command: str | None = Field(None, description="The command line, for the manifest.", exclude=True)
    debug: bool = Field(False, description="Show the trace of an error.")
