"""Every architecture of the zoo, measured once per process by `gradtrace.spectra`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import xarray as xr

import gradtrace as gt
from tests.case import Case
from tests.oracles import SEED
from tests.snapshot import Snapshot
from tests.zoo import handwritten, library

ZOO: tuple[Case, ...] = (*library.MODELS, *handwritten.MODELS)
BY_NAME = {case.name: case for case in ZOO}
PRODUCTS = ("matmul", "mm", "bmm", "linear", "einsum", "bilinear", "conv", "lstm", "gru", "rnn", "tensordot", "inner")


@dataclass(frozen=True)
class Measured:
    """A tree of spectra, the number of elements of every parameter in it, and what `spectra` changed in the model."""

    tree: xr.DataTree
    sizes: dict[str, int]
    changes: list[str]

    def elements(self, *rungs: str) -> int:
        """How many parameter elements are on one of the rungs; on any, if none is named."""
        return sum(n for name, n in self.sizes.items() if not rungs or self.tree[name].attrs["rung"] in rungs)

    def products_below_factored(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Parameters that are not factored although an op of theirs is a product or a convolution."""
        for name, node in self.tree.children.items():
            ops = [op.strip("_").removeprefix("r") for op in node.attrs["ops"]]
            if node.attrs["rung"] != "factored" and any(product in op for op in ops for product in PRODUCTS):
                yield name, dict(node.attrs)


def dtype_of(case: Case) -> torch.dtype:
    """The dtype that a model of the zoo is measured in."""
    found: torch.dtype = getattr(case, "dtype", torch.float64)
    return found


def measured(case: Case, coupling: str = "rows", dtype: torch.dtype | None = None) -> Measured:
    """The architecture's spectra with all singular values kept, in its own dtype unless told otherwise."""
    return _measured(case, coupling, dtype or dtype_of(case))


@cache
def _measured(case: Case, coupling: str, dtype: torch.dtype) -> Measured:
    problem = case.build(dtype)
    options = {**problem.options, "coupling": coupling}
    torch.manual_seed(SEED)
    before = Snapshot.of(problem.model)
    tree = gt.spectra(problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **options)
    changes = Snapshot.of(problem.model).changes_since(before)
    sizes = {name: p.numel() for name, p in problem.model.named_parameters() if name in tree.children}
    return Measured(tree, sizes, changes)
