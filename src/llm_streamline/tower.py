"""The text model inside one that does not only read -> an ordinary causal LM, which can then be shortened.

Its weights are the same to the bit. What is written is loaded again, and must predict of text what the whole predicts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from llm_streamline.architectures import FURTHER_TOKENS_KEYS
from llm_streamline.checkpoint import QUANTISED, Source, load_model, load_tokenizer, read_config, without_weights
from llm_streamline.errors import UserError, reason
from llm_streamline.families import NOT_PROVEN, has_row
from llm_streamline.fidelity import further_said, further_tokens
from llm_streamline.files import atomic
from llm_streamline.progress import say
from llm_streamline.record import Record

if TYPE_CHECKING:
    from torch import Tensor

_TOLERANCE = 1e-5  # largest difference of a logit, relative to the largest
_GENERATING = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM")  # the second is not in older versions
_RIGHTS = ("LICENSE*", "NOTICE*")


class TextModel(Record):
    """What was written: the kind of the whole and of the text model in it, parameters, and the check's figure."""

    model_type: str
    text_type: str
    parameters: int
    left_out: int  # parameters of what sees or hears
    logits_error: float
    folder: str


def write_text_model(source: Source, output: Path) -> TextModel:
    """Write to `output`, which must not be there, the text model alone, with the tokenizer.

    Errors: UserError, with nothing written, for a model that has none in it, or one that is not proven.
    """
    config = read_config(source)
    text_config = _text_config(source, config)
    if output.exists():
        raise UserError(f"-o {output} is there already; give a folder that is new.")
    whole = _load(source, config)
    text = _inner(source, whole, text_config)
    with atomic(output) as temporary:
        _write(source, text, temporary, whole.generation_config)
        error = _difference(whole, load_model(Source(str(temporary)), whole.dtype))
        if not error <= _TOLERANCE:  # also true of nan
            raise UserError(
                f"the text model in {source.name} predicts something else alone than in the whole (logits differ by "
                f"{error:.2g} relative), so that nothing was written; give a model of text."
            )
    parameters = text.num_parameters()
    return TextModel(
        model_type=config.model_type,
        text_type=text_config.model_type,
        parameters=parameters,
        left_out=whole.num_parameters() - parameters,
        logits_error=error,
        folder=str(output),
    )


def _text_config(source: Source, config: PretrainedConfig) -> PretrainedConfig:
    found = config.get_text_config(decoder=True)
    if found is config:
        raise UserError(f"{source.name} is a model of text alone ({config.model_type!r}); give it as it is.")
    if any(getattr(one, key, None) for one in (config, found) for key in QUANTISED):
        raise UserError(f"{source.name} is quantised, and cannot be cut; give the model it was made from.")
    if not has_row(found):
        raise UserError(
            f"the text model in {source.name} is of type {found.model_type!r}, which is {NOT_PROVEN}; give another."
        )
    return found


def _load(source: Source, config: PretrainedConfig) -> PreTrainedModel:
    """The whole model, in its own number format. Errors: UserError."""
    tables: list[Any] = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {}) for name in _GENERATING]
    kind = next((one[type(config)] for one in tables if type(config) in one), None)
    if kind is None:
        raise UserError(
            f"{source.name} is of type {config.model_type!r}, which cannot be taken apart here; give a model of text."
        )
    try:
        model, loading = kind.from_pretrained(
            source.path, dtype="auto", use_safetensors=None if source.allow_pickle else True, output_loading_info=True
        )
    except Exception as error:  # files and formats fail in many ways
        raise UserError(f"the weights of {source.name} do not load ({reason(error)}); fetch them again.") from error
    if missing := sorted(map(str, loading["missing_keys"])):
        raise UserError(f"{missing[0]} is missing from {source.name} ({len(missing)} such weights); fetch it again.")
    return model.eval()


def _inner(source: Source, whole: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A causal LM that has the whole's decoder and head, not copies of them. Errors: UserError."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    if head is None:
        raise UserError(f"no head is found in {source.name}, which cannot be taken apart here; give a model of text.")
    for key in FURTHER_TOKENS_KEYS:
        if getattr(config, key, None):
            setattr(config, key, 0)
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    config.dtype = whole.dtype
    text = without_weights(config)
    base = text.base_model
    if type(base) is not type(decoder):
        raise UserError(
            f"no {type(base).__name__}, as model type {config.model_type!r} has, is found in {source.name}, which "
            "cannot be taken apart here; give a model of text."
        )
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    return text.eval()


def _write(source: Source, text: PreTrainedModel, folder: Path, generation: GenerationConfig | None) -> None:
    text.save_pretrained(folder)
    if generation is not None:  # as it is: transformers refuses to save settings that contradict one another
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    load_tokenizer(source, text.config.vocab_size).save_pretrained(folder)
    for path in filter(Path.is_file, (path for rights in _RIGHTS for path in Path(source.path).glob(rights))):
        shutil.copyfile(path, folder / path.name)
    if further := further_tokens(source, text.config):
        say(further_said(further), False)


@torch.no_grad()
def _difference(whole: PreTrainedModel, text: PreTrainedModel) -> float:
    """The largest difference of a logit, relative to the largest, after tokens that stand for no picture."""
    ids = _plain_tokens(whole.config, text.config.vocab_size)
    expected, found = (model(input_ids=ids, use_cache=False).logits.float() for model in (whole, text))
    return float((found - expected).abs().max() / expected.abs().max())


def _plain_tokens(config: PretrainedConfig, vocabulary: int) -> Tensor:
    """(2, 32) random ids, none of them named in the configuration."""
    named = {value for key, value in config.to_dict().items() if "token" in key and isinstance(value, int)}
    plain = torch.tensor([token for token in range(vocabulary) if token not in named])
    return plain[torch.randint(len(plain), (2, 32), generator=torch.Generator().manual_seed(0))]
