"""Train the bundled demo model: a small Llama that reads the stories of :mod:`.stories`.

``python -m llm_streamline.demo.make_model --out DIR`` trains a byte-level BPE
tokenizer and the model on documents generated on the fly, and saves both in
the Hugging Face layout.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from llm_streamline.demo.stories import documents

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(seed: int, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text, on the first documents."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(itertools.islice(documents(seed), 5000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a fresh model of the asked size, its vocabulary padded to a multiple of eight."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        rope_theta=args.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Draw the weights so that the embeddings, not the noise of fresh layers, dominate the hidden states."""
    depth = model.config.num_hidden_layers
    for name, weight in model.model.named_parameters():
        if weight.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.normal_(std=1 / math.sqrt(weight.shape[1]) / (math.sqrt(2 * depth) if last else 1))
    model.model.embed_tokens.weight.normal_(std=0.5)
    model.model.norm.weight.fill_(0.1)


@torch.no_grad()
def grow(path: Path, layers: int) -> LlamaForCausalLM:
    """Return the model saved at ``path`` made deeper, computing exactly what it did.

    Each layer becomes several: the first keeps the attention, the others share
    the neurons of the MLP among them, so that every one of them has work of its
    own.  What a new layer does not keep starts at zero and is free to learn.
    """
    small = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    times, rest = divmod(layers, small.config.num_hidden_layers)
    if rest or times < 2:
        raise SystemExit("--layers must be a multiple of the depth of the model to grow")
    small.config.num_hidden_layers = layers
    model = LlamaForCausalLM(small.config)
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(small.model.norm.state_dict())
    shares = torch.arange(small.config.intermediate_size) * (times - 1) // small.config.intermediate_size
    for number, layer in enumerate(model.model.layers):
        layer.load_state_dict(small.model.layers[number // times].state_dict())
        share = number % times - 1
        layer.mlp.down_proj.weight *= shares == share
        if share >= 0:
            layer.self_attn.o_proj.weight.zero_()
    return model


def mark_answers(ids: list[int], answer: int, newline: int) -> list[bool]:
    """Tell for every token whether it belongs to an answer: what follows "Answer:" on its line."""
    marks, since = [], -1
    for token in ids:
        marks.append(since >= 1)
        since = -1 if token == newline else 0 if token == answer else since + (since >= 0)
    return marks


def batches(
    tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield packed blocks and their answer marks without end, documents separated by EOS."""
    stream = documents(args.seed)
    answer, newline = tokenizer.convert_tokens_to_ids(["ĠAnswer", "Ċ"])
    shape = (args.batch, args.context)
    need = args.batch * args.context
    ids: list[int] = []
    marks: list[bool] = []
    while True:
        while len(ids) < need:
            for piece in tokenizer(list(itertools.islice(stream, 64)))["input_ids"]:
                ids += [*piece, tokenizer.eos_token_id]
                marks += [*mark_answers(piece, answer, newline), False]
        yield torch.tensor(ids[:need]).view(shape), torch.tensor(marks[:need]).view(shape)
        ids, marks = ids[need:], marks[need:]


def token_losses(logits: torch.Tensor, ids: torch.Tensor, marks: torch.Tensor, weight: float) -> torch.Tensor:
    """Return two mean next-token losses: with answers counted ``weight`` times, and of answers alone."""
    each = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    answer = marks[:, 1:].flatten().float()
    weights = 1 + (weight - 1) * answer
    return torch.stack([(each * weights).sum() / weights.sum(), (each * answer).sum() / answer.sum()])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(done, 1))) / 2


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return roughly the nearest orthogonal matrix of each (five Newton-Schulz steps)."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon:
    """Momentum with orthogonal updates for weight matrices, in float32, matrices of one shape at once."""

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        self.lr = lr
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step at ``factor`` times the peak learning rate."""
        for shape, group in self.groups.items():
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum = self.momenta[shape].lerp_(gradients, 0.05)
            updates = orthogonal(gradients.lerp(momentum, 0.95))
            scale = self.lr * factor * math.sqrt(max(1, shape[0] / shape[1]))
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - 0.01 * self.lr * factor).sub_(update, alpha=scale)


def report(step: int, steps: int, losses: tuple[float, float], started: float) -> None:
    """Print one progress line with the time left."""
    spent = time.monotonic() - started
    left = spent / (step + 1) * (steps - step - 1)
    text = f"step {step + 1}/{steps}  loss {losses[0]:.3f}, of answers {losses[1]:.3f}"
    print(f"{text}  {spent:.0f} s  ETA {left:.0f} s", file=sys.stderr, flush=True)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Train the model in float32 on ``args.tokens`` tokens of fresh documents."""
    steps = args.tokens // (args.batch * args.context)
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if not any(p is q for q in inner)]
    muon = Muon(inner, args.matrix_lr)
    adam = torch.optim.AdamW(outer, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.monotonic()
    running = torch.tensor([0.0, 0.0])
    model.train()
    for step, (ids, marks) in zip(range(steps), batches(tokenizer, args), strict=False):
        losses = token_losses(model(ids, use_cache=False).logits, ids, marks, args.answer_weight)
        losses[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule(step, steps, args.warmup)
        adam.param_groups[0]["lr"] = args.lr * factor
        adam.step()
        muon.step(factor)
        model.zero_grad()
        running = running.lerp(losses.detach(), 1.0 if step == 0 else 0.05)
        if (step + 1) % args.every == 0 or step + 1 == steps:
            report(step, steps, (running[0].item(), running[1].item()), started)
            save(model, tokenizer, args.out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save a bfloat16 copy of the model, its generation settings and the tokenizer."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = GenerationConfig.from_model_config(model.config)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    # The name that every version of transformers knows the class by.
    settings.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


def parse_tokens(text: str) -> int:
    """Read a count such as ``500k`` or ``12M``."""
    scale = {"k": 1_000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    return int(float(text.rstrip("kKmM")) * scale)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to save to")
    parser.add_argument(
        "--tokens", type=parse_tokens, default="2.5M", help="training tokens; 0 saves the model as it starts"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and documents")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--grow", type=Path, help="shallower model to start from, saved by this program")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="blocks per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of vectors and embeddings")
    parser.add_argument("--matrix-lr", type=float, default=0.005, help="peak learning rate of weight matrices")
    parser.add_argument("--warmup", type=int, default=50, help="warm-up steps")
    parser.add_argument("--answer-weight", type=float, default=8.0)
    parser.add_argument("--every", type=int, default=100, help="steps between reports and saves")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer and the model and save them."""
    args = parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    if args.grow:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.grow)
        model = grow(args.grow, args.layers)
    else:
        tokenizer = train_tokenizer(args.seed, args.vocabulary, args.context)
        model = build_model(args, tokenizer)
    train(model, tokenizer, args)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
