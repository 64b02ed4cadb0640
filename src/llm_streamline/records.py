"""What stages hand to each other: frozen, checked, JSON in and out. Positions travel only as these records."""

from __future__ import annotations

from typing import Any

from llm_streamline.objective import parse_objective
from llm_streamline.record import Record as Record
from llm_streamline.windows import Window as Window
from llm_streamline.windows import runs_of as runs_of

Matrix = list[list[float]]
FOLDED = "linear"  # the replacement that occupies no layer and changes the one below its window
PATCH = "linear:patch"  # the map that is measured, not solved for


class Similarity(Record):
    """How alike the hidden states at every two boundaries are; L layers have boundaries 0..L.

    `cosine[i][j]` is the paper's Eq. 1 between boundaries i and j: the mean over sequences of the mean over tokens.
    `relative_change[i][j]` is the mean of ||x_j - x_i|| / ||x_i||. Each has its standard error over sequences.
    `halves` are `cosine` of every other sequence and of those between; empty of one sequence.
    """

    num_layers: int
    sequences: int
    tokens: int
    cosine: Matrix
    cosine_se: Matrix
    relative_change: Matrix
    relative_change_se: Matrix
    halves: list[Matrix] = []

    def of_layers(self) -> list[float]:
        """Cosine of each layer's input and output."""
        return [self.cosine[layer][layer + 1] for layer in range(self.num_layers)]

    def of(self, window: Window) -> float:
        return self.cosine[window.start][window.stop]

    def error_of(self, window: Window) -> float:
        return self.cosine_se[window.start][window.stop]

    def change_of(self, window: Window) -> float:
        return self.relative_change[window.start][window.stop]

    def windows(self, length: int, protect_first: int = 0, protect_last: int = 0) -> list[Window]:
        """Every window of `length` layers between the protected ends, the most similar first."""
        starts = range(protect_first, self.num_layers - protect_last - length + 1)
        windows = [Window(start=start, stop=start + length) for start in starts]
        return sorted(windows, key=self.of, reverse=True)


class ModelShape(Record):
    """The counts a plan is made of, in parameters (tied ones once).

    `network` is what one stand-in has where it is no layer of the model's own; `untied` what a head has that was one
    with the embeddings and is to train. Of every window, a multiple of `period` net layers has to go. Of each of
    the `sorts`, lists of layers, one has to stay.
    """

    name: str
    model_type: str
    total: int
    layers: list[int]
    network: int | None = None
    untied: int = 0
    period: int = 1
    sorts: list[list[int]] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class LayerPlan(Record):
    """The decision: which windows go, what stands in for each, and why. `occupied` is summed over them."""

    model: str
    model_type: str
    num_layers: int
    window: Window
    replace: str
    custom_code: bool = False  # whether the replacement is no layer that stock transformers knows
    occupied: int
    parameters_before: int
    parameters_after: int
    similarity: float
    similarity_se: float
    plain_window: Window
    plain_parameters: int
    why: str
    heal: str = "none"  # what else trains
    dropped: list[int] = []  # layers that go besides the windows, with nothing in their place
    others: list[Window] = []  # further windows, in the order of their choice; as many layers stand in for each
    starts: list[int] = []  # the layers whose weights the stand-ins begin with, from the bottom up; else their places'

    @property
    def windows(self) -> list[Window]:
        """All of them, from the bottom up."""
        return sorted([self.window, *self.others], key=lambda window: window.start)

    @property
    def span(self) -> Window:
        """From where the lowest window begins to where the highest one ends."""
        return Window(start=self.windows[0].start, stop=self.windows[-1].stop)

    @property
    def each(self) -> int:
        """The layers that stand in for one window."""
        return self.occupied // len(self.windows)

    @property
    def net(self) -> int:
        """Net layers removed: those that go minus those that the replacements occupy."""
        return len(self.gone) - self.occupied

    @property
    def gone(self) -> list[int]:
        """The source layers that the shortened model does not run."""
        return sorted([layer for window in self.windows for layer in window.layers()] + self.dropped)

    @property
    def merely_cut(self) -> bool:
        """Whether nothing makes up for what goes."""
        return self.replace == "none" and self.heal == "none"

    def sources(self) -> list[int]:
        """Per new layer the source layer it takes its weights from, or whose place its replacement takes."""
        away = {*self.dropped, *(layer for window in self.windows for layer in window.layers()[self.each :])}
        return [layer for layer in range(self.num_layers) if layer not in away]

    def cuts(self) -> list[Window]:
        """In the shortened model's numbers, from the bottom up: what stands in at each place where layers went."""
        runs = sorted([*self.windows, *runs_of(self.dropped)], key=lambda window: window.start)
        below = lambda boundary: sum(source < boundary for source in self.sources())  # noqa: E731
        return [Window(start=below(run.start), stop=below(run.stop)) for run in runs]

    @property
    def folded(self) -> int | None:
        """The layer into whose MLP a map is folded, where that is the replacement: the one below the window."""
        return self.window.start - 1 if self.replace == FOLDED else None

    def rewritten(self) -> list[tuple[Window, int]]:
        """What the saved model does not have as it was, from the bottom up, and how many layers stand in for each.

        The windows; one with a map in its place, and the layer below it that the map is folded into.
        """
        if self.folded is not None:
            return [(Window(start=self.folded, stop=self.window.stop), 1)]
        return [(window, self.each) for window in self.windows]

    def replaced(self) -> list[int]:
        """The source layers whose places the replacement's layers take: the first ones of those rewritten."""
        return [layer for run, count in self.rewritten() for layer in run.layers()[:count]]

    def layer_map(self) -> list[int | str]:
        """Per new layer the old number, or the window it stands for."""
        named: dict[int, str] = {layer: str(window) for window in self.windows for layer in window.layers()}
        return [named.get(source, source) for source in self.sources()]

    def __str__(self) -> str:
        layers = {0: "nothing", 1: "1 layer"}.get(self.each, f"{self.each} layers")
        layers += " each" if self.others and self.each else ""
        layers = layers if self.folded is None else f"a map folded into layer {self.folded}"
        which = ", ".join(map(str, runs_of(self.gone)))
        return f"layers {which} ({len(self.gone)}) of {self.num_layers} -> {layers}, net {self.net}"


