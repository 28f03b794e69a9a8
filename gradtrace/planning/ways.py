"""The way by which each kind of a parameter is decomposed, and what that costs: the rules of the runtime as arithmetic.

m rows, of which a group has its samples' share; a matrix p x q; s the smaller of p and q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradtrace.accumulate import matrix_shape
from gradtrace.decompose.dense import double_of, is_exact
from gradtrace.decompose.gram import COLUMNS
from gradtrace.graph import Sizes
from gradtrace.kinds import rows_pending
from gradtrace.planning.partition import Partition, Share

Shape = tuple[str, tuple[int, int], str]  # form of a decomposition ("gram", "matrix"), sides, dtype

# Counted in profiles of small models, where nothing else takes time: norms, audits, owners, metrics, the row's arrays.
CALLS_OF_GRADIENT, CALLS_OF_KIND = 250, 80
PASSES_OF_GRADIENT, PASSES_OF_KIND = 5, 3  # over the rows of A and D: their norms, those of a cell, their products


@dataclass(frozen=True)
class Work:
    """What one kind of one parameter takes in a step.

    decomposed: per group the matrix whose singular values are taken. triangles: the sides of what QR is run on before.
    single, double: flops of products, by precision. held: bytes at the end of the backward pass. pulls: passes back
    through an op, whose cost nobody knows beforehand. passes: backward passes over the whole graph. touched: bytes that
    are copied or read once more. calls: on tensors, however small.
    """

    way: str
    rows: int
    sides: tuple[int, int]
    width: int  # of its spectrum
    decomposed: tuple[Shape, ...] = ()
    triangles: tuple[tuple[int, int], ...] = ()
    single: float = 0.0
    double: float = 0.0
    held: int = 0
    pulls: int = 0
    passes: int = 0
    touched: float = 0.0
    calls: int = 0


def cells_computed(use: Sizes, cells: int, *, alone: bool) -> int:
    """How many of a partition's cells have their gradient computed; one may come by subtraction from the whole.

    alone: nothing else uses the parameter.
    """
    subtracted = alone and use.direct and use.form in ("outer", "product") and use.dtype == "float32"
    return cells - 1 if subtracted and cells > 1 else cells


def gradient_work(info: Mapping[str, Any], uses: Sequence[Sizes], partition: Partition) -> Work:
    """Of a parameter's gradient; `info` is what the graph says of it."""
    found = _gradient_work(info, uses, partition)
    touched = sum(use.rows * _columns(use) * _dtype(use.dtype).itemsize for use in uses)
    replayed = sum(4.0 * use.rows * (use.activation or 0) * (use.adjoint or 0) for use in uses if use.replayed)
    return replace(found, single=found.single + replayed, touched=PASSES_OF_GRADIENT * touched, calls=CALLS_OF_GRADIENT)


def _gradient_work(info: Mapping[str, Any], uses: Sequence[Sizes], partition: Partition) -> Work:
    sides = p, q = matrix_shape(info["shape"])
    side, rows = min(sides), sum(use.rows for use in uses)
    dtype = _coarsest(info, uses)
    plain = Work("cells", rows, sides, side)
    reference = math.prod(sides) * _dtype(info["dtype"]).itemsize  # the audit's copy
    if info["rung"] == "ungrouped":
        whole = replace(plain, way="whole", held=reference + p * q * _summed(dtype).itemsize)
        return _decomposed(whole, dtype, partition.shares[:1])
    outer = bool(uses) and all(use.form == "outer" and use.direct for use in uses)
    if info["rung"] != "global" and outer and rows <= side:
        held = reference + rows * (p + q) * dtype.itemsize
        return _factors(replace(plain, way="factors", held=held), dtype, _counts(uses, partition))
    cells = _cells_of(uses, partition) if info["rung"] != "global" else partition.cells
    summed = replace(plain, held=reference + cells * p * q * _summed(dtype).itemsize)
    if info["rung"] == "global":
        summed = replace(summed, passes=partition.cells)
    else:
        flops = sum(_cells_flops(use, partition, alone=len(uses) == 1) for use in uses)
        pulls = sum(_pulls(use, partition) for use in uses)
        single, double = (0.0, flops) if is_exact(dtype) else (flops, 0.0)
        summed = replace(summed, pulls=int(pulls), single=single, double=double)
    return _decomposed(summed, dtype, _present(uses if info["rung"] != "global" else (), partition))


