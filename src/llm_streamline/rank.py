"""Calibration blocks -> Ranking: what each window of one length costs, deleted, and with a linear map in its place.

Scores are kept per sequence, so that every standard error, every difference and every half is over sequences. Maps
are fitted on one half of the sequences and judged on the other, both ways; the halves are contiguous, so that few
documents lie in both. A token weighs 1 / ||x_out||^2 in a fit, as in the training loss `nmse`: else a few tokens with
massive activations would rule it. Shapes: N sequences, B of them in a micro-batch, T tokens, D width, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_streamline.crossing import HALVES, Branched, Bridge, Judged, Part, crossed, judged, maps_at_once
from llm_streamline.families import layers_of
from llm_streamline.layerwise import Layerwise
from llm_streamline.moments import Moments
from llm_streamline.parallel import ALONE, World
from llm_streamline.progress import progress
from llm_streamline.quantities import counted
from llm_streamline.ranking import HALVINGS, SCORES, SHORTLIST, By, Candidate, Ranking, Score, Winner
from llm_streamline.records import Similarity, Window
from llm_streamline.similarity import Sums, pairwise

_TINY = 1e-12
Maps = dict[Window, list[Tensor]]  # per half of the sequences the (D, D) map that judges it


def rank(
    model: PreTrainedModel,
    blocks: Tensor,
    batch: int,
    windows: Sequence[Window],
    by: By,
    quiet: bool = False,
    world: World = ALONE,
) -> Ranking:
    """Scores of windows of one length on `blocks` (N, T) of token ids, and what each score would take.

    Every window is scored by cosine, relative change, loss and KL after deletion. `by` 'patched' also has a linear map
    fitted and judged for the best few of them; 'replaceability' has one fitted for all, without what the model loses.
    Each process of `world` takes its share of the micro-batches.
    """
    stage = _Stage(Layerwise(model), _parts(blocks, batch), blocks.shape, world, quiet)
    return stage.ranking(stage.deleted(windows), by)


def survey(
    model: PreTrainedModel,
    blocks: Tensor,
    batch: int,
    windows: Sequence[Window],
    by: By,
    quiet: bool = False,
    world: World = ALONE,
) -> tuple[Similarity, Ranking]:
    """What `analyze` and `rank` give, from one pass of the whole model; the weights have to be held.

    Errors: UserError for non-finite states.
    """
    stage = _Stage(Layerwise(model), _parts(blocks, batch), blocks.shape, world, quiet)
    sums = Sums(len(layers_of(model)) + 1)
    found = stage.deleted(windows, sums)
    sums.add_up(world)
    return sums.result(blocks.numel()), stage.ranking(found, by)


def best_few(found: _Found, count: int) -> list[Window]:
    """The windows that maps are fitted for: in turns the best not yet taken by loss, by cosine and by relative change.

    Loss goes first, as it alone sees what the layers above make of a window; the other two see one whose deletion costs
    much because a map is missing, which is then fitted. KL hardly ever orders windows otherwise than the loss does.
    """
    orders = [found.order(by) for by in ("loss", "cosine", "relative")]
    taken: list[Window] = []
    while len(taken) < min(count, len(found.windows)):
        for order in orders:
            if len(taken) < count and (left := [window for window in order if window not in taken]):
                taken.append(left[0])
    return sorted(taken, key=lambda window: window.start)


def _in_turn(windows: Sequence[Window], width: int) -> list[Sequence[Window]]:
    size = maps_at_once(width)
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def _parts(blocks: Tensor, batch: int) -> list[Part]:
    """Micro-batches, none of which lies in both halves."""
    middle, found = len(blocks) // 2, []
    for half, (first, stop) in enumerate(((0, middle), (middle, len(blocks)))):
        found += [Part(blocks[at : min(at + batch, stop)], at, half) for at in range(first, stop, batch)]
    return found


class _Found:
    """Per sequence a numerator and a denominator of each score: (2, W, N), 0 until they are known."""

    def __init__(self, windows: Sequence[Window], sequences: int, scores: Sequence[By | str]) -> None:
        self.windows = list(windows)
        self.dense = torch.zeros(sequences, dtype=torch.float64)
        self.values = {by: torch.zeros(2, len(windows), sequences, dtype=torch.float64) for by in scores}
        self.measured = {by: list(windows) for by in scores}

    def put(self, by: str, window: Window, part: Part, above: Tensor, below: Tensor | None = None) -> None:
        """`above` and `below` (B,): the score of the part's sequences, as a ratio where `below` is given."""
        row = self.values[by][:, self.windows.index(window), part.rows]
        row[0], row[1] = above.double().cpu(), 1.0 if below is None else below.double().cpu()

    def add_up(self, world: World) -> _Found:
        """What all processes have found, each for its own sequences."""
        for values in (self.dense, *self.values.values()):
            world.sum_(values)
        return self

    def join(self, other: _Found) -> None:
        """Take in what was measured of some of the windows."""
        rows = [self.windows.index(window) for window in other.windows]
        for by, values in other.values.items():
            own = self.values.setdefault(by, torch.zeros(2, len(self.windows), values.shape[-1], dtype=torch.float64))
            own[:, rows] = values
            self.measured.setdefault(by, []).extend(other.windows)

    def of(self, by: str) -> Tensor:
        """(2, w, N) of the windows that the score was measured for."""
        return self.values[by][:, [self.windows.index(window) for window in self.measured[by]]]

    def order(self, by: By) -> list[Window]:
        """The measured windows, the best first."""
        losses = _losses(by, self.of(by).sum(dim=-1)).tolist()
        return [window for _, window in sorted(zip(losses, self.measured[by], strict=True), key=lambda pair: pair[0])]


