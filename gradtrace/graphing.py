"""From a traced step to the graph of its ops."""

from __future__ import annotations

from typing import Any

import networkx as nx

from gradtrace.finish import infos
from gradtrace.graph import OpGraph
from gradtrace.session import Session


def graph_of(session: Session, excluded: dict[str, str]) -> OpGraph:
    """The ops that the session saw, as plain data, with an edge wherever one's result flows into another."""
    graph = nx.DiGraph()
    names: dict[int, str] = {}
    for record in session.seen:
        names[record.number] = _unique(graph, f"{record.key.module or 'model'}:{record.key.function}")
        layout = session.memory.layout(record.key, 0)
        graph.add_node(
            names[record.number],
            module=record.key.module,
            function=record.key.function,
            parameters=", ".join(dict.fromkeys(n for o in record.operands for n in sorted(o.value.parameters))),
            adapter=", ".join(dict.fromkeys(o.adapter.name for o in record.operands if o.adapter)),
            rung=_rung(record),
            input_shape="; ".join(record.input_shapes),
            output_shape="; ".join("x".join(map(str, o.meta.shape)) for o in record.outputs),
            ownership=str(layout) if layout else "found in each step",
            coupled=any(n in session.memory.coupled for o in record.operands for n in o.value.parameters),
        )
        for source in sorted(record.sources):
            if source in names:
                graph.add_edge(names[source], names[record.number])
    measured = {info.name: {"shape": info.shape, **info.attrs} for info in infos(session)}
    unused = {n: "no gradient reaches it" for n in session.parameters if n not in measured}
    return OpGraph(graph, measured, {**excluded, **unused})


def _rung(record: Any) -> str:
    found = []
    for operand in record.operands:
        direct = "factored" if operand.adapter else "local"
        found.append(direct if operand.value.moves is not None else "pulled back")
    return ", ".join(dict.fromkeys(found))


def _unique(graph: nx.DiGraph, name: str) -> str:
    if name not in graph:
        return name
    count = 2
    while f"{name}#{count}" in graph:
        count += 1
    return f"{name}#{count}"
