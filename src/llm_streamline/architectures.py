"""The table of architectures, and the only file that knows any: where layers are, which keys depend on their numbers.

Adding a family is one row here and one tiny configuration in `tests/tiny.py`; the checklist in
`tests/test_families.py` then has to pass for it. `families.py` is what is asked of the table.
"""

from __future__ import annotations

from typing import Any

from llm_streamline.family import Family, counted_from_one, one_kind_per_layer, same_scale, spelled_out

_LAYER_NORMS = ("input_layernorm", "mlp")
_PLAIN = ("model.layers", "self_attn.o_proj", ("post_attention_layernorm", "mlp"))
_SANDWICH = ("model.layers", "self_attn.o_proj", ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"))
_DENSE_4H = ("mlp.dense_4h_to_h",)
_EXPERTS = ("mlp.experts.down_proj",)
_SOME_SPARSE = ("mlp.down_proj", *_EXPERTS)
_SHARED_EXPERTS = (*_SOME_SPARSE, "mlp.shared_experts.down_proj")
_GRANITE = ("model.layers", "self_attn.o_proj", ("post_attention_layernorm", "block_sparse_moe"))
_GRANITE_SHARED = (*_GRANITE[:2], ("post_attention_layernorm", "block_sparse_moe", "shared_mlp"))
_DELTA = ("model.layers", ("self_attn.o_proj", "linear_attn.out_proj"), _PLAIN[2])  # some layers of gated delta rules
_SHARED_EXPERT = (*_SOME_SPARSE, "mlp.shared_expert.down_proj")
_CONVOLVED = ("model.layers", ("self_attn.out_proj", "conv.out_proj"))
_MAMBA = ("self_attn.o_proj", "mamba.out_proj")
_BESIDE_MAMBA = ("model.layers", _MAMBA, ("pre_ff_layernorm", "feed_forward"), ("feed_forward.down_proj",))
_NO_MLP = "no layer has an MLP beside what mixes tokens"
_IN_TWO = "two modules add to the stream at once"
_LLAMA4_DOWN = ("feed_forward.down_proj", "feed_forward.experts.down_proj:2", "feed_forward.shared_expert.down_proj")
_BOTH_WAYS = (("use_bidirectional_attention", "its tokens see later ones"),)
_GPT2_OPTIONS = (
    ("scale_attn_by_inverse_layer_idx", "its attention is scaled by the layer's number"),
    ("add_cross_attention", "it attends to the output of an encoder"),
)

FAMILIES = {
    family.model_type: family
    for family in (
        # norms that act only with some option (parallel or not, before or after) are named all the same
        Family("llama", *_PLAIN),
        Family("mistral", *_PLAIN),
        Family("qwen2", *_PLAIN),
        Family("qwen3", *_PLAIN),
        Family("gemma2", *_SANDWICH, down=(), refused=_BOTH_WAYS),
        Family("gemma3_text", *_SANDWICH, down=(), refused=_BOTH_WAYS),
        Family("phi3", *_PLAIN),
        Family(
            "phi",
            "model.layers",
            "self_attn.dense",
            ("input_layernorm", "mlp"),
            down=("mlp.fc2",),
            norm="final_layernorm",
        ),
        Family(
            "opt",
            "model.decoder.layers",
            "self_attn.out_proj",
            ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
            down=("fc2",),
            added="fc2",
            norm="final_layer_norm",
        ),
        Family(
            "gpt2", "transformer.h", "attn.c_proj", ("ln_2", "mlp"), ("mlp.c_proj",), refused=_GPT2_OPTIONS, norm="ln_f"
        ),
        Family(
            "gpt_neox",
            "gpt_neox.layers",
            "attention.dense",
            ("post_attention_layernorm", "mlp"),
            _DENSE_4H,
            norm="final_layer_norm",
        ),
        Family(
            "gpt_neo",
            "transformer.h",
            "attn.attention.out_proj",
            ("ln_2", "mlp"),
            ("mlp.c_proj",),
            changes=one_kind_per_layer,
            norm="ln_f",
        ),
        Family(
            "bloom",
            "transformer.h",
            "self_attention.dense",
            ("input_layernorm", "post_attention_layernorm", "mlp"),
            _DENSE_4H,
            added=_DENSE_4H[0],  # its mlp module returns the sum with the stream
            norm="ln_f",
        ),
        Family(
            "falcon",
            "transformer.h",
            "self_attention.dense",
            ("input_layernorm", "ln_mlp", "post_attention_layernorm", "mlp"),
            _DENSE_4H,
            norm="ln_f",
        ),
        Family("olmo2", "model.layers", "self_attn.o_proj", ("mlp", "post_feedforward_layernorm"), down=()),
        Family("granite", *_PLAIN),
        Family("starcoder2", *_PLAIN, down=("mlp.c_proj",)),
        Family("smollm3", *_PLAIN),
        Family("cohere2", "model.layers", "self_attn.o_proj", ("input_layernorm", "mlp")),
        Family("mixtral", *_PLAIN, down=("mlp.experts.down_proj",)),
        Family("qwen3_moe", *_PLAIN, down=_SOME_SPARSE),
        Family("qwen2_moe", *_PLAIN, down=(*_SOME_SPARSE, "mlp.shared_expert.down_proj")),
        Family("olmoe", *_PLAIN, down=_EXPERTS),
        Family("phimoe", *_PLAIN, down=_EXPERTS),
        Family("gpt_oss", *_PLAIN, down=("mlp.experts.down_proj:2", "mlp.experts.down_proj_bias")),
        Family("minimax_m2", *_PLAIN, down=_EXPERTS),
        Family("hunyuan_v1_moe", *_PLAIN, down=(*_EXPERTS, "mlp.shared_mlp.down_proj")),
        Family("deepseek_v2", *_PLAIN, down=_SHARED_EXPERTS),
        Family("deepseek_v3", *_PLAIN, down=_SHARED_EXPERTS),
        Family("glm4_moe", *_PLAIN, down=_SHARED_EXPERTS),
        Family("dots1", *_PLAIN, down=_SHARED_EXPERTS),
        Family("solar_open", *_PLAIN, down=_SHARED_EXPERTS),
        Family("exaone_moe", *_PLAIN, down=_SHARED_EXPERTS),
        Family("ernie4_5_moe", *_PLAIN, down=_SHARED_EXPERTS),
        Family("flex_olmo", "model.layers", "self_attn.o_proj", ("mlp", "post_feedforward_layernorm"), down=()),
        Family("granitemoe", *_GRANITE, down=("block_sparse_moe.experts.down_proj",), added="block_sparse_moe"),
        Family("granitemoeshared", *_GRANITE_SHARED, down=(), unfoldable=_IN_TWO),
        Family("gemma", *_PLAIN),
        Family("vaultgemma", "model.layers", "self_attn.o_proj", ("pre_feedforward_layernorm", "mlp")),
        Family("apertus", "model.layers", "self_attn.o_proj", ("feedforward_layernorm", "mlp")),
        Family("arcee", *_PLAIN),
        Family("bitnet", *_PLAIN),
        Family("cohere", "model.layers", "self_attn.o_proj", _LAYER_NORMS),
        Family("cwm", *_PLAIN),
        Family("ernie4_5", *_PLAIN),
        Family("exaone4", "model.layers", "self_attn.o_proj", ("mlp", "post_feedforward_layernorm"), down=()),
        Family("glm", *_PLAIN),
        Family(
            "glm4",
            "model.layers",
            "self_attn.o_proj",
            ("post_attention_layernorm", "mlp", "post_mlp_layernorm"),
            down=(),
        ),
        Family("granite_swa", *_PLAIN),
        Family("helium", *_PLAIN),
        Family("hunyuan_v1_dense", *_PLAIN),
        Family(
            "hyperclovax", "model.layers", "self_attn.o_proj", ("post_attention_layernorm", "mlp", "post_norm2"), ()
        ),
        Family("jais2", *_PLAIN),
        Family("internlm3", *_PLAIN),
        Family("iquestcoder", *_PLAIN),
        Family("ministral", *_PLAIN),
        Family("ministral3", *_PLAIN),
        Family("minicpm3", *_PLAIN, changes=same_scale),
        Family("nanochat", *_PLAIN, down=("mlp.fc2",)),
        Family("nemotron", *_PLAIN),
        Family("olmo", *_PLAIN),
        Family("olmo3", "model.layers", "self_attn.o_proj", ("mlp", "post_feedforward_layernorm"), down=()),
        Family("seed_oss", *_PLAIN),
        Family("stablelm", "model.layers", "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm", "mlp")),
        Family("youtu", *_PLAIN),
        Family(
            "persimmon",
            "model.layers",
            "self_attn.dense",
            ("post_attention_layernorm", "mlp"),
            _DENSE_4H,
            norm="final_layernorm",
        ),
        Family(
            "biogpt",
            "biogpt.layers",
            "self_attn.out_proj",
            ("final_layer_norm", "fc1", "fc2"),
            ("fc2",),
            "fc2",
            norm="layer_norm",
        ),
        Family(
            "xglm",
            "model.layers",
            "self_attn.out_proj",
            ("final_layer_norm", "fc1", "fc2"),
            ("fc2",),
            "fc2",
            norm="layer_norm",
        ),
        Family("codegen", "transformer.h", "attn.out_proj", ("ln_1", "mlp"), ("mlp.fc_out",), norm="ln_f"),
        Family("gptj", "transformer.h", "attn.out_proj", ("ln_1", "mlp"), ("mlp.fc_out",), norm="ln_f"),
        Family("gpt_bigcode", "transformer.h", "attn.c_proj", ("ln_2", "mlp"), ("mlp.c_proj",), norm="ln_f"),
        Family(
            "mpt",
            "transformer.blocks",
            "attn.out_proj",
            ("norm_2", "ffn"),
            ("ffn.down_proj",),
            "ffn.down_proj",
            norm="norm_f",
        ),
        Family(
            "llama4_text",
            "model.layers",
            "self_attn.o_proj",
            ("post_attention_layernorm", "feed_forward"),
            _LLAMA4_DOWN,
            "feed_forward",
        ),
        Family("granitemoe_swa", *_GRANITE_SHARED, down=(), unfoldable=_IN_TWO),
        Family("glm4_moe_lite", *_PLAIN, down=_SHARED_EXPERTS),
        Family("mellum", *_PLAIN, down=_SOME_SPARSE),
        Family("cohere2_moe", "model.layers", "self_attn.o_proj", _LAYER_NORMS, _SHARED_EXPERTS),
        Family("afmoe", "model.layers", "self_attn.o_proj", ("pre_mlp_layernorm", "mlp", "post_mlp_layernorm"), ()),
        Family("hy_v3", *_PLAIN, down=_SHARED_EXPERTS),
        Family("flint", *_PLAIN, down=(*_SOME_SPARSE, "mlp.shared_expert.down_proj")),
        Family("qwen3_next", *_DELTA, down=_SHARED_EXPERT),
        Family("qwen3_5_text", *_DELTA),
        Family("qwen3_5_moe_text", *_DELTA, down=_SHARED_EXPERT),
        Family(
            "olmo_hybrid",
            "model.layers",
            ("self_attn.o_proj", "linear_attn.o_proj"),
            ("post_attention_layernorm", "mlp", "post_feedforward_layernorm"),
            down=(),
        ),
        Family("kimi_linear", *_PLAIN, down=_SHARED_EXPERTS, changes=counted_from_one),
        Family("bailing_hybrid", *_PLAIN, down=_SHARED_EXPERTS),
        Family(
            "lfm2",
            *_CONVOLVED,
            ("ffn_norm", "feed_forward"),
            ("feed_forward.w2",),
            "feed_forward",
            norm="embedding_norm",
        ),
        Family(
            "lfm2_moe",
            *_CONVOLVED,
            ("ffn_norm", "feed_forward"),
            ("feed_forward.w2", "feed_forward.experts.down_proj"),
            "feed_forward",
            norm="embedding_norm",
        ),
        Family(
            "lfm3",
            "model.layers",
            ("self_attn.o_proj", "conv.out_proj"),
            ("ffn_norm", "feed_forward", "post_ffn_norm"),
            down=(),
            norm="embedding_norm",
        ),
        Family("granitemoehybrid", "model.layers", _MAMBA, _GRANITE_SHARED[2], (), unfoldable=_IN_TWO),
        Family("bamba", *_BESIDE_MAMBA, "feed_forward", norm="final_layernorm"),
        Family("falcon_h1", *_BESIDE_MAMBA, "feed_forward", norm="final_layernorm"),
        Family(
            "recurrent_gemma",
            "model.layers",
            ("temporal_block.o_proj", "temporal_block.linear_out"),
            ("channel_pre_norm", "mlp_block"),
            ("mlp_block.down_proj",),
            "mlp_block",
            changes=spelled_out,
            norm="final_norm",
        ),
        Family("nemotron_h", "model.layers", (), (), (), unfoldable=_NO_MLP, norm="norm_f"),
        Family("mamba", "backbone.layers", (), (), (), unfoldable=_NO_MLP, norm="norm_f"),
        Family("mamba2", "backbone.layers", (), (), (), unfoldable=_NO_MLP, norm="norm_f"),
        Family("falcon_mamba", "backbone.layers", (), (), (), unfoldable=_NO_MLP, norm="norm_f"),
        Family("aria_text", *_PLAIN, down=("mlp.experts.down_proj:2", "mlp.shared_experts.down_proj")),
    )
}

