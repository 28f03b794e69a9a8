"""`gt.plan` says beforehand what the runtime then does: ways, sizes, decompositions, cells, and what is stored."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.accumulate import ParameterSum
from gradtrace.errors import GroupError, SelectionError
from gradtrace.finish import Pending
from gradtrace.groups import MOST_CELLS
from gradtrace.kinds import KindRows, LookupRows
from gradtrace.measure import traced
from gradtrace.planning.planned import COLUMNS
from gradtrace.planning.rates import Rates
from gradtrace.session import Session
from gradtrace.settings import Settings
from gradtrace.shadow import any_loss
from gradtrace.store.rows import KINDS
from tests.case import Apply, Hidden, default_dtype
from tests.models import BY_NAME, CASES

SAMPLES = 6
GROUPS = {"diagnosis": ["SZ", "HC"] * 3, "site": [0, 0, 0, 1, 1, 1]}
RATES = Rates(1e10, 5e9, *[((8, 1e-5), (64, 1e-4), (256, 5e-3))] * 3, workers=2)


def linear() -> tuple[nn.Module, Tensor]:
    """A first layer with fewer rows than sides, a last one with more."""
    return nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(SAMPLES, 11)


def wide() -> tuple[nn.Module, Tensor]:
    """Gram matrices of more columns than are computed at once, in several turns."""
    return nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 3)), torch.randn(SAMPLES, 200, 5)


def norms() -> tuple[nn.Module, Tensor]:
    parts = [nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 2)]
    return nn.Sequential(*parts), torch.randn(SAMPLES, 5)


def convolutions() -> tuple[nn.Module, Tensor]:
    """Few rows of patches in the last, many in the first, and groups of channels between."""
    parts = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 40, 2), nn.Flatten(2)]
    return nn.Sequential(*parts), torch.randn(SAMPLES, 3, 6, 6)


def words() -> tuple[nn.Module, Tensor]:
    """A table that is the output layer, too."""
    model = Apply(lambda m, x: F.linear(m.inner(m.table(x)), m.table.weight), table=nn.Embedding(19, 5))
    model.inner = nn.Linear(5, 5)
    return model, torch.randint(0, 19, (SAMPLES, 4))


def lookup() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(19, 5), nn.Linear(5, 3)), torch.randint(0, 19, (SAMPLES, 4))


def recurrent() -> tuple[nn.Module, Tensor]:
    return Apply(lambda m, x: m.layer(x)[0], layer=nn.LSTM(5, 7, batch_first=True)), torch.randn(SAMPLES, 4, 5)


def reused() -> tuple[nn.Module, Tensor]:
    """A layer whose rows are few in each use, and many together."""
    layer = nn.Linear(7, 7)
    return nn.Sequential(layer, nn.Tanh(), layer), torch.randn(SAMPLES, 7)


def unclaimed() -> tuple[nn.Module, Tensor]:
    """Rungs local and pulled back."""
    parts = {"centres": nn.Parameter(torch.randn(3, 5)), "weight": nn.Parameter(torch.randn(4, 3))}
    return Apply(lambda m, x: torch.cdist(x, m.centres) @ m.weight.exp().T, **parts), torch.randn(SAMPLES, 5)


def hidden() -> tuple[nn.Module, Tensor]:
    model = Apply(lambda m, x: m.head(Hidden.apply(x, m.weight)), weight=nn.Parameter(torch.randn(4, 5)))
    model.head = nn.Linear(4, 3)
    return model, torch.randn(SAMPLES, 5)


MODELS = (linear, wide, norms, convolutions, words, lookup, recurrent, reused, unclaimed, hidden)
Make = Callable[[], tuple[nn.Module, Tensor]]


@pytest.fixture(autouse=True)
def same_draws_each_time() -> None:
    torch.manual_seed(0)


def planned(make: Make, **options: Any) -> gt.Plan:
    return gt.plan(gt.trace(*make(), groups=GROUPS), GROUPS, **options)


def really(model: nn.Module, x: Tensor, kinds: Any = KINDS) -> tuple[Session, dict[str, Any]]:
    """What the runtime gathers of this batch, and how it sums every parameter's part up."""
    session = traced(model, x, GROUPS, None, Settings(kinds), None, any_loss)
    return session, Pending(session, step=0, keep=64).summaries()