def kind_work(kind: str, uses: Sequence[Sizes], partition: Partition, *, kept: bool) -> Work:
    """Of a parameter's activations or adjoints; `kept`: its gradient keeps the same rows anyway."""
    found = _kind_work(kind, uses, partition, kept=kept)
    touched = 0 if found.way == "lookup" else math.prod(found.sides) * _dtype(uses[0].dtype).itemsize
    return replace(found, touched=float(PASSES_OF_KIND * touched), calls=CALLS_OF_KIND)


def _kind_work(kind: str, uses: Sequence[Sizes], partition: Partition, *, kept: bool) -> Work:
    rows, width = sum(use.rows for use in uses), max((getattr(use, kind) or 0 for use in uses), default=0)
    cells = _cells_of(uses, partition)
    if kind == "activation" and any(use.form == "lookup" for use in uses):
        return Work("lookup", rows, (rows, width), width, held=cells * width * 8)
    plain = Work("gram", rows, (rows, width), min(rows, width))
    dtype = _dtype(uses[0].dtype)
    if rows < width:
        held = 0 if kept else rows * width * dtype.itemsize
        return _few(replace(plain, way="few", held=held), dtype, _counts(uses, partition))
    most = rows_pending(width)
    fold = _triangles if is_exact(dtype) else _grams
    found = fold(plain, dtype, cells, _present(uses, partition), math.ceil(rows / most))
    waiting = 0 if kept else min(rows, most) * width * dtype.itemsize
    return replace(found, held=max(waiting, found.held) if rows < most else waiting + found.held)


def step_flops(uses: Sequence[Sizes], elements: int) -> float:
    """What one parameter's ops take of a step that is not traced: forward, and backward to inputs and weight."""
    total = 0.0
    for use in uses:
        factor = 4 if _dtype(use.dtype).is_complex else 1
        if use.form in ("outer", "product", "batched") and use.activation and use.adjoint:
            total += 6 * factor * use.rows * use.activation * use.adjoint
        elif use.form in ("lookup", "elements"):
            total += (2 if use.form == "lookup" else 6) * factor * use.rows * (use.adjoint or 1)
        else:
            total += 6 * factor * use.rows * elements
    return total


# ---------------------------------------------------------------------- ways


def _factors(plain: Work, dtype: torch.dtype, counts: Sequence[int]) -> Work:
    """QR of both factors once, and of the groups' columns; the singular values of a small product per group."""
    (p, q), rows, factor = plain.sides, plain.rows, 4 if dtype.is_complex else 1
    triangles = [(p, rows), (q, rows), *((rows, count) for count in counts if count < rows for _ in "LR")]
    return replace(
        plain,
        decomposed=tuple(("matrix", (count, count), _name(double_of(dtype))) for count in counts),
        triangles=tuple(triangles),
        double=factor * (4 * rows**3 + sum(2 * count**3 for count in counts)),
    )


def _few(plain: Work, dtype: torch.dtype, counts: Sequence[int]) -> Work:
    """The Gram matrix of the rows (of float64 a triangle) once, of which a group is a part."""
    (rows, width), wide = plain.sides, _name(double_of(dtype))
    if is_exact(dtype):
        problems = tuple(("matrix", (count, rows), wide) for count in counts)
        return replace(plain, triangles=((width, rows),), decomposed=problems)
    flops = (4 if dtype.is_complex else 1) * _gram_flops(width, rows)
    return replace(plain, double=flops, decomposed=tuple(("gram", (count, count), wide) for count in counts))


