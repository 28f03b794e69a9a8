"""How the cost of a recorded step grows: with groups, groupings, batch, width and the number of ops, on a plain MLP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.benchmarks.models import Problem, classified
from tests.benchmarks.report import ratio, table
from tests.benchmarks.results import Results
from tests.benchmarks.ways import ALL, GRADIENT, UNTRACED, Way

KINDS = {"gradient": Way(GRADIENT), "all kinds": Way(ALL)}
Measure = Callable[[Problem, Mapping[str, Way]], Results]


@dataclass(frozen=True)
class Size:
    """A network of `ops` linear layers of equal width."""

    batch: int = 64
    width: int = 256
    ops: int = 4

    def problem(self) -> Problem:
        """The network with a batch and its loss."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(self.ops):
            layers += [nn.Linear(self.width, self.width), nn.ReLU()]
        batch = torch.randn(self.batch, self.width)
        return nn.Sequential(*layers[:-1]), batch, classified(self.batch, classes=self.width)


# Along the first two the model is one, and its ways differ; along the others it is another model each time.
LABELLINGS: dict[str, tuple[int, ...]] = {"labels": (2, 4, 8, 16), "groupings": (1, 2, 4)}
SIZES: dict[str, tuple[int, ...]] = {"batch": (16, 64, 256), "width": (128, 256, 512, 1024), "ops": (2, 8, 32)}
TITLES = {
    "labels": "groups in a partition",
    "groupings": "groupings of two groups",
    "batch": "samples in a batch",
    "width": "width",
    "ops": "linear layers",
}


def scaled(measure: Measure, device: str) -> Iterator[tuple[str, dict[int, Results]]]:
    """For each axis its name, and the results of the two ways at each of its values."""
    for axis, values in LABELLINGS.items():
        ways = {f"{name} {v}": replace(way, **_field(axis, v)) for v in values for name, way in KINDS.items()}
        found = measure(_made(Size(), device), ways)
        of_untraced = {UNTRACED: found[UNTRACED]}
        yield axis, {v: of_untraced | {name: found[f"{name} {v}"] for name in KINDS} for v in values}
    for axis, values in SIZES.items():
        yield axis, {v: measure(_made(replace(Size(), **_field(axis, v)), device), KINDS) for v in values}


def _field(axis: str, value: int) -> dict[str, Any]:
    return {axis: value}


def _made(size: Size, device: str) -> Problem:
    with torch.device(device):
        return size.problem()


def scaling_table(axis: str, found: Mapping[int, Results]) -> str:
    """A Markdown table of one axis: what a recorded step costs to the untraced one."""
    rows = [
        [str(value), f"{1000 * of[UNTRACED].seconds:.3g}", *(ratio(of[name].wall) for name in KINDS),
         *(ratio(of[name].cpu) for name in KINDS)]
        for value, of in found.items()
    ]  # fmt: skip
    head = [TITLES[axis], f"{UNTRACED}, ms", *KINDS, *(f"{name}, processor" for name in KINDS)]
    return table(head, rows)
