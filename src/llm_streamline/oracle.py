"""What a saved model must compute, and the check that it does, in a fresh process.

The oracle is the source model with the window skipped or replaced through hooks, cast to the saved number format;
it shares nothing with the newly built model. (With a wrongly sliced config, a reloaded model equals the built one
with error 0.0 and is wrong all the same.) Its prompts and logits stay in the folder, so that `verify` works later,
without the source.

Run as a module, `python -m llm_streamline.oracle FOLDER` makes the check with stock transformers and prints JSON.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_streamline.errors import UserError
from llm_streamline.files import sha256
from llm_streamline.memory import memory_limit
from llm_streamline.records import Manifest, Verification

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_TRUST, _MEMORY = "--trust-remote-code", "--memory="
FOLDER = "verification"
MANIFEST = "streamline.json"
TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest logit, in float32
SCALED = {"w4a16"}  # whose scales are parameters
LOSSY = {"int8": 0.1, "w4a16": 0.3}  # of quantised weights, which are not those that the oracle has
PROMPTS = 3
PROMPT_TOKENS = 48
NEW_TOKENS, FEW_NEW_TOKENS = 16, 4  # the few where each reads the whole model from the disk
KEPT_POSITIONS = 8  # logits of the last few positions: each depends on every token and layer before it
LONGEST_PROMPT = 1024
_LIBRARIES = 2**29  # bytes that torch and its like take


def record_oracle(model: PreTrainedModel, prompts: Tensor, folder: Path) -> None:
    """Write prompts (P, T) and `model`'s logits on them (P, KEPT_POSITIONS, V), float32, for later checks."""
    from safetensors.torch import save_file

    from llm_streamline.layerwise import logits_of

    (logits,) = logits_of(model, [prompts])
    logits = logits[:, -KEPT_POSITIONS:].float()
    (folder / FOLDER).mkdir(parents=True)
    tensors = {"input_ids": prompts.long().contiguous(), "logits": logits.contiguous()}
    save_file(tensors, folder / FOLDER / "oracle.safetensors")


def prompt_length(config: PretrainedConfig, sliding_window: int | None) -> tuple[int, list[str]]:
    """Tokens per prompt: past any sliding window where that can be run, and otherwise what the claim is limited to."""
    context = int(getattr(config, "max_position_embeddings", None) or 2048)
    longest = max(1, min(LONGEST_PROMPT, context - NEW_TOKENS))
    wanted = max(PROMPT_TOKENS, (sliding_window or 0) + NEW_TOKENS)
    if wanted <= longest or not sliding_window:
        return min(wanted, longest), []
    return longest, [f"checked with prompts of {longest} tokens, within the sliding window of {sliding_window}"]


def verify(folder: Path | str, trust_remote_code: bool = False, memory: int | None = None) -> Verification:
    """Check a model folder made by this tool, in a fresh process. Errors: UserError where it is none.

    What needs more than `memory` bytes (the machine's or the container's where not given) is loaded layer by layer.

    `folder` is the model folder or the run folder around it; code that lies in it is run only where that is trusted.
    """
    model = model_folder(Path(folder))
    if Manifest.read(model / MANIFEST).plan.custom_code and not trust_remote_code:
        raise UserError(
            f"{folder} brings its own model code; read its .py files, then allow them with --trust-remote-code."
        )
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    # so that weights that are loaded and let go, layer by layer, leave no holes in the C library's memory
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    command = [sys.executable, "-m", "llm_streamline.oracle", str(model), *([_TRUST] if trust_remote_code else [])]
    command += [] if memory is None else [f"{_MEMORY}{memory}"]
    with tempfile.TemporaryDirectory() as modules:  # transformers copies a folder's code there before running it
        environment["HF_MODULES_CACHE"] = modules
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        return _failed(f"the folder does not load in a fresh process: {lines[-1]}")
    return Verification.model_validate_json(done.stdout.splitlines()[-1])


def model_folder(folder: Path) -> Path:
    """The folder with the model: `folder` or `folder/model`. Errors: UserError."""
    for candidate in (folder, folder / "model"):
        if (candidate / MANIFEST).is_file() and (candidate / FOLDER / "oracle.safetensors").is_file():
            return candidate
    raise UserError(
        f"{folder} is no model made by llm-streamline ({MANIFEST} or {FOLDER}/ is missing); "
        "give a run folder or its model/."
    )