def way_of(total: ParameterSum, kind: str) -> str:
    have = getattr(total, kind)
    if isinstance(have, LookupRows):
        return "lookup"
    assert isinstance(have, KindRows)
    have.reduce()
    if have._few is not None:
        return "few"
    return {"Gram": "gram", "Triangle": "triangle"}[type(next(iter(have.folded.values()))).__name__]


# ---------------------------------------------------------------------- as the runtime does it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_every_way_and_size_is_that_of_the_runtime(make: Make, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model, x = make()
        found = gt.plan(gt.trace(model, x, groups=GROUPS), GROUPS)
        session, _ = really(model, x)
    sums = session.gathered.sums
    assert {(e.parameter, e.kind) for e in found.entries} == {
        (name, kind) for name, total in sums.items() for kind in KINDS if kind == "gradient" or getattr(total, kind)
    }
    for entry in found.entries:
        total = sums[entry.parameter]
        if entry.kind == "gradient":
            assert entry.way == ("factors" if total.gradient.is_factored else "cells"), entry
            assert (entry.p, entry.q) == total.gradient.sides
            continue
        have = getattr(total, entry.kind)
        assert entry.way == way_of(total, entry.kind), entry
        width = have.height if isinstance(have, LookupRows) else have.width
        assert (entry.p, entry.q) == (entry.m, width)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", [case.name for case in CASES][::5])