def _losses(by: str, sums: Tensor) -> Tensor:
    """(..., w) from sums (2, ..., w): the lower the better, and infinite where they are no numbers."""
    ratio = sums[0] / sums[1]
    return torch.nan_to_num(-ratio if by == "cosine" else ratio, nan=torch.inf, neginf=-torch.inf)


@dataclass
class _Stage:
    """One pass over the calibration blocks for each thing that is asked of it."""

    layers: Layerwise
    parts: list[Part]
    shape: torch.Size
    world: World
    quiet: bool
    own: list[Part] = field(init=False)

    def __post_init__(self) -> None:
        self.own = list(self.world.share(self.parts))

    def ranking(self, found: _Found, by: By) -> Ranking:
        """Of windows that have been deleted; with maps in their place where `by` asks for it."""
        fitted = {"patched": best_few(found, SHORTLIST), "replaceability": found.windows}.get(by, [])
        for some in _in_turn(self.world.led(lambda: fitted), self.layers.model.config.hidden_size):
            found.join(self.patched(some, replay=by == "patched"))
        return self.world.led(lambda: _ranking(found, by, self.shape))

    def deleted(self, windows: Sequence[Window], sums: Sums | None = None) -> _Found:
        """What deletion costs; with `sums` also what all boundaries of the whole model have in common."""
        found = _Found(windows, self.shape[0], ("cosine", "relative", "loss", "kl"))

        def bridge(part: Part, window: Window, entering: Tensor, leaving: Tensor) -> Tensor:
            one, other = entering.float(), leaving.float()
            found.put("cosine", window, part, torch.cosine_similarity(one, other, dim=-1).mean(dim=1))
            found.put("relative", window, part, (_norm(other - one) / _norm(one)).mean(dim=1))
            return entering

        def delete() -> None:
            title = f"{'analyzing, and ' if sums else ''}deleting {counted(len(windows), 'window')}"
            for one in self._crossed(title, windows, bridge, keep=sums is not None):
                if sums is not None:
                    sums.add(*pairwise(one.states, torch.ones_like(one.whole.ids)), one.part.first)
                _put_losses(found, ("loss", "kl"), one.part, judged(self.layers, one))

        self.world.attempt(delete)
        return found.add_up(self.world)

    def patched(self, windows: Sequence[Window], replay: bool) -> _Found:
        """What linear maps explain and, with `replay`, what the model loses with them in place of the windows."""
        maps = self.fitted(windows)
        scores = ("replaceability", "patched", "patched_kl") if replay else ("replaceability",)
        found = _Found(windows, self.shape[0], scores)

        def bridge(part: Part, window: Window, entering: Tensor, leaving: Tensor) -> Tensor | None:
            one, change = entering.float(), leaving.float() - entering.float()
            guess = one @ maps[window][part.half]
            weight = _weight(leaving)
            left = (weight * (change - guess).square().sum(dim=-1)).sum(dim=1)
            found.put("replaceability", window, part, left, (weight * change.square().sum(dim=-1)).sum(dim=1))
            return (one + guess).to(entering.dtype) if replay else None

        for one in self._crossed(f"judging {counted(len(windows), 'map')}", windows, bridge, to_the_top=replay):
            if replay:
                _put_losses(found, scores[1:], one.part, judged(self.layers, one))
        return found.add_up(self.world)

    def fitted(self, windows: Sequence[Window]) -> Maps:
        """Per window and half the map that judges the half: the one fitted on the other half."""
        width = self.layers.model.config.hidden_size
        sums = {window: [Moments.of_widths(width, width) for _ in HALVES] for window in windows}

        def bridge(part: Part, window: Window, entering: Tensor, leaving: Tensor) -> None:
            change = leaving.float() - entering.float()
            sums[window][part.half].add(entering.float(), change, _weight(leaving))

        for _ in self._crossed(f"fitting {counted(len(windows), 'map')}", windows, bridge, to_the_top=False):
            pass  # the bridge has taken what it needs
        for moments in (one for pair in sums.values() for one in pair):
            self.world.sum_(moments.xx), self.world.sum_(moments.xy)
        device = self.layers.model.device
        return {window: [sums[window][1 - half].solve().float().to(device) for half in HALVES] for window in windows}

    @torch.no_grad()
    def _crossed(
        self, title: str, windows: Sequence[Window], bridge: Bridge, to_the_top: bool = True, keep: bool = False
    ) -> Iterator[Branched]:
        """Every micro-batch of this process past the windows, as far up as is asked: losses are of the last layer."""
        top = len(layers_of(self.layers.model)) if to_the_top else max(window.stop for window in windows)
        with progress(title, sum(len(part.ids) for part in self.own), self.quiet) as advance:
            for one in crossed(self.layers, self.own, windows, bridge, top, keep):
                yield one
                advance(len(one.part.ids), "sequences")