def _failed(problem: str) -> Verification:
    return Verification(
        logits_error=float("inf"),
        tolerance=TOLERANCE,
        cached_equals_uncached=False,
        parameters=0,
        tensors=0,
        problems=[problem],
        limits=[],
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    import torch
    import transformers

    from llm_streamline import __version__

    return {
        "llm-streamline": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check(folder: Path, trust_remote_code: bool = False, memory: int | None = None) -> Verification:
    """Load `folder` with plain transformers, in float32, and hold it against its oracle and its manifest."""
    import torch
    from safetensors.torch import load_file

    torch.manual_seed(0)
    manifest, tensors = Manifest.read(folder / MANIFEST), stored_tensors(folder)
    if layers := manifest.recipe.get("family_from"):
        _try_family(folder, layers)
    oracle = load_file(folder / FOLDER / "oracle.safetensors")
    fits = sum(tensors.values()) * 4 + _LIBRARIES <= (memory or memory_limit()) or manifest.plan.custom_code
    with tempfile.TemporaryDirectory() as rewritten:
        places = {} if fits else {"device_map": _on_disk(folder), "offload_folder": rewritten}
        model, loading = _loaded(folder, trust_remote_code and manifest.plan.custom_code, places)
        error = _logits_error(model, oracle)
        cached = _generates_alike(model, oracle["input_ids"], NEW_TOKENS if fits else FEW_NEW_TOKENS)
    limits = [] if fits else [f"cached generation was compared over {FEW_NEW_TOKENS} tokens, as memory is short"]
    problems = [
        *_loading_problems(loading),
        *([] if weight_hashes(folder) == manifest.weights else ["the weights are not the ones that were written"]),
        *_count_problems(model, manifest, None if manifest.quantised else sum(tensors.values())),
        *_tokenizer_problems(folder, trust_remote_code),
    ]
    tolerance = LOSSY[manifest.quantised] if manifest.quantised else TOLERANCE
    if not error <= tolerance:  # also true of nan
        problems.append(f"logits differ from the source's by {error:.2g} relative, over the tolerance of {tolerance:g}")
    if not cached:
        problems.append("greedy generation with the cache differs from generation without it")
    return Verification(
        logits_error=error,
        tolerance=tolerance,
        cached_equals_uncached=cached,
        parameters=manifest.plan.parameters_after if manifest.quantised in SCALED else model.num_parameters(),
        tensors=len(tensors),
        problems=problems,
        limits=[*manifest.limits, *limits],
        versions=versions(),
    )


def _try_family(folder: Path, layers: str) -> None:
    """What the run was told of a kind that had no row, told to this process where it has none yet."""
    from transformers import AutoConfig

    from llm_streamline.families import has_row, try_family

    config = AutoConfig.from_pretrained(folder)
    if not has_row(config):
        try_family(config, layers)


def _loaded(folder: Path, trust: bool, places: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust, **places
    )
    return model.eval(), loading


def _on_disk(folder: Path) -> dict[str, str]:
    from transformers import AutoConfig

    from llm_streamline.checkpoint import without_weights
    from llm_streamline.offload import device_map

    return device_map(without_weights(AutoConfig.from_pretrained(folder)), "cpu")


def _logits_error(model: PreTrainedModel, oracle: dict[str, Tensor]) -> float:
    import torch

    with torch.no_grad():
        logits = model(input_ids=oracle["input_ids"], use_cache=False).logits[:, -KEPT_POSITIONS:]
    difference = (logits - oracle["logits"]).abs().max() / oracle["logits"].abs().max()
    return float(difference)


def _generates_alike(model: PreTrainedModel, prompts: Tensor, tokens: int) -> bool:
    """Whether greedy generation is the same with and without the cache."""
    import torch
    from transformers import GenerationConfig

    # the model's own settings (sampling, several sequences, penalties) have no part in this
    model.generation_config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(prompts)
    cached, uncached = (model.generate(prompts, attention_mask=mask, use_cache=cache) for cache in (True, False))
    return torch.equal(cached, uncached)


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weights file in the folder."""
    hashes = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as stream:
            hashes[shard.name] = sha256(*iter(lambda: stream.read(2**24), b""))
    return hashes


def _loading_problems(loading: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [
        f"{kind.replace('_', ' ')} on loading: {sorted(map(str, loading[kind]))[:5]}"
        for kind in kinds
        if loading.get(kind)
    ]


def stored_tensors(folder: Path) -> dict[str, int]:
    """How many numbers each tensor in the folder's safetensors files holds."""
    from safetensors import safe_open

    sizes: dict[str, int] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as tensors:
            sizes |= {key: math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    return sizes


def _count_problems(model: PreTrainedModel, manifest: Manifest, stored: int | None) -> list[str]:
    """Parameters and stored numbers against what was planned; a tied weight that is stored twice shows here.

    Quantised weights are stored with scales of their own, and not counted; nor is a model whose scales are parameters.
    """
    if manifest.quantised in SCALED:
        return []
    problems = []
    if model.num_parameters() != manifest.plan.parameters_after:
        problems.append(f"{model.num_parameters()} parameters where the plan says {manifest.plan.parameters_after}")
    # numbers, not tensors: transformers stores the experts of a layer one by one and holds them as one tensor
    # what is on the disk has no address, and is tied to nothing
    weights = model.state_dict().items()
    distinct = sum({tensor.data_ptr() or name: tensor.numel() for name, tensor in weights}.values())
    if stored not in (distinct, None):
        problems.append(f"{stored} numbers are stored where the model has {distinct}")
    return problems


def _tokenizer_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """The saved tokenizer must make the ids that the source's made of the same words."""
    from transformers import AutoTokenizer

    sample = folder / FOLDER / "tokenizer.json"
    if not sample.is_file():
        return []
    expected = json.loads(sample.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    ids = tokenizer(expected["text"])["input_ids"]
    return [] if ids == expected["ids"] else ["the saved tokenizer makes other ids than the source's"]


if __name__ == "__main__":
    _memory = [int(given.removeprefix(_MEMORY)) for given in sys.argv if given.startswith(_MEMORY)]
    print(check(Path(sys.argv[1]), _TRUST in sys.argv, *_memory).model_dump_json())
