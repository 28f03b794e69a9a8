"""`gradtrace graph` shows and exports the ops of a study's model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
from click.testing import Result

Cli = Callable[..., Result]

STUDY = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))

def batches():
    yield torch.randn(7, 5), torch.zeros(7, dtype=torch.long)

def inputs(batch):
    return batch[0]

def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])

def groups(batch):
    return {"half": [0] * 3 + [1] * 4}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "mystudy.py"
    path.write_text(STUDY)
    return path


def test_a_row_for_each_parameter_of_an_op(cli: Cli, study: Path) -> None:
    result = cli("graph", study, "--format", "jsonl")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["parameter"] for row in rows} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {row["function"] for row in rows if row["parameter"] == "0.weight"} != {None}
    assert "2.weight" in cli("graph", study).stdout


def test_exports_hold_the_same_graph(cli: Cli, study: Path) -> None:
    linked = nx.node_link_graph(json.loads(cli("graph", study, "--json").stdout), edges="links")
    assert linked.number_of_nodes() >= 2
    assert linked.number_of_edges() >= 1
    graphml = nx.read_graphml(io.BytesIO(cli("graph", study, "--graphml").stdout.encode()))
    assert set(graphml.nodes) == set(linked.nodes)
    assert set(graphml.edges) == set(linked.edges)
    dot = cli("graph", study, "--dot").stdout
    assert dot.startswith("digraph")
    assert dot.count(" -> ") == linked.number_of_edges()
    assert all(node in dot for node in linked.nodes)


def test_a_study_without_batches_is_told(cli: Cli, study: Path) -> None:
    study.write_text(STUDY.replace("    yield torch.randn(7, 5), torch.zeros(7, dtype=torch.long)", "    return []"))
    result = cli("graph", study)
    assert result.exit_code == 1
    assert "batches()" in result.stderr
