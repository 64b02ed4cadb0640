"""Small random models, one or more configurations per family row, with a byte tokenizer and seeded text."""

from __future__ import annotations

import copy
import json
import os
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    configuration_utils,
)

LAYERS = 6
CONTEXT = 128
SPECIALS = ["<pad>", "<s>", "</s>"]
VOCABULARY = 256 + len(SPECIALS)

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT}


_LLAMA_LIKE = {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.15}
_ALTERNATING = ["sliding_attention", "full_attention", "full_attention"] * 2  # no period of 2, so that a shift shows
_WINDOW = 8


def _config(model_type: str, **changes: object) -> PretrainedConfig | None:
    """None for a kind that the installed transformers does not know yet."""
    if model_type not in CONFIG_MAPPING:
        return None
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
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}
_SOME_DENSE = ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": CONTEXT // 2}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = ["linear_attention", "linear_attention", "full_attention", "linear_attention", *["full_attention"] * 2]
# what older versions call these kinds beside a state space
_MAMBA = _HYBRID if hasattr(configuration_utils, "remap_legacy_layer_types") else ["mamba", "mamba", "attention"] * 2
_CONVOLVED = [kind.replace("linear_attention", "conv") for kind in _HYBRID]
_DELTA_RULE = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8} | {
    "linear_value_head_dim": 8,
    "layer_types": _HYBRID,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}

