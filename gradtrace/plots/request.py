"""What somebody wants to see of a run, and what they get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradtrace.metrics import METRICS
from gradtrace.plots.measures import Measure, Metric, PairCosine, Share
from gradtrace.plots.reading import GroupChoice, Series, Want, pair
from gradtrace.plots.scales import Scale
from gradtrace.plots.sheet import Sheet
from gradtrace.plots.words import LOGARITHMIC, SCALED, quantity, scale_note
from gradtrace.store.queries.selection import COSINE, SHARE, Query

if TYPE_CHECKING:
    import networkx
    from matplotlib.figure import Figure

DEFAULT_METRIC = "effective_rank"


@dataclass(frozen=True)
class Request:
    """What somebody wants to see of a run.

    query: parameters, groups, steps and probe, with one kind and at most one metric. components: singular values at
    most. smooth: steps of the running median; None: a fifteenth of those shown. own_mean: at the scale of each group's
    own mean. note: whether the caption is written below. graph: of the ops of the run's model.
    """

    query: Query
    runs: Sequence[str] = ()
    components: int = 32
    smooth: int | None = None
    own_mean: bool = True
    width: str = "column"
    note: bool = True
    graph: networkx.DiGraph | None = None

    @property
    def kind(self) -> str:
        return self.query.kinds[0]

    @property
    def metric(self) -> str:
        return self.query.metrics[0] if self.query.metrics else DEFAULT_METRIC

    @property
    def along(self) -> str:
        return "training step" if self.query.probe is None else f"training step (probe {self.query.probe})"

    def sheet(self, caption: str) -> Sheet:
        return Sheet(self.width, caption if self.note else "")

    def want(self, groups: GroupChoice, *, single: bool = True) -> Want:
        """What is read of the metric; of a cosine two groups, of ranks no vectors, whose ranks are 1."""
        products: dict[str, Measure] = {COSINE: PairCosine(), SHARE: Share()}
        measure = products.get(self.metric, Metric(self.metric, self.own_mean))
        matrices = self.metric in METRICS and self.metric not in SCALED
        return Want(measure, pair if self.metric == COSINE else groups, single=single, matrices=matrices)

    def caption(self, series: Series, *sentences: str, scaled: bool | None = None) -> str:
        """The sentences, then the scale, the steps, and what was left out. scaled: whether the scale is of matter."""
        said = list(sentences)
        if self.metric in SCALED if scaled is None else scaled:
            said.append(scale_note(self.kind, own_mean=self.own_mean, groups=series.groups))
        return " ".join(filter(None, [*said, *series.remarks]))

    def scale(self, groups: Sequence[str]) -> Scale:
        label = quantity(self.metric, self.kind, own_mean=self.own_mean, groups=groups)
        if self.metric == COSINE:
            return Scale(label, diverging=True, limits=(-1, 1))
        return Scale(label, log=self.metric in LOGARITHMIC)


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in words."""

    figure: Figure
    caption: str