# Kinds that are known not to fit, for a better reason than "not proven". Where none is given, that is the reason.
_UNFIT = {
    "an encoder-decoder": "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody "
    "mvp pegasus plbart prophetnet trocr whisper",
    "an encoder": "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert reformer rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod",
    "a recurrent network that generates otherwise with its state than without": "rwkv xlstm",
    "one whose layers share weights": "zamba zamba2",
    "one that does not only read, and whose text model 'llm-streamline text-model' takes out": "gemma3 llama4 qwen3_5 "
    "qwen3_5_moe",
    "one whose layers are told apart by periods, which few removals leave": "jamba",
    "computed with the number of each layer": "beam diffllama inkling2_text minimax",
    "one whose first or last layer is unlike the others": "gpt_neox_japanese modernbert-decoder",
    "one whose layers share keys and values with earlier ones": "gemma3n gemma3n_text gemma4 gemma4_text",
}
REASONS = {name: reason for reason, names in _UNFIT.items() for name in names.split()}
NOT_PROVEN = "not proven to survive the removal of layers"

# Config keys that bite when layers go. Forgetting one fails silently: the model loads and computes something else.
# Periods that transformers spells out in a list per layer (sliding_window_pattern, no_rope_layer_interval) stay as
# they are: the list wins.
# lists with one entry per layer
PER_LAYER_KEYS = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "attention_layers",
    "layer_rope_theta",
    "moe_topk",
)
# in layer_types: kinds whose layers attend to no token, two of them by older names
RECURRING = ("linear_attention", "conv", "mlp", "moe", "mamba", "recurrent")
LAYER_NUMBER_KEYS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")  # lists of layer numbers
# layers below the number differ from those above
THRESHOLD_KEYS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers")
LAST_KEYS = ("moe_layer_end_index",)  # layers up to the number, it included, differ from those above
# layers after the last that predict further tokens; their weights are not carried along
FURTHER_TOKENS_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# every n-th layer differs, and no list says which: only a period of 1 can be kept
PERIOD_KEYS = ("moe_layer_interval",)
# config keys and values with which layers normalise the sum they return: none of them can be the identity
SUM_NORMALISED = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}
NORM_AFTER_MLP = {"do_layer_norm_before": False}  # as above, and the sum's norm comes after the MLP
INNER_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")

