"""From a traced step to the graph of its ops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx

from gradtrace.finish import infos
from gradtrace.graph import OpGraph, Sizes
from gradtrace.links import links_of
from gradtrace.session import Session
from gradtrace.sizes import Sizing
from gradtrace.store.rows import KINDS


def graph_of(session: Session, excluded: dict[str, str]) -> OpGraph:
    """The ops that the session saw, as plain data, with an edge wherever one's result flows into another."""
    graph, links = nx.DiGraph(), links_of(session)
    names: dict[int, str] = {}
    by_op = session.gathered.by_op if isinstance(session.gathered, Sizing) else {}
    sizes: dict[int, tuple[Sizes, ...]] = {}
    for record in session.seen:
        names[record.number] = _unique(graph, f"{record.key.module or 'model'}:{record.key.function}")
        sizes[record.number] = tuple(replace(s, op=names[record.number]) for s in by_op.get(record.number, ()))
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
            factors="; ".join(map(str, sizes[record.number])),
            map=links.maps.get(record.number, ""),
        )
        for source in sorted(record.sources):
            if source in names:
                alone = links.feeds.get((source, record.number))
                graph.add_edge(names[source], names[record.number], feeds=alone is not None, alone=bool(alone))
    shared = _shared(session)
    measured = {i.name: {"shape": i.shape, **i.attrs, "shared": shared.get(i.name, {})} for i in infos(session)}
    unused = {n: "no gradient reaches it" for n in session.parameters if n not in measured}
    found = tuple(one for number in by_op for one in sizes.get(number, ()))
    return OpGraph(graph, measured, {**excluded, **unused}, found, session.context.n_samples)


def _shared(session: Session) -> dict[str, dict[str, str]]:
    """Parameter -> kind -> the parameter of the same call, the largest, whose rows of that kind are its rows too."""
    first: dict[int, str] = {}
    found: dict[str, dict[str, str]] = {}
    sums = session.gathered.sums
    for name in sorted((n for n in session.parameters if n in sums), key=lambda n: -session.parameters[n].numel()):
        for kind in KINDS[1:]:
            rows = getattr(sums[name], kind)
            other = name if rows is None else first.setdefault(id(rows), name)
            if other != name:
                found.setdefault(name, {})[kind] = other
    return found


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
