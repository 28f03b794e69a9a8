"""Which axes of the operands and the output of a product are the same: one letter per axis, for every product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradtrace.calls import OpCall

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Labels:
    """The labels of the axes of every operand and of the output.

    merged: the output's shape with an axis per label, where the op merges some (`kron`).
    """

    operands: tuple[str, ...]
    output: str
    merged: tuple[int, ...] | None = None


def linear(call: OpCall, x: Tensor, weight: Tensor) -> Labels:
    rows, out = LETTERS[: x.dim() - 1], "O" if weight.dim() == 2 else ""
    return Labels((rows + "I", out + "I"), rows + out)


def matmul(call: OpCall, left: Tensor, right: Tensor) -> Labels:
    ranks = [max(t.dim() - 2, 0) for t in (left, right)]
    batch = LETTERS[: max(ranks)]
    cores = ("I" if left.dim() == 1 else "LI", "I" if right.dim() == 1 else "IR")
    operands = tuple(batch[len(batch) - rank :] + core for rank, core in zip(ranks, cores, strict=True))
    return Labels(operands, batch + cores[0][:-1] + cores[1][1:])


def turned_matmul(call: OpCall, right: Tensor, left: Tensor) -> Labels:
    """`right.__rmatmul__(left)`."""
    found = matmul(call, left, right)
    return Labels(found.operands[::-1], found.output)


def summed_matmul(call: OpCall, left: Tensor, right: Tensor) -> Labels:
    """The products of a batch, added up."""
    return Labels(matmul(call, left, right).operands, "LR")


def inner(call: OpCall, left: Tensor, right: Tensor) -> Labels | None:
    if not left.dim() or not right.dim():
        return None
    rows = LETTERS[: left.dim() + right.dim() - 2]
    first, second = rows[: left.dim() - 1], rows[left.dim() - 1 :]
    return Labels((first + "I", second + "I"), rows)


def outer(call: OpCall, left: Tensor, right: Tensor) -> Labels:
    return Labels(("L", "R"), "LR")


def vecdot(call: OpCall, left: Tensor, right: Tensor) -> Labels:
    axes = LETTERS[: max(left.dim(), right.dim())]
    summed = axes[call.kwargs.get("dim", -1)]
    return Labels(tuple(axes[len(axes) - t.dim() :] for t in (left, right)), axes.replace(summed, ""))


def kron(call: OpCall, left: Tensor, right: Tensor) -> Labels:
    """Every axis of the output is one of the left operand and one of the right: of the last axes, both."""
    rank = max(left.dim(), right.dim())
    axes, sizes = [], []
    for t, letters in ((left, LETTERS[:rank]), (right, LETTERS[rank : 2 * rank])):
        axes.append(letters[rank - t.dim() :])
        sizes.append([(letter, size) for letter, size in zip(axes[-1], t.shape, strict=True)])
    pairs = [pair for i in range(-rank, 0) for own in sizes if len(own) >= -i for pair in [own[i]]]
    return Labels(tuple(axes), "".join(letter for letter, _ in pairs), tuple(size for _, size in pairs))


def tensordot(call: OpCall, left: Tensor, right: Tensor) -> Labels | None:
    dims = call.args[2:4] if len(call.args) == 4 else call.argument(2, "dims", 2)
    if isinstance(dims, Tensor):
        dims = dims.tolist() if dims.numel() > 1 else int(dims)
    if isinstance(dims, int):
        dims = (range(left.dim() - dims, left.dim()), range(dims))
    summed = [[axis % t.dim() for axis in part] for t, part in zip((left, right), dims, strict=True)]
    first, second = LETTERS[: left.dim()], list(LETTERS[left.dim() : left.dim() + right.dim()])
    for a, b in zip(*summed, strict=True):
        second[b] = first[a]
    out = [x for x in first if x not in second] + [x for x in second if x not in first]
    return Labels((first, "".join(second)), "".join(out))


def chain(call: OpCall, *operands: Tensor) -> Labels:
    """Matrices multiplied one after the other; the first and the last may be vectors."""
    last = len(operands) - 1
    ends = [operands[0].dim() == 2, operands[last].dim() == 2]
    axes = [LETTERS[i : i + 2] for i in range(last + 1)]
    axes[0] = axes[0] if ends[0] else axes[0][1:]
    axes[last] = axes[last] if ends[1] else axes[last][:1]
    return Labels(tuple(axes), LETTERS[0] * ends[0] + LETTERS[last + 1] * ends[1])


def einsum(call: OpCall, *operands: Tensor) -> Labels | None:
    """As the equation says. An ellipsis stands for the letters that it lacks, aligned at the last."""
    equation = call.args[0].replace(" ", "")
    terms, arrow, out = equation.partition("->")
    parts = terms.split(",")
    free = "".join(letter for letter in LETTERS if letter not in equation)
    lengths = [t.dim() - len(part.replace("...", "")) for t, part in zip(operands, parts, strict=True)]
    longest = max((n for n, part in zip(lengths, parts, strict=True) if "..." in part), default=0)
    names = free[:longest]
    axes = [part.replace("...", names[longest - n :]) for n, part in zip(lengths, parts, strict=True)]
    if not arrow:
        once = sorted(letter for letter in set(terms) - {",", "."} if terms.count(letter) == 1)
        out = "..." + "".join(once)
    return Labels(tuple(axes), out.replace("...", names))


LABELS: dict[str, Callable[..., Labels | None]] = {
    **dict.fromkeys(("matmul", "__matmul__", "linalg_matmul", "mm", "bmm", "mv", "dot", "vdot"), matmul),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), matmul),
    **dict.fromkeys(("outer", "ger", "addr"), outer),
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), chain),
    "linear": linear,
    "__rmatmul__": turned_matmul,
    "addbmm": summed_matmul,
    "inner": inner,
    "linalg_vecdot": vecdot,
    "kron": kron,
    "tensordot": tensordot,
    "einsum": einsum,
}


def labels_of(name: str, call: OpCall, operands: Sequence[Any]) -> Labels | None:
    """The labels of the axes of a product's operands, or None where they fit together in no known way."""
    try:
        return LABELS[name](call, *operands)
    except (ValueError, IndexError, TypeError, ZeroDivisionError):
        return None  # torch refuses such a call, and says why
