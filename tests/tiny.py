"""Small random models, one or more configurations per family row, with a byte tokenizer and seeded text."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

LAYERS = 6
CONTEXT = 128
SPECIALS = ["<pad>", "<s>", "</s>"]
VOCABULARY = 256 + len(SPECIALS)

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT}


_LLAMA_LIKE = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.15}
_ALTERNATING = ["sliding_attention", "full_attention", "full_attention"] * 2  # no period of 2, so that a shift shows
_WINDOW = 8


def _config(model_type: str, **changes: object) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**_SIZES, **_SPECIAL_IDS, "initializer_range": 0.15, **changes})


def _llama(**changes: object) -> PretrainedConfig:
    return _config("llama", **{**_LLAMA_LIKE, **changes})


def _like_llama(model_type: str, **changes: object) -> PretrainedConfig:
    return _config(model_type, **{**_LLAMA_LIKE, **changes})


def _opt(**changes: object) -> PretrainedConfig:
    return _config("opt", **{"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.1, "init_std": 0.15, **changes})


def _gemma(model_type: str, **changes: object) -> PretrainedConfig:
    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": _WINDOW, "layer_types": _ALTERNATING}
    return _like_llama(model_type, **{**own, **changes})


def _qwen3_moe(**changes: object) -> PretrainedConfig:
    own = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return _like_llama("qwen3_moe", **{**own, **changes})


def _gpt_neo(**changes: object) -> PretrainedConfig:
    sizes = {"hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "vocab_size": VOCABULARY, "window_size": _WINDOW}
    kinds = {"attention_types": [[["global", "local"], 2], [["local", "local"], 1]]}
    return AutoConfig.for_model("gpt_neo", **{**sizes, **_SPECIAL_IDS, "initializer_range": 0.15, **kinds, **changes})


_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 4}
_ROPE_PER_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
_NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}

# name -> configuration; several per family where an option changes how its layers are put together
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": _llama(),
    "llama-tied": _llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": _like_llama("mistral", sliding_window=_WINDOW, head_dim=12),
    "mistral-unlimited": _like_llama("mistral", sliding_window=None, tie_word_embeddings=True),
    "qwen2": _like_llama("qwen2", **_QWEN_WINDOW),
    "qwen2-tied": _like_llama("qwen2", tie_word_embeddings=True),
    "qwen3": _like_llama(
        "qwen3",
        head_dim=8,
        attention_bias=True,
        layer_types=_ALTERNATING,
        use_sliding_window=True,
        sliding_window=_WINDOW,
    ),
    "qwen3-tied": _like_llama("qwen3", head_dim=16, tie_word_embeddings=True, **_QWEN_WINDOW),
    "gemma2": _gemma("gemma2", attention_bias=True),
    "gemma2-period": _gemma("gemma2", layer_types=None, tie_word_embeddings=False),
    "gemma3_text": _gemma("gemma3_text", rope_parameters=_ROPE_PER_KIND),
    "gemma3_text-period": _gemma(
        "gemma3_text", layer_types=None, sliding_window_pattern=3, rope_parameters=_ROPE_PER_KIND
    ),
    "phi3": _like_llama("phi3", sliding_window=_WINDOW, resid_pdrop=0.1),
    "phi3-tied": _like_llama("phi3", tie_word_embeddings=True),
    "phi": _like_llama("phi", resid_pdrop=0.1),
    "phi-qk-norm": _like_llama("phi", qk_layernorm=True),
    "opt": _opt(),
    "opt-wide": _opt(ffn_dim=128, activation_function="relu"),
    "opt-post-norm": _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "opt-no-bias": _opt(enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    "gpt2": _config("gpt2", n_inner=64),
    "gpt2-untied": _config("gpt2", tie_word_embeddings=False, reorder_and_upcast_attn=True, scale_attn_weights=False),
    "gpt_neox": _config("gpt_neox", intermediate_size=64, hidden_dropout=0.1),
    "gpt_neox-sequential": _config(
        "gpt_neox", intermediate_size=64, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True
    ),
    "gpt_neo": _gpt_neo(intermediate_size=64),
    "gpt_neo-untied": _gpt_neo(attention_types=[[["local", "global", "global"], 2]], tie_word_embeddings=False),
    "bloom": _config("bloom", hidden_dropout=0.1),
    "bloom-post-norm": _config("bloom", apply_residual_connection_post_layernorm=True, tie_word_embeddings=False),
    "falcon": _config("falcon", ffn_hidden_size=64, bias=True),
    "falcon-alibi": _config("falcon", ffn_hidden_size=64, alibi=True, multi_query=False),
    "falcon-sequential": _config(
        "falcon", ffn_hidden_size=64, parallel_attn=False, bias=True, tie_word_embeddings=False
    ),
    "falcon-new": _config("falcon", ffn_hidden_size=64, **_NEW_FALCON),
    "falcon-new-one-norm": _config("falcon", ffn_hidden_size=64, **_NEW_FALCON, num_ln_in_parallel_attn=1, bias=True),
    "olmo2": _like_llama("olmo2", attention_bias=True),
    "olmo2-tied": _like_llama("olmo2", tie_word_embeddings=True),
    "granite": _like_llama(
        "granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "granite-tied": _like_llama("granite", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "starcoder2": _like_llama("starcoder2", sliding_window=_WINDOW),
    "starcoder2-no-bias": _like_llama("starcoder2", use_bias=False, tie_word_embeddings=False),
    "smollm3": _like_llama(
        "smollm3", no_rope_layers=[1, 0, 0, 1, 1, 0], use_sliding_window=True, sliding_window=_WINDOW
    ),
    "smollm3-period": _like_llama("smollm3", no_rope_layer_interval=3, tie_word_embeddings=False, attention_bias=True),
    "cohere2": _like_llama("cohere2", sliding_window=_WINDOW, layer_types=_ALTERNATING, logit_scale=0.5),
    "cohere2-period": _like_llama(
        "cohere2", sliding_window=_WINDOW, sliding_window_pattern=3, attention_bias=True, tie_word_embeddings=False
    ),
    "mixtral": _like_llama("mixtral", num_local_experts=4, sliding_window=_WINDOW),
    "mixtral-tied": _like_llama("mixtral", num_local_experts=3, num_experts_per_tok=1, tie_word_embeddings=True),
    "qwen3_moe": _qwen3_moe(mlp_only_layers=[0, 4], use_sliding_window=True, sliding_window=_WINDOW),
    "qwen3_moe-period": _qwen3_moe(decoder_sparse_step=2, norm_topk_prob=True, attention_bias=True),
    "qwen3_moe-both": _qwen3_moe(decoder_sparse_step=2, mlp_only_layers=[1, 4], tie_word_embeddings=True),
}


def one_of_each_type() -> list[str]:
    """The first configuration of every model type."""
    first: dict[str, str] = {}
    for name, config in CONFIGS.items():
        first.setdefault(config.model_type, name)
    return list(first.values())


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
