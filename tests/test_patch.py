from __future__ import annotations

import pytest
import torch

from llm_streamline.forward import run_window
from llm_streamline.linear import Reading, solve_window
from llm_streamline.patch import Magnitudes, patch_map, rotation
from llm_streamline.records import Window
from tests import tiny

WINDOW, WIDTH = Window(start=2, stop=4), 32


@pytest.mark.parametrize("width", [32, 96, 80, 15])
def test_the_rotation_of_a_patch_is_one(width):
    turn = rotation(width)
    torch.testing.assert_close(turn @ turn.T, torch.eye(width, dtype=torch.float64))
    assert len({round(float(value), 9) for value in turn[:, 0].abs()}) == 1, "an outlier is spread over all channels"


def test_a_patch_gives_the_state_the_magnitudes_of_the_one_that_leaves():
    model, ids = tiny.make_model("llama"), tiny.random_ids(40, 32)
    mapping, fit = solve_window(model, WINDOW, ids[8:], ids[:8], Reading(False, "nmse", 4, patch=True))
    passage, turn = run_window(model, WINDOW, ids[8:]), rotation(WIDTH)
    patched, wanted = passage.entering.double() @ (torch.eye(WIDTH).double() + mapping), passage.leaving.double()
    assert not torch.allclose(patched, passage.entering.double(), rtol=1e-2)
    one, other = ((state.flatten(0, 1) @ turn).abs().mean(dim=0) for state in (patched, wanted))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    assert fit.ridge == 0 and torch.equal(patch_map(Magnitudes.of_width(WIDTH)), torch.zeros(WIDTH, WIDTH).double())
