"""The graph of a model's parameterized ops. Nodes carry plain data; no live module or tensor is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx


@dataclass(frozen=True)
class Sizes:
    """How large the factors of one parameter in one op are. Plain data.

    form: `outer` (a product of rows), `lookup`, `elements`, `batched` or `product`, where an adapter factors the op,
    and `local` where none does. direct: whether the parameter itself enters the op, index moves aside.
    rows: of A and D. activation, adjoint: their numbers of columns; of a lookup's A the height of its table; None where
    there is no such matrix. owned: whether rows have owners. dtype: of the adjoint. replayed: whether the op is run
    once more to know its rows. itself: whether the parameter enters the op as it is, without any move.
    """

    op: str
    parameter: str
    form: str
    direct: bool
    rows: int
    activation: int | None
    adjoint: int | None
    owned: bool
    dtype: str
    replayed: bool = False
    itself: bool = False

    def __str__(self) -> str:
        matrices = [
            f"{letter} {self.rows}x{width}"
            for letter, width in (("A", self.activation), ("D", self.adjoint))
            if width is not None
        ]
        return f"{self.parameter}: {' '.join([self.form, *matrices, self.dtype])}"


@dataclass(frozen=True)
class OpGraph:
    """The parameterized ops of one forward pass.

    nx: a directed graph; nodes are ops, named `module:function` (`#2`, `#3` for later calls), with the attributes
        `parameters`, `function`, `module`, `adapter`, `rung`, `input_shape`, `output_shape`, `ownership`, `coupled`,
        `factors`, `map` (`linear`, or `affine` with a bias, for calls of `linear`); edges follow the flow of data from
        op to op, with `feeds` (between two calls of `linear`: the result is the next one's rows, with nothing in
        between) and `alone` (and all that reads it).
    excluded: parameters that are not traced, and why.
    measured: per parameter how it will be measured (`rung`, `ops`, `adapters`, `ownership`, `reason`, `kinds`, and
        in `shared` the parameter that has the same activations or adjoints).
    sizes: of the factors, per op and parameter, in the order in which adjoints came. n_samples: in the traced batch.
    """

    nx: nx.DiGraph
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    sizes: tuple[Sizes, ...] = ()
    n_samples: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        """One row per parameter of an op, in the order of the forward pass."""
        found = []
        for name, node in self.nx.nodes(data=True):
            for parameter in node["parameters"].split(", "):
                info = self.measured.get(parameter, {})
                found.append(
                    {
                        "parameter": parameter,
                        "op": name,
                        "function": node["function"],
                        "adapter": node["adapter"] or "-",
                        "shape": "x".join(str(s) for s in info.get("shape", ())) or "scalar",
                        "output": node["output_shape"],
                        "rung": info.get("rung", "-"),
                        "ownership": node["ownership"],
                    }
                )
        return found

    def __str__(self) -> str:
        lines = table(self.rows(), ("parameter", "op", "adapter", "shape", "output", "rung", "ownership"))
        lines += [f"excluded: {name} ({why})" for name, why in self.excluded.items()]
        lines += [f"{name}: {i['rung']}, {i['reason']}" for name, i in self.measured.items() if i.get("reason")]
        return "\n".join(lines)


def table(rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """Lines of text, the first with the columns' names."""
    body = [[str(row[c]) for c in columns] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in body)]) for i, c in enumerate(columns)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *body]
    ]
