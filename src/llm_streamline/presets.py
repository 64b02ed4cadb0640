"""Named sets of recipe values. Their meaning never changes; what a user gives wins over them.

What of a method is not in its preset, as it could not be known or is done otherwise here, stands beside it. Batch and
steps stay ours throughout, so that no preset is starved.
"""

from __future__ import annotations

from typing import Any

# LLM-Streamline, arXiv 2403.19135, with the settings of its authors' code; not the short training by the next token's
# loss that the paper is said to add
PAPER: dict[str, Any] = {
    "select": "cosine",
    "loss": "mse",
    "optimizer": "adamw",
    "lr": 2e-4,
    "min_lr": 5e-5,
    "weight_decay": 1e-3,
    "warmup": 0.01,
    "clip": 5.0,
    "protect_first": 0,
    "protect_last": 0,
}
# a window by cosine, anywhere, with nothing in its place
DELETED: dict[str, Any] = {"replace": "none", "select": "cosine", "protect_first": 0, "protect_last": 0}
# neither the first layer nor the last, as in the code of those who say so
INNER: dict[str, Any] = {**DELETED, "protect_first": 1, "protect_last": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**PAPER, "replace": "layer", "init": "inherited"},
    "paper-random": {**PAPER, "replace": "layer", "init": "random"},
    "paper-ffn": {**PAPER, "replace": "ffn", "init": "random"},
    "paper-swiglu": {**PAPER, "replace": "swiglu", "init": "random"},
    "paper-none": {**PAPER, "replace": "none"},
    # the paper's Table 6; the rank, the targets and the learning rate are not told: these are ours
    "lora": {**DELETED, "heal": "lora:16", "heal_loss": "lm", "heal_lr": 2e-4},
    # Gromov et al., arXiv 2403.17887: rank 64 and 3e-4; for which of its models it has others could not be known.
    # Theirs takes the angle at the last token of each sequence, adapts the MLPs of a model in 4 bits alone, and scales
    # adapters by 1 where peft's usual 2 is here
    "uidl": {**DELETED, "heal": "lora:64", "heal_loss": "lm", "heal_lr": 3e-4},
    # Reassessing Layer Pruning, arXiv 2411.15558: the last layers go; the last three that stay, the norm and the head
    # learn from the text. Theirs are instructions, at a rate of 1e-5 for its 8B model, which is about the default at
    # that width; a head that is tied to the embeddings gets a matrix of its own here
    "last-n-head": {**DELETED, "select": "last", "heal": "last:3+norm+head", "heal_loss": "lm", "optimizer": "adamw"},
    # ShortGPT, arXiv 2403.03853: single layers by Block Influence; on how much text theirs measures it is not told
    "shortgpt": {**DELETED, "select": "influence"},
    # SLEB, arXiv 2402.09025: one layer after the other, by the loss on the calibration part; theirs is 128 pieces of
    # WikiText-2
    "sleb": {**INNER, "select": "greedy"},
    # LaCo, arXiv 2402.11187: theirs merges several runs, from the top down, each as long as the last state stays alike
    # enough on a few sentences; here it is one window
    "laco": {**DELETED, "replace": "merged"},
    # ReplaceMe, arXiv 2505.02819: least squares, folded, theirs without a ridge; its cosine objective, in a few passes
    # where theirs takes 10 epochs of Adam
    "replaceme": {**DELETED, "replace": "linear", "loss": "mse", "protect_first": 1},
    "replaceme-cosine": {**DELETED, "replace": "linear", "loss": "cosine", "protect_first": 1},
    # LinearPatch, NeurIPS 2025, without its training of the patch. Theirs lies between two layers, ours is in one's
    # place, so that as many layers go at one --remove less; the rotation for a width that is no power of two is ours,
    # and a channel's scale is a ratio of sums over all tokens, where theirs is a mean of each sequence's ratio
    "linearpatch": {**INNER, "replace": "linear:patch"},
    # its training of the patch, a full matrix by then, by KL over the dense model's 100 likeliest tokens; the rate is
    # that of its 7B model, warm-up and clipping are ours. The window is by the cosine of each token's states; theirs is
    # of each channel's along the tokens
    "linearpatch-kl": {
        **INNER,
        "replace": "linear:patch",
        "loss": "kl:100",
        "temperature": 1.0,
        "optimizer": "adamw",
        "lr": 1e-4,
        "min_lr": 5e-6,
        "weight_decay": 1e-4,
    },
    # Ghosted Layers, arXiv 2605.15491: the unconstrained map at the cut, on LinearPatch's code. Theirs is no layer,
    # with a ridge of 1e-6; ours is in one's place, as above, and its ridge is chosen on the validation part
    "ghost": {**INNER, "replace": "linear:free", "loss": "mse"},
}
