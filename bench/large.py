"""A random checkpoint of any size, written a few layers at a time: `python -m bench.large FOLDER [--layers 48 ...]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from bench.common import model_name
from llm_streamline.checkpoint import BUNDLED, Source, load_tokenizer

IN_A_SHARD = 4  # layers


def write_model(folder: Path, layers: int, width: int, inner: int, vocabulary: int = 4096) -> Path:
    """A bfloat16 model of the bench model's kind with heads of 128 and grouped queries."""
    folder.mkdir(parents=True)
    config = _config(layers, width, inner, vocabulary)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    map_of: dict[str, str] = {}
    shapes = _outside(width, vocabulary)
    for number, first in enumerate([None, *range(0, layers, IN_A_SHARD)]):
        if first is not None:
            some = range(first, min(first + IN_A_SHARD, layers))
            shapes = {k: v for layer in some for k, v in _layer(layer, width, inner, config).items()}
        name = f"model-{number:05d}.safetensors"
        save_file({key: _values(key, shape, generator) for key, shape in shapes.items()}, folder / name)
        map_of |= dict.fromkeys(shapes, name)
    index = {"metadata": {}, "weight_map": map_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _config(layers: int, width: int, inner: int, vocabulary: int) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(Source(model_name()).path)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": vocabulary}
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 512), "head_dim": 128}
    for key, value in {**sizes, **heads, "tie_word_embeddings": False, "dtype": torch.bfloat16}.items():
        setattr(config, key, value)
    return config


def _outside(width: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }


def _layer(number: int, width: int, inner: int, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    narrow = config.num_key_value_heads * 128
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {f"model.layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def _values(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if "norm" in key:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 0.004 if "o_proj" in key or "down_proj" in key else 0.02  # so that a layer changes its input little
    return (torch.randn(shape, generator=generator) * scale).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, value in (("layers", 48), ("width", 2048), ("inner", 8960)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    source = Source(model_name() if model_name() != BUNDLED else BUNDLED)
    tokenizer = load_tokenizer(source, 2**31)
    write_model(options.folder, options.layers, options.width, options.inner, len(tokenizer))
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