def _grams(plain: Work, dtype: torch.dtype, cells: int, shares: Sequence[Share], turns: int) -> Work:
    """One Gram matrix per cell, added up per group; `held` is theirs."""
    (rows, width), wide = plain.sides, double_of(dtype)
    return replace(
        plain,
        double=(4 if dtype.is_complex else 1) * _gram_flops(rows, width),
        decomposed=(("gram", (width, width), _name(wide)),) * len(shares),
        held=cells * _gram_numbers(width) * wide.itemsize,
    )


def _triangles(plain: Work, dtype: torch.dtype, cells: int, shares: Sequence[Share], turns: int) -> Work:
    """One triangle per cell, which rows join some at a time; those of a group below one another."""
    (rows, width), wide = plain.sides, double_of(dtype)
    number = cells * turns
    return replace(
        plain,
        way="triangle",
        triangles=((width + math.ceil(rows / number), width),) * number,
        decomposed=tuple(("matrix", (min(one.cells, cells) * width, width), _name(wide)) for one in shares),
        held=cells * width * (width + 1) // 2 * wide.itemsize,
    )


def _decomposed(summed: Work, dtype: torch.dtype, shares: Sequence[Share]) -> Work:
    """A group's matrix is the sum of its cells': decomposed as it stands, or by the Gram matrix of its smaller side."""
    side, large = sorted(summed.sides)
    wide, factor = _name(double_of(dtype)), 4 if dtype.is_complex else 1
    if is_exact(dtype) or side == 1:
        return replace(summed, decomposed=(("matrix", summed.sides, wide),) * len(shares))
    flops = summed.double + len(shares) * factor * _gram_flops(large, side)
    return replace(summed, double=flops, decomposed=(("gram", (side, side), wide),) * len(shares))


def _cells_flops(use: Sizes, partition: Partition, *, alone: bool) -> float:
    """Of the cells' weight gradients at one op; rows of other cells cost nothing, except where they are set to zero."""
    cells = partition.cells if use.owned else 1
    share = cells_computed(use, cells, alone=alone) / cells
    factor = 4 if _dtype(use.dtype).is_complex else 1
    if use.form in ("outer", "product", "batched") and use.activation and use.adjoint:
        flops = 2.0 * use.rows * use.activation * use.adjoint * (cells if use.form == "batched" else 1)
    elif use.form == "lookup":
        flops = float(use.rows * (use.adjoint or 1))
    else:
        flops = float(use.rows * (use.adjoint or 1) * (2 if use.activation else 1)) if use.form == "elements" else 0.0
    return factor * share * flops


def _pulls(use: Sizes, partition: Partition) -> int:
    """Passes back through the op, and through what is done to the parameter before it."""
    cells = partition.cells if use.owned else 1
    return cells * ((use.form == "local") + (not use.direct))


# ---------------------------------------------------------------------- counts


def _cells_of(uses: Sequence[Sizes], partition: Partition) -> int:
    return partition.cells if any(use.owned for use in uses) else 1


def _present(uses: Sequence[Sizes], partition: Partition) -> Sequence[Share]:
    """The groups that have rows: only the whole, where these have no owners."""
    return partition.shares if not uses or any(use.owned for use in uses) else partition.shares[:1]


def _counts(uses: Sequence[Sizes], partition: Partition) -> list[int]:
    """How many rows each of the groups has that have some."""
    rows = sum(use.rows for use in uses)
    found = [round(rows * share.samples) for share in _present(uses, partition)]
    return [count for count in found if count]


def _gram_flops(rows: int, width: int) -> float:
    """Of half the Gram matrix of (rows, width)."""
    return float(rows * width**2)


def _columns(use: Sizes) -> int:
    """Of A and D together; of a lookup's A there is one number in a row."""
    return (1 if use.form == "lookup" else use.activation or 0) + (use.adjoint or 0)


def _gram_numbers(width: int) -> int:
    return sum((width - start) * min(COLUMNS, width - start) for start in range(0, width, COLUMNS))


# ---------------------------------------------------------------------- dtypes


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _coarsest(info: Mapping[str, Any], uses: Sequence[Sizes]) -> torch.dtype:
    """In which the gradient is computed; the parameter's own where no op was seen."""
    found = [_dtype(use.dtype) for use in uses] or [_dtype(info["dtype"])]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps)


def _summed(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
