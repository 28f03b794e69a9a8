"""The graph of a model's parameterized ops. Nodes carry plain data; no live module or tensor is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx


@dataclass(frozen=True)
class OpGraph:
    """The parameterized ops of one forward pass.

    nx: a directed graph; nodes are ops, named `module:function` (`#2`, `#3` for later calls), with the attributes
        `parameters`, `function`, `module`, `adapter`, `rung`, `input_shape`, `output_shape`, `ownership`, `coupled`;
        edges follow the flow of data from op to op.
    excluded: parameters that are not traced, and why.
    measured: per parameter how it will be measured (`rung`, `ops`, `adapters`, `ownership`, `reason`, `kinds`).
    """

    nx: nx.DiGraph
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)

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
        lines = _table(self.rows(), ("parameter", "op", "adapter", "shape", "output", "rung", "ownership"))
        lines += [f"excluded: {name} ({why})" for name, why in self.excluded.items()]
        lines += [f"{name}: {i['rung']}, {i['reason']}" for name, i in self.measured.items() if i.get("reason")]
        return "\n".join(lines)


def _table(rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    body = [[str(row[c]) for c in columns] for row in rows]
    widths = [max([len(c), *(len(line[i]) for line in body)]) for i, c in enumerate(columns)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [list(columns), *body]
    ]