class Point(Record):
    """One point of the training curve; `loss` is the mean since the point before."""

    step: int
    tokens: int
    lr: float
    loss: float


class Check(Record):
    """One validation during training, at the end of `step` optimizer steps."""

    step: int
    loss: float


class Fit(Record):
    """What training did. `best_step` 0 is the replacement as it started.

    Where `loss` is several, the curve is of each in its turn, and every validation of the last.
    """

    loss: str
    steps: int
    tokens: int
    batch: int
    accumulate: int
    block: int
    lr: float
    min_lr: float
    last_lr: float
    validation_before: float
    validation_best: float
    best_step: int
    trained_parameters: int
    seconds: float
    tokens_per_second: float
    device: str
    compute: str
    threads: int
    curve: list[Point]
    validation: list[Check]

    @property
    def measure(self) -> str:
        """The loss that is validated."""
        return str(parse_objective(self.loss).measure)


class LinearFit(Record):
    """What the closed form found: the linear map of the least distillation loss on `tokens` training tokens.

    A patch is measured and has no ridge: 0.

    Of several ridges the one was kept whose map has the lowest loss on the validation part; None where none of them
    was better there than no map. The shares are of what the window adds to its input, and remain when the map is used.
    """

    loss: str
    tokens: int
    ridge: float | None
    unexplained: float
    validation_unexplained: float
    validation_before: float
    validation_after: float
    seconds: float
    device: str
    compute: str


Fitted = Fit | LinearFit | None  # nothing where there was nothing to fit


class Loss(Record):
    """Mean next-token loss in nats per token, with its standard error over sequences."""

    nats: float
    se: float
    tokens: int
    sequences: int


class Scores(Record):
    """Loss on the validation part: the source, the source cut to the same depth, and the saved model."""

    dense: Loss
    cut: Loss
    saved: Loss

    def excess(self, which: Loss) -> float:
        return which.nats - self.dense.nats


class Verification(Record):
    """What a fresh process found in a saved folder. `problems` empty means verified; `limits` bound the claim."""

    logits_error: float
    tolerance: float
    cached_equals_uncached: bool
    parameters: int
    tensors: int
    problems: list[str]
    limits: list[str]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        return not self.problems


class Manifest(Record):
    """Everything needed to say how a model folder was made; lies in it as `streamline.json`."""

    command: str | None
    recipe: dict[str, Any]
    plan: LayerPlan
    layer_map: list[int | str]
    tensors: dict[str, int]
    weights: dict[str, str] = {}
    limits: list[str] = []
    fit: Fitted
    earlier: list[Fit] = []  # of the rounds before the last
    healing: Fit | None = None
    data: dict[str, Any]
    layer_similarities: list[float]
    versions: dict[str, str]
    origin: dict[str, Any] = {}  # what the model card says of the source: Hub name, licence, language
    verification: Verification | None = None
    scores: Scores | None = None
    quantised: str | None = None  # int8 and the like: the weights are not those that the manifest was made with


class Inputs(Record):
    """What a run began with, so that it is not continued with something else."""

    model: str
    data: dict[str, Any]
