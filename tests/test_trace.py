"""The graph of ops: what flows where, how it is named, and that tracing leaves everything as it was."""

from __future__ import annotations

import io
import json

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradtrace as gt
from tests.case import FEATURES, HIDDEN, SAMPLES, TIME
from tests.models import BY_NAME, CASES
from tests.snapshot import Snapshot


class Residual(nn.Module):
    """first -> (skip) -> add -> last, and a functional call on a raw parameter in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self.raw = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.last = nn.Linear(HIDDEN, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + torch.relu(self.inner(h))
        return self.last(torch.tanh(F.linear(h, self.raw)))


def edges(graph: gt.OpGraph) -> set[tuple[str, str]]:
    return set(graph.nx.edges)


def test_edges_follow_the_data_through_residual_connections_and_functional_calls() -> None:
    graph = gt.trace(Residual(), torch.randn(SAMPLES, FEATURES))
    assert edges(graph) == {
        ("first:linear", "inner:linear"),
        ("first:linear", "model:linear"),  # past `inner`, by the skip
        ("inner:linear", "model:linear"),
        ("model:linear", "last:linear"),
    }
    assert nx.is_directed_acyclic_graph(graph.nx)


def test_what_is_not_traced_is_listed_with_the_reason() -> None:
    model = Residual()
    model.first.requires_grad_(False)
    graph = gt.trace(model, torch.randn(SAMPLES, FEATURES), parameters=["*.weight", "raw"])
    assert graph.excluded["first.weight"] == "does not require a gradient"
    assert graph.excluded["inner.bias"] == "left out by parameters="
    assert graph.excluded["spare.weight"] == "no gradient reaches it"
    assert "raw" in graph.measured


def test_a_module_used_twice_is_two_ops_of_one_parameter() -> None:
    layer = nn.Linear(FEATURES, FEATURES)
    graph = gt.trace(nn.Sequential(layer, nn.Tanh(), layer), torch.randn(SAMPLES, FEATURES))
    ops = [name for name, node in graph.nx.nodes(data=True) if "0.weight" in node["parameters"]]
    assert ops == ["0:linear", "0:linear#2"]
    assert edges(graph) == {("0:linear", "0:linear#2")}


def test_tied_weights_are_one_parameter_by_the_first_name() -> None:
    problem = BY_NAME["tied_language_model"].build()
    graph = gt.trace(problem.model, problem.inputs)
    first = [name for name, _ in problem.model.named_parameters()]
    assert set(graph.measured) == set(first)
    users = [node["function"] for _, node in graph.nx.nodes(data=True) if first[0] in node["parameters"].split(", ")]
    assert {"embedding", "linear"} <= set(users)


def test_the_flow_goes_on_through_a_call_that_cannot_be_seen() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return 2 * grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Double.apply(self.a(x)))

    assert edges(gt.trace(Model(), torch.randn(SAMPLES, FEATURES))) == {("a:linear", "b:linear")}


def test_composite_functions_are_entered() -> None:
    attention = nn.MultiheadAttention(HIDDEN - 1, 2, batch_first=True)
    x = torch.randn(SAMPLES, TIME, HIDDEN - 1)
    graph = gt.trace(attention, {"query": x, "key": x, "value": x})
    assert {node["function"] for _, node in graph.nx.nodes(data=True)} == {"linear"}
    assert {info["rung"] for info in graph.measured.values()} == {"factored"}


def test_nodes_carry_plain_data_that_exports() -> None:
    graph = gt.trace(Residual(), torch.randn(SAMPLES, FEATURES))
    buffer = io.BytesIO()
    nx.write_graphml(graph.nx, buffer)
    assert nx.read_graphml(io.BytesIO(buffer.getvalue())).nodes == graph.nx.nodes
    again = nx.node_link_graph(json.loads(json.dumps(nx.node_link_data(graph.nx, edges="edges"))), edges="edges")
    assert edges(graph) == set(again.edges)
    table = str(graph)
    assert "raw" in table
    assert "factored" in table


@pytest.mark.parametrize("name", [case.name for case in CASES if not case.opaque][::3])
def test_tracing_leaves_the_model_as_it_was_and_names_every_parameter(name: str) -> None:
    problem = BY_NAME[name].build(torch.float32)
    before = Snapshot.of(problem.model)
    graph = gt.trace(problem.model, problem.inputs, **problem.options)
    assert Snapshot.of(problem.model).changes_since(before) == []
    assert set(graph.measured) | set(graph.excluded) == {n for n, _ in problem.model.named_parameters()}
