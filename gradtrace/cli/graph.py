"""`gradtrace graph`: the parameterized ops of a study's model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradtrace.cli import NOTHING_MATCHED
from gradtrace.cli.output import Output, note, output_options
from gradtrace.cli.tracing import graph_of_study

if TYPE_CHECKING:
    import networkx

COLUMNS = ("parameter", "op", "function", "adapter", "shape", "output", "rung", "ownership")


@click.command("graph")
@click.argument("study", metavar="STUDY")
@click.option("--dot", "export", flag_value="dot", help="The graph in Graphviz' language.")
@click.option("--graphml", "export", flag_value="graphml", help="The graph as GraphML.")
@output_options
@click.pass_context
def command(ctx: click.Context, study: str, export: str | None, output_format: str, output_path: Path | None) -> None:
    """The ops of STUDY's model that have parameters, and how each parameter will be measured.

    STUDY is path/to/file.py or package.module with the functions model(), batches() and inputs(batch); its first batch
    is passed through the model once. With --json the whole graph as nodes and links (networkx reads it), in the other
    formats one row per op and parameter.
    """
    graph = graph_of_study(study)
    output = Output(output_format, output_path)
    if export or output_format == "json":
        with output.open() as file:
            file.write(EXPORTS[export or "json"](graph.nx) + "\n")
        return
    for name, why in getattr(graph, "excluded", {}).items():
        note(f"Not traced: {name} ({why}).")
    if not output.write(COLUMNS, graph.rows()):
        note("The model has no op with parameters.")
        ctx.exit(NOTHING_MATCHED)


def _dot(graph: networkx.DiGraph) -> str:
    """Written by hand: networkx needs another package for it."""
    lines = ["digraph model {"]
    lines += [f"  {_quoted(node)} [label={_quoted(_label(node, data))}];" for node, data in graph.nodes(data=True)]
    lines += [f"  {_quoted(start)} -> {_quoted(end)};" for start, end in graph.edges()]
    return "\n".join([*lines, "}"])


def _label(node: Any, data: dict[str, Any]) -> str:
    facts = [str(data[key]) for key in ("parameters", "adapter", "rung") if data.get(key)]
    return "\n".join([str(node), *facts])


def _quoted(text: Any) -> str:
    escaped = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _graphml(graph: networkx.DiGraph) -> str:
    import networkx

    return "\n".join(networkx.generate_graphml(graph))


def _node_link(graph: networkx.DiGraph) -> str:
    import networkx

    return json.dumps(networkx.node_link_data(graph, edges="links"), ensure_ascii=False, indent=2)


EXPORTS: dict[str, Callable[[Any], str]] = {"dot": _dot, "graphml": _graphml, "json": _node_link}
