"""Recurrent models are factored, whichever way their states reach the loss, and train as they would alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gradtrace as gt
from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Case, Problem
from tests.families.recurrent import sequences
from tests.models import BY_NAME, CASES
from tests.oracles import SEED, group_loss_gradients, memberships, spectrum
from tests.snapshot import Snapshot
from tests.test_whole_models import DTYPES, RESIDUAL, TOLERANCE, difference, measure

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
RECURRENT = ("rnn.", "cell.")  # what the models of the families call their recurrent layer
FAMILY = [c for c in CASES if c.name.startswith(("lstm", "gru", "rnn", "learned_initial"))]


@pytest.mark.parametrize("case", FAMILY, ids=str)
def test_every_weight_of_a_recurrent_layer_is_factored(case: Case) -> None:
    """In single precision, where layers of an LSTM are kernels. Whether they are right, test_whole_models.py says."""
    problem = case.build(torch.float32)
    torch.manual_seed(SEED)
    tree = measure(problem)
    names = [name for name in tree.children if name.startswith(RECURRENT)]
    assert names
    for name in names:
        attributes = tree[name].attrs
        assert (attributes["rung"], attributes["adapters"]) == ("factored", ["recurrent"]), (name, attributes["reason"])
        expected = ["gradient", "adjoint"] if "bias" in name else ["gradient", "activation", "adjoint"]
        assert set(attributes["kinds"]) == set(expected), name


# ---------------------------------------------------------------------- the ways states go


def lstm(**settings: Any) -> nn.LSTM:
    return nn.LSTM(FEATURES, HIDDEN, batch_first=True, **settings)


def problem(forward: Callable[..., Any], **settings: Any) -> Problem:
    return Problem(Apply(forward, rnn=lstm(**settings), head=nn.Linear(HIDDEN, OUTPUT)), sequences())


def reads(*outputs: str) -> Callable[..., Any]:
    """The head reads the sum of some outputs: `steps`, the last `h`, the last `c`."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        steps, (h, c) = m.rnn(x)
        found = {"steps": steps, "h": h[-1][:, None], "c": c[-1][:, None]}
        return m.head(torch.stack([found[name].sum(1) for name in outputs]).sum(0))

    return forward


def twice(m: Apply, x: Tensor) -> Tensor:
    """One layer over the sequence and over its reverse."""
    return m.head(m.rnn(x)[0] + m.rnn(x.flip(1))[0].flip(1))


def in_chunks(m: Apply, x: Tensor, *, cut: bool) -> Tensor:
    """The states go on from chunk to chunk, their gradient too unless it is cut (truncated in time)."""
    state, found = None, []
    for chunk in x.split(2, 1):
        steps, state = m.rnn(chunk, state)
        state = tuple(s.detach() for s in state) if cut else state
        found.append(steps)
    return m.head(torch.cat(found, 1))


def one_by_one(m: Apply, x: Tensor) -> Tensor:
    """Sequences without a batch axis."""
    return m.head(torch.stack([m.rnn(sequence)[0] for sequence in x]))


def without_some(m: Apply, x: Tensor) -> Tensor:
    """The last steps reach no loss."""
    return m.head(m.rnn(x)[0][:, : TIME - 2])


def checkpointed(m: Apply, x: Tensor, *, reentrant: bool) -> Tensor:
    steps = checkpoint(lambda rows: m.rnn(rows)[0], x.requires_grad_(reentrant), use_reentrant=reentrant)
    assert isinstance(steps, Tensor)
    return m.head(steps)


def learned_states() -> Problem:
    """Both first states of every layer, the same for all samples."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        first = [s.expand(-1, len(x), -1).contiguous() for s in (m.h, m.c)]
        return m.head(m.rnn(x, tuple(first))[0])

    parts = {name: nn.Parameter(torch.randn(2, 1, HIDDEN)) for name in ("h", "c")}
    return Problem(Apply(forward, rnn=lstm(num_layers=2), head=nn.Linear(HIDDEN, OUTPUT), **parts), sequences())


def cells(*outputs: str, every: bool) -> Problem:
    """A loop over steps; the head reads h, c or both, of every step or of the last."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        state, found = None, []
        for step in x.unbind(1):
            state = m.cell(step, state)
            found.append(sum(s for name, s in zip("hc", state, strict=True) if name in outputs))
        return m.head(torch.stack(found if every else found[-1:], 1))

    parts = {"cell": nn.LSTMCell(FEATURES, HIDDEN), "head": nn.Linear(HIDDEN, OUTPUT)}
    return Problem(Apply(forward, **parts), sequences())


def with_weight_norm() -> Problem:
    found = problem(reads("steps"))
    parametrizations.weight_norm(found.model.rnn, "weight_hh_l0")
    return found


