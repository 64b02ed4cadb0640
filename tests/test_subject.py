"""What tells one checkpoint from another: also one that was trained anew in its middle."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from llm_streamline.checkpoint import Source
from llm_streamline.fingerprints import fingerprint
from llm_streamline.recipe import Runtime
from llm_streamline.scoring.subject import Subject
from tests import tiny


def test_another_middle_or_other_end_tokens_are_another_model(tmp_path):
    folder = tiny.make_folder(tmp_path / "model", "llama")
    config = AutoConfig.from_pretrained(folder, hidden_size=256, intermediate_size=1024)  # beyond 2 MiB
    model = type(tiny.make_model("llama"))(config)
    found, plain = set(), set()
    for step in range(3):
        with torch.no_grad():
            if step == 1:
                model.model.layers[3].mlp.up_proj.weight.mul_(1.01)
        if step == 2:
            model.generation_config.eos_token_id = 5
        model.save_pretrained(folder)
        found.add(Subject(str(folder), Runtime(quiet=True)).fingerprint)
        plain.add(fingerprint(Source(str(folder))))
    assert len(found) == 3 and len(plain) == 1
