"""The closed form: a planted map comes back, and streams that span little do no harm."""

from __future__ import annotations

import pytest
import torch

from llm_streamline.moments import Moments

WIDTH, TOKENS = 12, 400


def stream(seed: int, tokens: int = TOKENS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(4, tokens // 4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None = None) -> Moments:
    moments = Moments.of_widths(x.shape[-1], y.shape[-1])
    for number in range(len(x)):  # as micro-batches
        moments.add(x[number], y[number], None if weight is None else weight[number])
    return moments


def test_a_planted_map_is_recovered() -> None:
    planted = torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = stream(0)
    moments = gathered(x, x @ planted)
    torch.testing.assert_close(moments.solve(ridge=1e-14), planted, rtol=0, atol=1e-9)
    assert moments.unexplained(planted) < 1e-12
    assert moments.tokens == TOKENS


def test_it_is_the_least_squares_solution_of_all_rows_at_once() -> None:
    x, y = stream(0), stream(2)
    wanted = torch.linalg.lstsq(x.flatten(0, 1), y.flatten(0, 1)).solution
    moments = gathered(x, y)
    torch.testing.assert_close(moments.solve(ridge=1e-14), wanted, rtol=0, atol=1e-9)
    left = (x @ wanted - y).square().sum() / y.square().sum()
    assert moments.unexplained(wanted) == pytest.approx(float(left), rel=1e-9)


def test_weights_count_rows_as_often_as_they_say() -> None:
    x, y = stream(0), stream(2)
    weight = torch.ones(4, TOKENS // 4)
    weight[1] = 3
    thrice = torch.cat([x, x[1:2], x[1:2]]), torch.cat([y, y[1:2], y[1:2]])
    weighted, repeated = gathered(x, y, weight), gathered(*thrice)
    torch.testing.assert_close(weighted.solve(), repeated.solve())
    assert weighted.yy == pytest.approx(repeated.yy)


@pytest.mark.parametrize("tokens", [0, 4, 8])
def test_a_stream_that_spans_little_gives_a_finite_small_map(tokens: int) -> None:
    x, y = stream(0, tokens), stream(2, tokens)
    mapping = gathered(x, y).solve() if tokens else Moments.of_widths(WIDTH, WIDTH).solve()
    assert mapping.isfinite().all()
    assert mapping.norm() < 100
    if tokens:
        torch.testing.assert_close(x @ mapping, y, rtol=0, atol=1e-3)
    unseen = torch.linalg.svd(x.flatten(0, 1))[2][tokens:] if tokens else torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(unseen @ mapping, torch.zeros_like(unseen @ mapping), rtol=0, atol=1e-6)
