"""Small random models, one configuration per family row, with a byte tokenizer and seeded text."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

LAYERS = 6
CONTEXT = 128
SPECIALS = ["<pad>", "<s>", "</s>"]
VOCABULARY = 256 + len(SPECIALS)

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT}


def _llama(**changes: object) -> LlamaConfig:
    base = {**_SIZES, **_SPECIAL_IDS, "intermediate_size": 64, "num_key_value_heads": 2}
    return LlamaConfig(**{**base, "initializer_range": 0.15, **changes})


def _opt(**changes: object) -> OPTConfig:
    base = {**_SIZES, **_SPECIAL_IDS, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "init_std": 0.15}
    return OPTConfig(**{**base, **changes})


# name -> configuration; several per family where an option changes how its layers are put together
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "opt": _opt(),
    "opt-wide": _opt(ffn_dim=128, activation_function="relu"),
    "opt-post-norm": _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A seeded random model; biases and norms are random too, so that forgetting one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


def make_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """An ordinary HuggingFace folder with a tiny model and its tokenizer."""
    make_model(name, dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


WORDS = [
    "the",
    "old",
    "man",
    "saw",
    "a",
    "small",
    "red",
    "boat",
    "near",
    "our",
    "quiet",
    "harbour",
    "and",
    "told",
    "it",
]


def make_documents(count: int, words: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{number}: " + " ".join(draw.choices(WORDS, k=words)) + "." for number in range(count)]


def write_jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents), encoding="utf-8")
    return path


def random_ids(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), VOCABULARY, (sequences, length), generator=generator)
