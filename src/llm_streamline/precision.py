"""In which number format a device multiplies matrices fast."""

from __future__ import annotations

import torch


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device's products of bfloat16 matrices are fast ones."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)