def _put_losses(found: _Found, names: Sequence[str], part: Part, seen: Judged) -> None:
    found.dense[part.rows] = seen.dense.cpu()
    for by, values in zip(names, (seen.loss, seen.kl), strict=True):
        for window, value in values.items():
            found.put(by, window, part, value)


def _norm(states: Tensor) -> Tensor:
    return states.norm(dim=-1).clamp_min(_TINY)


def _weight(leaving: Tensor) -> Tensor:
    """(B, T): what each token counts."""
    return leaving.float().square().sum(dim=-1).clamp_min(_TINY).reciprocal()


def _ranking(found: _Found, by: By, shape: torch.Size) -> Ranking:
    count = shape[0]
    order = torch.rand(HALVINGS, count, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    halves = (order < max(1, count // 2)).double()
    return Ranking(
        by=by,
        sequences=count,
        tokens=shape.numel(),
        dense=_score(torch.stack([found.dense, torch.ones_like(found.dense)])),
        candidates=[_candidate(found, window) for window in found.windows],
        winners={score: _winner(found, score, halves) for score in SCORES if score in found.values},
    )


def _candidate(found: _Found, window: Window) -> Candidate:
    row = found.windows.index(window)
    scores = {by: _score(values[:, row]) for by, values in found.values.items() if window in found.measured[by]}
    return Candidate(window=window, **scores)


def _score(values: Tensor) -> Score:
    """Of (2, N)."""
    return Score(value=float(values[0].sum() / values[1].sum()), se=_error(_influence(values)))


def _influence(values: Tensor) -> Tensor:
    """(N,): by how much each sequence moves the ratio of sums, times N."""
    return (values[0] - values[0].sum() / values[1].sum() * values[1]) / values[1].mean()


def _error(influence: Tensor) -> float:
    count = len(influence)
    return float(influence.square().sum() / max(count - 1, 1) / count) ** 0.5


def _winner(found: _Found, by: By, halves: Tensor) -> Winner:
    """`halves` (R, N): 1 for the sequences of each half, the same for all windows and scores."""
    values, measured, order = found.of(by), found.measured[by], found.order(by)
    again = _losses(by, values @ halves.T).argmin(dim=0)  # (R,)
    confidence = float((again == measured.index(order[0])).double().mean())
    if len(order) == 1:
        return Winner(window=order[0], confidence=confidence)
    best, second = (values[:, measured.index(window)] for window in order[:2])
    difference = abs(_score(second).value - _score(best).value)
    margin = Score(value=difference, se=_error(_influence(second) - _influence(best)))
    return Winner(window=order[0], confidence=confidence, runner_up=order[1], margin=margin)
