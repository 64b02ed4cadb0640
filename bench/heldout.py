"""`python -m bench.heldout TEXT.jsonl MODEL [MODEL ...]`: perplexity on text that no stage has read.

All documents in file order, packed into blocks of the model's context; float32.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from llm_streamline.checkpoint import Source, context_length, load_model, load_tokenizer
from llm_streamline.scoring.perplexity import next_token_loss


def main(text: str, *models: str) -> None:
    for name in models:
        model = load_model(Source(name), torch.float32)
        tokenizer = load_tokenizer(Source(name), model.config.vocab_size)
        rows = (json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines() if line)
        ids = [i for row in rows for i in [*tokenizer(row, verbose=False)["input_ids"], tokenizer.eos_token_id]]
        block = min(2048, context_length(model.config))
        blocks = torch.tensor(ids[: len(ids) // block * block]).view(-1, block)
        loss = next_token_loss(model, blocks, max(1, 4096 // block), name)
        print(
            f"{name}: perplexity {math.exp(loss.nats):.2f}, {loss.nats:.4f} ± {loss.se:.4f} nats, {loss.tokens} tokens"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