# What llama.cpp derives from a layer's number: per configuration key, the period it takes for granted.
_SLIDING, _FULL, _CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
GGUF_COUNTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma2": {"layer_types": (_SLIDING, _FULL)},
    "gemma3_text": {"layer_types": (_SLIDING,) * 5 + (_FULL,)},
    "gpt_oss": {"layer_types": (_SLIDING, _FULL)},
    "cohere2": {"layer_types": (_SLIDING,) * 3 + (_FULL,)},
    "smollm3": {"no_rope_layers": (1, 1, 1, 0)},
    "llama4_text": {"layer_types": (_CHUNKED,) * 3 + (_FULL,), "no_rope_layers": (1, 1, 1, 0)},
}
# and the keys that its converter writes down layer by layer
GGUF_WRITTEN = dict.fromkeys(("cohere2_moe", "olmo3"), ("layer_types",))
# names under which the converter looks for what transformers calls otherwise, and what an absent value means
_PARTIAL = ("rope_parameters.partial_rotary_factor", 1.0)
GGUF_SPELLINGS: dict[str, dict[str, tuple[str, Any]]] = {
    "gpt2": {"n_ctx": ("n_positions", None)},
    "gpt_neox": {"rotary_pct": _PARTIAL},
    "cohere2": {"rotary_pct": _PARTIAL},
}
# llama.cpp's names of the ways to split a text before tokens are merged, by what does the same in tokenizer.json
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
    (_WORDS % r"\p{N}",): "qwen2",
}