# name -> configuration; several per family where an option changes how its layers are put together
VARIED: dict[str, PretrainedConfig] = {
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


# the same for families that add no other way of meeting a model: of these the daily tests run a part of the checklist
_MORE: dict[str, PretrainedConfig] = {
    "qwen2_moe": _like_llama(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0, 4],
        **_QWEN_WINDOW,
    ),
    "olmoe": _like_llama("olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": _like_llama("phimoe", num_local_experts=4, sliding_window=_WINDOW),
    "gpt_oss": _like_llama(
        "gpt_oss",
        rope_parameters=_YARN,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "minimax_m2": _like_llama("minimax_m2", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "hunyuan_v1_moe": _like_llama("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=[1, 2, 2, 1, 2, 2]),
    "deepseek_v2": _like_llama(
        "deepseek_v2",
        num_key_value_heads=4,
        **_LATENT,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=2,
        topk_method="greedy",
    ),
    "deepseek_v3": _like_llama("deepseek_v3", num_key_value_heads=4, **_LATENT, **_ROUTED),
    "glm4_moe": _like_llama("glm4_moe", head_dim=8, use_qk_norm=True, **_ROUTED),
    "dots1": _like_llama("dots1", head_dim=8, layer_types=_ALTERNATING, sliding_window=_WINDOW, **_ROUTED),
    "solar_open": _like_llama("solar_open", head_dim=8, **{**_ROUTED, "first_k_dense_replace": 0}),
    "exaone_moe": _like_llama(
        "exaone_moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=24,
        n_group=1,
        topk_group=1,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
        mlp_layer_types=_SOME_DENSE,
    ),
    "ernie4_5_moe": _like_llama(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
        moe_layer_end_index=4,
        moe_layer_interval=1,
    ),
    "flex_olmo": _like_llama("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "granitemoe": _like_llama("granitemoe", num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.5),
    "granitemoeshared": _like_llama(
        "granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=48
    ),
    "gemma": _like_llama("gemma", head_dim=8),
    "vaultgemma": _gemma("vaultgemma"),
    "apertus": _like_llama("apertus"),
    "arcee": _like_llama("arcee", attention_bias=True, mlp_bias=True),
    "bitnet": _like_llama("bitnet"),
    "cohere": _like_llama("cohere", use_qk_norm=True),
    "cwm": _like_llama(
        "cwm", head_dim=8, layer_types=_ALTERNATING, sliding_window=_WINDOW, rope_parameters=_PLAIN_ROPE
    ),
    "ernie4_5": _like_llama("ernie4_5", head_dim=8, use_bias=True),
    "exaone4": _like_llama("exaone4", layer_types=_ALTERNATING, sliding_window=_WINDOW),
    "glm": _like_llama("glm", head_dim=8),
    "glm4": _like_llama("glm4", head_dim=8),
    "granite_swa": _like_llama("granite_swa", layer_types=_ALTERNATING, sliding_window=_WINDOW),
    "helium": _like_llama("helium", head_dim=8),
    "hunyuan_v1_dense": _like_llama("hunyuan_v1_dense", head_dim=8),
    "hyperclovax": _like_llama("hyperclovax"),
    "jais2": _like_llama("jais2"),
    "internlm3": _like_llama("internlm3", head_dim=8),
    "iquestcoder": _like_llama("iquestcoder", head_dim=8),
    "ministral": _like_llama("ministral", head_dim=8, layer_types=_ALTERNATING, sliding_window=_WINDOW),
    "ministral3": _like_llama("ministral3", head_dim=8, rope_parameters={**_YARN, "llama_4_scaling_beta": 0.1}),
    "minicpm3": _like_llama("minicpm3", num_key_value_heads=4, **_LATENT),
    "nanochat": _like_llama("nanochat"),
    "nemotron": _like_llama("nemotron"),
    "olmo": _like_llama("olmo", clip_qkv=0.5),
    "olmo3": _like_llama("olmo3", layer_types=_ALTERNATING, sliding_window=_WINDOW),
    "seed_oss": _like_llama("seed_oss", head_dim=8),
    "stablelm": _like_llama("stablelm", use_qkv_bias=True),
    "youtu": _like_llama("youtu", num_key_value_heads=4, **_LATENT),
    "stablelm-parallel": _like_llama("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "gpt_bigcode-heads": _config("gpt_bigcode", n_inner=64, multi_query=False, tie_word_embeddings=False),
    "hyperclovax-no-norm": _like_llama("hyperclovax", use_post_norm=False),
    "deepseek_v3-no-lora": _like_llama(
        "deepseek_v3", num_key_value_heads=4, **{**_LATENT, "q_lora_rank": None}, **_ROUTED
    ),
    "persimmon": _config("persimmon", intermediate_size=64),
    "biogpt": _config("biogpt", intermediate_size=64),
    "xglm": AutoConfig.for_model(
        "xglm",
        vocab_size=VOCABULARY,
        d_model=32,
        ffn_dim=64,
        num_layers=LAYERS,
        attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "codegen": _config("codegen", rotary_dim=4, n_inner=64),
    "gptj": _config("gptj", rotary_dim=4, n_inner=64),
    "gpt_bigcode": _config("gpt_bigcode", n_inner=64),
    "mpt": _config("mpt", max_seq_len=CONTEXT, expansion_ratio=2),
    "llama4_text": _like_llama(
        "llama4_text",
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=4,
        moe_layers=[1, 3, 4],
        no_rope_layers=[1, 0, 0, 1, 1, 0],
    ),
    "granitemoe_swa": _like_llama(
        "granitemoe_swa",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "glm4_moe_lite": _like_llama(
        "glm4_moe_lite", num_key_value_heads=4, **_LATENT, **_ROUTED, mlp_layer_types=_SOME_DENSE
    ),
    "mellum": _like_llama(
        "mellum",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_layer_types=_SOME_DENSE,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "cohere2_moe": _like_llama(
        "cohere2_moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        prefix_dense_intermediate_size=48,
        mlp_layer_types=_SOME_DENSE,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "afmoe": _like_llama(
        "afmoe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=24,
        num_dense_layers=2,
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "hy_v3": _like_llama(
        "hy_v3",
        head_dim=8,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=1,
        moe_intermediate_size=24,
        mlp_layer_types=_SOME_DENSE,
    ),
    "flint": _like_llama(
        "flint",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        mlp_only_layers=[0, 4],
        layer_types=_ALTERNATING,
        sliding_window=_WINDOW,
    ),
    "qwen3_next": _like_llama(
        "qwen3_next",
        head_dim=8,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0, 3],
        **_EXPERTS,
        **_DELTA_RULE,
    ),
    "qwen3_5_text": _like_llama("qwen3_5_text", head_dim=8, **_DELTA_RULE),
    "qwen3_5_moe_text": _like_llama(
        "qwen3_5_moe_text", head_dim=8, shared_expert_intermediate_size=24, **_EXPERTS, **_DELTA_RULE
    ),
    "kimi_linear": _like_llama(
        "kimi_linear",
        num_key_value_heads=4,
        linear_num_heads=4,
        linear_head_dim=8,
        layer_types=_HYBRID,
        mlp_layer_types=_SOME_DENSE,
        **_LATENT | {"q_lora_rank": None},
        **_EXPERTS,
    ),
    "bailing_hybrid": _like_llama(
        "bailing_hybrid",
        num_key_value_heads=4,
        head_dim=8,
        n_group=1,
        topk_group=1,
        layer_types=_HYBRID,
        mlp_layer_types=_SOME_DENSE,
        **_LATENT,
        **_EXPERTS,
    ),
    "olmo_hybrid": _like_llama("olmo_hybrid", **_DELTA_RULE),
    "lfm2": _like_llama("lfm2", block_auto_adjust_ff_dim=False, layer_types=_CONVOLVED),
    "lfm2_moe": _like_llama("lfm2_moe", num_dense_layers=2, layer_types=_CONVOLVED, **_EXPERTS),
    "lfm3": _like_llama("lfm3", layer_types=_CONVOLVED),
    "granitemoehybrid": _like_llama(
        "granitemoehybrid", shared_intermediate_size=24, num_local_experts=4, layer_types=_MAMBA, **_STATE_SPACE
    ),
    "bamba": _like_llama("bamba", attn_layer_indices=[2, 4, 5], **_STATE_SPACE),
    "falcon_h1": _like_llama("falcon_h1", head_dim=8, mamba_d_ssm=64, **_STATE_SPACE),
    "recurrent_gemma": _like_llama(
        "recurrent_gemma",
        head_dim=8,
        lru_width=32,
        attention_window_size=_WINDOW,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "nemotron_h": _like_llama(
        "nemotron_h",
        layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "mlp", "full_attention"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "mamba": _config("mamba", state_size=8, time_step_rank=4),
    "mamba2": _config("mamba2", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "falcon_mamba": _config("falcon_mamba", state_size=8, time_step_rank=4),
    "aria_text": _like_llama("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
}
VARIED, _MORE = ({name: config for name, config in some.items() if config} for some in (VARIED, _MORE))
CONFIGS = VARIED | _MORE
MATRIX = "STREAMLINE_MATRIX" in os.environ  # `make matrix`: every test of families with every configuration
NAMES = list(CONFIGS if MATRIX else VARIED)


def one_of_each_type() -> list[str]:
    """The first varied configuration of every model type."""
    first: dict[str, str] = {}
    for name, config in VARIED.items():
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
