from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm_streamline import figures, report
from llm_streamline.analyze import analyze
from llm_streamline.records import Check, Fit, Loss, Point, Scores, Window
from tests import tiny
from tests.test_families import plan_for

PNG = b"\x89PNG"


def fit(losses=(4.0, 2.0, 1.0)) -> Fit:
    steps = len(losses)
    numbers = {"batch": 1, "accumulate": 1, "block": 8, "lr": 1e-3, "min_lr": 1e-4, "last_lr": 1e-4, "threads": 1}
    return Fit(
        loss="nmse",
        steps=steps,
        tokens=8 * steps,
        validation_before=losses[0],
        validation_best=min(losses),
        best_step=steps,
        trained_parameters=10,
        seconds=1.0,
        tokens_per_second=24.0,
        device="cpu",
        compute="float32",
        curve=[Point(step=i + 1, tokens=8 * i + 8, lr=1e-3, loss=loss) for i, loss in enumerate(losses)],
        validation=[Check(step=i, loss=loss) for i, loss in enumerate(losses)],
        **numbers,
    )


@pytest.fixture(scope="module")
def similarity():
    return analyze(tiny.make_model("llama"), tiny.random_ids(3, 16), batch=3)


def shown(table) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_tables_hold_the_numbers(similarity):
    layers, windows = shown(report.layer_table(similarity)), shown(report.window_table(similarity, 1, 1))
    for layer in range(tiny.LAYERS):
        assert f"{similarity.cosine[layer][layer + 1]:.4f}" in layers
    best = similarity.windows(2, 1, 1)[0]
    assert str(best) in windows and f"{similarity.of(best):.4f}" in windows and "2 (33%)" in windows


def test_usual_lengths_are_an_eighth_to_half():
    assert report.usual_lengths(32) == [4, 8, 12, 16]
    assert report.usual_lengths(6) == [1, 2, 3]


def test_the_summary_says_what_it_cost(similarity):
    loss = [Loss(nats=nats, se=0.01, tokens=10, sequences=2) for nats in (3.0, 3.5, 3.2)]
    scores = Scores(dense=loss[0], cut=loss[1], saved=loss[2])
    plan = plan_for(tiny.make_model("llama"), Window(start=1, stop=4), 1)
    text = shown(report.summary_table(plan, scores))
    assert "+0.5000" in text and "+0.2000" in text and f"{plan.parameters_after:,}" in text


@pytest.mark.parametrize("losses", [(4.0, 2.0, 1.0), (4.0, 0.2, 0.1)])
def test_figures_are_drawn(similarity, tmp_path, losses):
    window = Window(start=1, stop=3)
    figures.draw_similarity(similarity, tmp_path / "a.png", [window])
    figures.draw_heat_map(similarity, tmp_path / "b.png", [window])
    figures.draw_training(fit(losses), tmp_path / "c.png")
    assert all((tmp_path / name).read_bytes()[:4] == PNG for name in ("a.png", "b.png", "c.png"))
    for name, other in (("same.png", window), ("outlined.png", Window(start=2, stop=4))):
        figures.draw_similarity(similarity, tmp_path / name, [window], other)
    plain, same, outlined = ((tmp_path / name).read_bytes() for name in ("a.png", "same.png", "outlined.png"))
    assert plain == same != outlined
