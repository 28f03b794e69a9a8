"""How fast this machine multiplies and decomposes: what turns the work of a plan into seconds."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.decompose import lapack
from gradtrace.decompose.problem import flops_of
from gradtrace.schedule import on_one_thread

SIZES = (8, 48, 192, 512)
PRODUCT = 384  # rows and columns of the matrices that are multiplied
COPIED = 2**21  # numbers of a tensor that is copied
SMALL = 64  # numbers of one that is nothing but a call
REPEATS = 2  # of which the faster counts

CUBES = {"gram": 4 / 3, "matrix": 8 / 3, "qr": 4 / 3}  # flops of an n x n one, in n cubed


@dataclass(frozen=True)
class Rates:
    """What a machine can do.

    single: flops per second of products, with all threads. double: the same in double precision of one worker, for
    Gram matrices, of which half is computed. gram (eigenvalues of a symmetric matrix), matrix (singular values of any),
    qr: pairs of a square matrix's side and the seconds that one takes, in double precision, sides ascending. workers:
    how many of these run beside each other. copied: bytes per second. call: seconds of a call on a small tensor.
    """

    single: float
    double: float
    gram: tuple[tuple[int, float], ...]
    matrix: tuple[tuple[int, float], ...]
    qr: tuple[tuple[int, float], ...]
    workers: int = 1
    copied: float = math.inf
    call: float = 0.0

    def seconds(self, form: str, sides: tuple[int, int]) -> float:
        """Of one decomposition: those measured, and between them and beyond by as many flops."""
        if min(sides) == 1:
            return flops_of(form, sides) / self.double
        known: tuple[tuple[int, float], ...] = getattr(self, form)
        side = max((flops_of(form, sides) / CUBES[form]) ** (1 / 3), 1.0)
        if side <= known[0][0]:
            return known[0][1]
        for (low, quick), (high, slow) in itertools.pairwise(known):
            if side <= high:
                share = math.log(side / low) / math.log(high / low)
                return math.exp((1 - share) * math.log(quick) + share * math.log(slow))
        last, slow = known[-1]
        return slow * (side / last) ** 3


@functools.cache
def measured_rates(device: torch.device) -> Rates:
    """The rates of a device, measured once, within a second on a CPU. Decompositions have one thread each."""
    draw = torch.Generator().manual_seed(0)
    square = {n: torch.randn(n, n, dtype=torch.float64, generator=draw).to(device) for n in (*SIZES, PRODUCT)}
    whole = square[PRODUCT]
    single = 2 * PRODUCT**3 / _fastest(_product, whole.float())
    ways = {"gram": lapack.eigenvalues, "matrix": lapack.singular_values, "qr": _triangle}
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    large, small = (torch.zeros(numbers, device=device) for numbers in (COPIED, SMALL))
    copied, call = 4 * COPIED / _fastest(torch.clone, large), _fastest(torch.clone, small)
    with on_one_thread():
        double = PRODUCT**3 / _fastest(lapack.squared, whole)
        timed = {form: tuple((n, _fastest(way, square[n])) for n in SIZES) for form, way in ways.items()}
    return Rates(single, double, workers=workers, copied=copied, call=call, **timed)


def _product(matrix: Tensor) -> Tensor:
    return matrix @ matrix


def _triangle(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix, mode="r").R


def _fastest(work: Callable[[Tensor], Tensor], matrix: Tensor) -> float:
    """Seconds of the fastest of some runs, after one that counts for nothing."""
    work(matrix)
    found = []
    for _ in range(REPEATS):
        _wait(matrix.device)
        began = time.perf_counter()
        work(matrix)
        _wait(matrix.device)
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