def test_every_way_is_that_of_the_runtime_in_whole_models(name: str) -> None:
    problem = BY_NAME[name].build(torch.float32)
    found = gt.plan(gt.trace(problem.model, problem.inputs, groups=problem.labels, **problem.options), problem.labels)
    settings = Settings(KINDS, problem.options.get("sample_dim"))
    sums = traced(problem.model, problem.inputs, problem.labels, None, settings, None, any_loss).gathered.sums
    for entry in found.entries:
        total = sums[entry.parameter]
        dense = "factors" if total.gradient.is_factored else "cells"
        assert entry.way == (dense if entry.kind == "gradient" else way_of(total, entry.kind)), entry
    assert max(map(len, str(found).splitlines())) <= 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_buckets_are_those_that_are_decomposed(make: Make, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model, x = make()
        found = gt.plan(gt.trace(model, x, groups=GROUPS), GROUPS)
        _, summaries = really(model, x)
    problems = dict.fromkeys(one for summary in summaries.values() for one in summary.problems)
    real = Counter((one.form, one.sides, str(one.dtype).removeprefix("torch.")) for one in problems)
    assert found.buckets == dict(real)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_with_fewer_kinds_fewer_is_decomposed(make: Make) -> None:
    model, x = make()
    found = gt.plan(gt.trace(model, x), GROUPS, kinds=["activation"])
    _, summaries = really(model, x, ("activation",))
    assert sum(found.buckets.values()) == len({one for summary in summaries.values() for one in summary.problems})


def test_rows_that_parameters_share_are_counted_once() -> None:
    rows = {(row["parameter"], row["kind"]): row for row in planned(recurrent, rates=RATES).rows()}
    assert rows["layer.weight_hh_l0", "adjoint"]["shared"] == ""
    for name in ("layer.weight_ih_l0", "layer.bias_ih_l0", "layer.bias_hh_l0"):
        row = rows[name, "adjoint"]
        assert row["shared"] == "layer.weight_hh_l0"
        assert (row["flops"], row["bytes"], row["seconds"], row["decomposed"]) == (0, 0, 0, "")


def test_what_nobody_can_know_is_counted_apart() -> None:
    found = planned(unclaimed)
    pulls = {entry.parameter: entry.pulls for entry in found.entries if entry.kind == "gradient"}
    assert pulls == {"centres": found.cells, "weight": found.cells}
    assert "cost is not known" in str(found)
    one = planned(hidden)
    entry = next(entry for entry in one.entries if entry.parameter == "weight")
    assert entry.flops >= one.cells * one.step_flops * 2 / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_held_is_what_the_tensors_take(dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model, x = wide()
        found = gt.plan(gt.trace(model, x), GROUPS)
        session, _ = really(model, x)
    held = {(e.parameter, e.kind): e.bytes for e in found.entries}
    total = session.gathered.sums["2.weight"]
    dense = sum(tensor.nbytes for tensor in total.gradient.dense.values())
    assert held["2.weight", "gradient"] == dense + session.audit.reference["2.weight"].nbytes
    assert isinstance(total.activation, KindRows)
    folded = sum(
        sum(block.nbytes for block in one.blocks) if dtype == torch.float32 else one.packed.nbytes
        for one in total.activation.folded.values()
    )
    most = 300 * (2**18 // 300) * x.element_size()
    assert folded <= held["2.weight", "activation"] <= folded + most


# ---------------------------------------------------------------------- groups and cells


def test_groups_may_be_labels_a_bare_sequence_or_numbers_of_labels() -> None:
    graph = gt.trace(*linear())
    assert graph.n_samples == SAMPLES
    whole = gt.plan(graph)
    assert (whole.groups, whole.cells) == (("all",), 1)
    labelled = gt.plan(graph, GROUPS)
    assert labelled.groups == ("all", "diagnosis=HC", "diagnosis=SZ", "site=0", "site=1")
    assert labelled.cells == 4
    bare = gt.plan(graph, GROUPS["diagnosis"])
    assert (bare.groups, bare.cells) == (("all", "group=HC", "group=SZ"), 2)
    counted = gt.plan(graph, {"diagnosis": 2, "site": 2})
    assert (len(counted.groups), counted.cells, counted.buckets) == (5, 4, labelled.buckets)
    many = gt.plan(graph, {"diagnosis": 2, "subject": 900})
    assert many.cells == SAMPLES
    assert len(many.groups) == 1 + 2 + SAMPLES
    assert many.store_bytes > 50 * counted.store_bytes


def test_too_many_cells_are_an_error_that_names_the_grouping() -> None:
    samples = MOST_CELLS + 1
    graph = gt.trace(nn.Linear(2, 2), torch.randn(samples, 2))
    half = [number % 2 for number in range(samples)]
    for groups in ({"half": half, "subject": list(range(samples))}, {"half": 2, "subject": samples}):
        with pytest.raises(GroupError, match=f"more than {MOST_CELLS} cells.*Leave out 'subject'"):
            gt.plan(graph, groups)


def test_arguments_that_cannot_be_are_refused() -> None:
    graph = gt.trace(*linear())
    with pytest.raises(GroupError, match=r"2 labels per grouping, and 6 samples"):
        gt.plan(graph, ["a", "b"])
    with pytest.raises(GroupError, match="cannot have 0 labels"):
        gt.plan(graph, {"site": 0})
    with pytest.raises(SelectionError, match="no kind 'weight'"):
        gt.plan(graph, kinds=["weight"])
    with pytest.raises(SelectionError, match="every=0"):
        gt.plan(graph, every=0)


# ---------------------------------------------------------------------- values


def test_a_plan_is_a_value() -> None:
    graph = gt.trace(*norms())
    found = gt.plan(graph, GROUPS, rates=RATES)
    assert found == gt.plan(graph, GROUPS, rates=RATES)
    assert gt.plan(graph) == gt.plan(graph)
    assert found != gt.plan(graph, GROUPS, rates=RATES, keep=2)
    with pytest.raises(FrozenInstanceError):
        found.cells = 3  # type: ignore[misc]
    assert all(tuple(row) == COLUMNS for row in found.rows())
    json.dumps([found.rows(), found.totals()])


def test_seconds_need_rates() -> None:
    graph = gt.trace(*linear())
    plain, timed = gt.plan(graph, GROUPS), gt.plan(graph, GROUPS, rates=RATES)
    assert math.isnan(plain.seconds)
    assert timed.seconds == pytest.approx(sum(row["seconds"] for row in timed.rows()))
    assert plain.overhead() == plain.overhead(1.0) == pytest.approx(plain.flops / plain.step_flops)
    assert timed.overhead(1.0) == pytest.approx(timed.seconds)
    assert timed.every_for(0.05, timed.seconds) == 20
    assert timed.every_for(0.05, 1e9) == 1
    twice = gt.plan(graph, GROUPS, rates=Rates(1e10, 5e9, RATES.gram, RATES.matrix, RATES.qr, workers=1))
    assert timed.seconds < twice.seconds < 2 * timed.seconds


def test_rates_grow_with_the_matrix() -> None:
    sizes = (2, 8, 20, 64, 100, 256, 1024)
    for form in ("gram", "matrix", "qr"):
        times = [RATES.seconds(form, (size, size)) for size in sizes]
        assert times == sorted(times)
        assert [times[1], times[3], times[5]] == pytest.approx([1e-5, 1e-4, 5e-3])
        assert times[6] == pytest.approx(64 * 5e-3)


def test_the_steps_own_flops_are_those_of_its_products() -> None:
    weights = 6 * SAMPLES * (11 * 7 + 7 * 3)
    biases = 6 * SAMPLES * (7 + 3)
    assert planned(linear).step_flops == weights + biases


def test_the_facts_travel_with_the_graph() -> None:
    graph = gt.trace(*linear())
    assert {(s.op, s.parameter, s.form, s.rows, s.activation, s.adjoint) for s in graph.sizes} == {
        ("0:linear", "0.weight", "outer", 6, 11, 7),
        ("0:linear", "0.bias", "elements", 6, None, 7),
        ("2:linear", "2.weight", "outer", 6, 7, 3),
        ("2:linear", "2.bias", "elements", 6, None, 3),
    }
    node = graph.nx.nodes["0:linear"]
    assert node["factors"] == "0.weight: outer A 6x11 D 6x7 float32; 0.bias: elements D 6x7 float32"


# ---------------------------------------------------------------------- the store


@pytest.mark.parametrize("keep", [2, 64, None])
@pytest.mark.parametrize("make", [linear, convolutions, lookup, hidden], ids=lambda make: make.__name__)
def test_the_store_is_as_large_as_foreseen(make: Make, keep: int | None, tmp_path: Path) -> None:
    model, x = make()
    steps, every = 5, 2
    found = gt.plan(gt.trace(model, x, groups=GROUPS), GROUPS, keep=keep, steps=steps, every=every)
    with gt.record(model, tmp_path / "run.zarr", keep=keep, every=every) as recorder:
        for _ in range(steps):
            with recorder.step(groups=GROUPS):
                any_loss(model(x)).backward()
            model.zero_grad()
    stream = zarr.open_group(tmp_path / "run.zarr", mode="r")["steps"]
    assert isinstance(stream, zarr.Group)
    arrays = [array for _, array in stream.members(max_depth=None) if isinstance(array, zarr.Array)]
    stored = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays if a.metadata.dimension_names[0] == "step")
    assert found.recorded == 3
    assert found.total_bytes == 3 * found.store_bytes
    assert stored == pytest.approx(found.total_bytes, rel=0.02)


# ---------------------------------------------------------------------- printing


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_plan_prints_in_120_columns(make: Make) -> None:
    model, x = make()
    found = gt.plan(gt.trace(model, x), {"site": 5}, rates=RATES, steps=1000, every=10)
    text = str(found)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[0] == "parameter"
    assert len(lines[: lines.index("")]) == 1 + len(found.entries)
    for said in ("occupied cells", "the step's own", "shapes", "held at the end", "in 1000 steps, every=10"):
        assert said in text


def test_long_names_and_large_sizes_print_in_120_columns() -> None:
    layer = nn.Linear(70_000, 2)
    model: nn.Module = layer
    for name in ("projection_of_the_second_decoder", "a_rather_long_prefix"):
        model = nn.Sequential()
        model.add_module(name, layer)
        layer = model  # type: ignore[assignment]
    text = str(gt.plan(gt.trace(model, torch.randn(2, 70_000)), rates=RATES))
    assert max(map(len, text.splitlines())) <= 120
    assert "decoder.weight" in text