WAYS = [
    *(Case(f"reads {' and '.join(names)}", partial(problem, reads(*names), num_layers=2)) for names in
      (("steps",), ("h",), ("c",), ("steps", "h", "c"))),
    Case("used twice", partial(problem, twice)),
    Case("in chunks", partial(problem, partial(in_chunks, cut=False))),
    Case("in chunks, cut", partial(problem, partial(in_chunks, cut=True))),
    Case("one by one", partial(problem, one_by_one)),
    Case("without the last steps", partial(problem, without_some)),
    Case("checkpointed", partial(problem, partial(checkpointed, reentrant=False), num_layers=2, dropout=0.4)),
    Case("checkpointed, reentrant", partial(problem, partial(checkpointed, reentrant=True), num_layers=2, dropout=0.4)),
    *(Case(f"cell, {names} of {'every step' if every else 'the last'}", partial(cells, *names, every=every))
      for names in ("h", "c", "hc") for every in (True, False)),
    Case("learned first states", learned_states),
    Case("weight norm", with_weight_norm),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", WAYS, ids=str)
def test_every_group_has_its_gradient_whichever_way_states_go(case: Case, dtype: torch.dtype) -> None:
    expected = group_loss_gradients(case, dtype)
    built = case.build(dtype)
    torch.manual_seed(SEED)
    before = Snapshot.of(built.model)
    tree = measure(built)
    assert Snapshot.of(built.model).changes_since(before) == []
    for name, whole in expected["all"].items():
        made_of = name.startswith("rnn.parametrizations")
        assert tree[name].attrs["rung"] == ("pulled back" if made_of else "factored"), (
            name,
            tree[name].attrs["reason"],
        )
        assert float(tree[name]["residual"]) < RESIDUAL[dtype], name
        for group, gradients in expected.items():
            allowed = TOLERANCE[dtype] * spectrum(whole)[0].item() + TOLERANCE[dtype] ** 2
            assert difference(tree[name], "gradient", group, spectrum(gradients[name])) <= allowed, (name, group)


# ---------------------------------------------------------------------- kinds, against a loop over steps


def unrolled(kind: str, layer: nn.RNNBase, x: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """States of every step, and of every step what the input and the state are multiplied to, before the gates."""
    w, v, b, d = (p.detach() for p in layer.parameters())
    h = c = x.new_zeros(len(x), HIDDEN)
    states, products = [h], []
    for step in x.unbind(1):
        at, inside = ((r @ m.T + bias).requires_grad_() for r, m, bias in ((step, w, b), (h, v, d)))
        products.append((at, inside))
        if kind == "lstm":
            i, f, g, o = (at + inside).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif kind == "gru":
            (r, z, n), (r2, z2, n2) = at.chunk(3, 1), inside.chunk(3, 1)
            update = (z + z2).sigmoid()
            h = (1 - update) * (n + (r + r2).sigmoid() * n2).tanh() + update * h
        else:
            h = (at + inside).tanh()
        states.append(h)
    return states, products


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_activations_and_adjoints_are_those_of_a_loop_over_steps(kind: str) -> None:
    built = BY_NAME[kind].build()
    states, products = unrolled(kind, built.model.rnn, built.inputs)
    for pair in products:
        for tensor in pair:
            tensor.retain_grad()
    built.loss_fn(built.model.head(torch.stack(states[1:], 1))).backward()
    inner, hidden = (torch.stack([pair[k].grad for pair in products], 1) for k in (0, 1))
    before = torch.stack(states[:-1], 1).detach()
    expected = {"ih": (built.inputs, inner), "hh": (before, hidden)}
    tree = measure(BY_NAME[kind].build())
    for group, mask in memberships(built.labels).items():
        for side, pair in expected.items():
            for what, rows in zip(("activation", "adjoint"), pair, strict=True):
                sigma = torch.linalg.svdvals(rows[mask].flatten(0, 1))
                assert difference(tree[f"rnn.weight_{side}_l0"], what, group, sigma) <= 1e-9 * sigma[0].item()
            sigma = torch.linalg.svdvals(pair[1][mask].flatten(0, 1))
            assert difference(tree[f"rnn.bias_{side}_l0"], "adjoint", group, sigma) <= 1e-9 * sigma[0].item()


# ---------------------------------------------------------------------- training


def trained(path: Path | None, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A network after four steps, recorded or not, and the random state it leaves."""
    torch.manual_seed(5)
    layer = nn.LSTM(FEATURES, HIDDEN, 2, dropout=0.4, bidirectional=True, batch_first=True)
    network = Apply(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=layer, head=nn.Linear(2 * HIDDEN, OUTPUT)).to(dtype)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    with gt.record(network, path) if path else nullcontext() as recorder:
        for _ in range(4):
            x = torch.randn(SAMPLES, TIME, FEATURES, dtype=dtype)
            with recorder.step(groups=["SZ", "HC", "SZ", "SZ", "HC", "HC", "HC"]) if recorder else nullcontext():
                network(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return network, torch.get_rng_state()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_training_is_bitwise_what_it_would_be_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    plain, drawn = trained(None, dtype)
    recorded, drawn_too = trained(tmp_path / "run.zarr", dtype)
    assert torch.equal(drawn, drawn_too)
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(one, other)
    tree = gt.open_run(tmp_path / "run.zarr").tree
    assert {tree[name].attrs["rung"] for name in tree.children} == {"factored"}
    assert float(tree["rnn.weight_hh_l0"]["residual"].max()) < RESIDUAL[dtype]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_under_autocast_rows_are_in_the_ops_own_precision(kind: type[nn.RNNBase]) -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.head(m.rnn(x)[0]).float()

    torch.manual_seed(2)
    network = Apply(forward, rnn=kind(FEATURES, HIDDEN, batch_first=True), head=nn.Linear(HIDDEN, OUTPUT))
    tree = gt.spectra(
        network, torch.randn(SAMPLES, TIME, FEATURES), lambda o: o.square().mean(), groups=[0, 1, 0, 1, 1, 0, 0]
    )
    for name in tree.children:
        assert tree[name].attrs["rung"] == "factored", (name, tree[name].attrs["reason"])
        assert float(tree[name]["residual"]) < 4 * torch.finfo(torch.bfloat16).eps
