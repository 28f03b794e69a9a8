"""The recurrent adapter keeps the contract for layers and cells of every kind, for one output and for all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradtrace_plugins.recurrent import RecurrentAdapter
from torch import Tensor

from gradtrace.calls import Adjoint, OpCall, Path, RowsCutError
from gradtrace.cases import adjoints_of, delivered, noted, outputs
from gradtrace.errors import AdapterError
from gradtrace.factors import Factors, OuterFactors
from gradtrace.testing import AdapterTests, OpCase, draw

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
N, T, I, H, P = 7, 5, 3, 2, 11  # noqa: E741  samples, steps, inputs, hidden, projected
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SIZES = (7, 5, 5, 2)  # of the steps of a packed batch
SEQUENCES = torch.cat([torch.arange(size) for size in SIZES])
ADAPTER = RecurrentAdapter()


def weights_of(kind: str, *, layers: int = 1, directions: int = 1, biased: bool = True, projected: bool = False) -> Any:
    """The weights as torch lists them, layer by layer and direction by direction."""
    out, found, rows = P if projected else H, [], GATES[kind] * H
    for place in range(layers * directions):
        shapes: list[tuple[int, ...]] = [(rows, I if place < directions else out * directions), (rows, out)]
        shapes += [(rows,), (rows,)] if biased else []
        shapes += [(out, H)] if projected else []
        found += [0.7 * draw(*shape, seed=10 * place + number) for number, shape in enumerate(shapes)]
    return found


def states_of(kind: str, *places: int, projected: bool = False) -> Any:
    hidden = draw(*places, P if projected else H, seed=3)
    return (hidden, draw(*places, H, seed=4)) if kind == "lstm" else hidden


def layer(
    kind: str,
    *settings: str,
    operand: int | tuple[int, ...] = 0,
    output: int = 0,
    layers: int = 1,
    dropout: float = 0.0,
    samples: int = N,
    steps: int = T,
) -> OpCase:
    """A call as torch's modules make it; `operand` numbers the weights, or is what follows the path of the states."""
    both, projected, biased = "both ways" in settings, "projected" in settings, "no bias" not in settings
    weights = weights_of(kind, layers=layers, directions=1 + both, biased=biased, projected=projected)
    first = states_of(kind, layers * (1 + both), samples, projected=projected)
    ends = 2 if kind == "lstm" else 1
    if "packed" in settings:
        data: tuple[Any, ...] = (draw(sum(SIZES), I), torch.tensor(SIZES))
        where: tuple[Any, ...] = (SEQUENCES[:, None], *[torch.arange(samples)[:, None]] * ends)
        rows, order = sum(SIZES), ()
    else:
        batch_first = "batch first" in settings
        data = (draw(*((samples, steps) if batch_first else (steps, samples)), I),)
        where, rows, order = (0 if batch_first else 1, *[1] * ends), samples * steps, (batch_first,)
    place = len(data) + 1
    path: Path = (place, operand) if isinstance(operand, int) else (place - 1, *operand)
    told = where[output]
    return OpCase(
        ", ".join([kind, *settings, f"{layers} layers, {samples} x {steps}, operand {operand}, output {output}"]),
        getattr(torch, kind),
        (*data, first, weights, biased, layers, dropout, bool(dropout), both, *order),
        operand=path,
        sample_axis=told if isinstance(told, int) else 0,
        owners=told if isinstance(told, Tensor) else None,
        output=output,
        rows=rows if isinstance(operand, int) else layers * (1 + both) * samples,
        together=where,
    )


def cell(kind: str, operand: int | tuple[int, ...] = 2, *, output: int = 0, biased: bool = True) -> OpCase:
    state, weights = states_of(kind, N), weights_of(kind, biased=biased)
    args = (draw(N, I), state, *weights)
    path: Path = (operand,) if isinstance(operand, int) else operand
    several = {"output": output, "together": (0, 0)} if kind == "lstm" else {}
    name = f"{kind} cell, operand {operand}, output {output}{'' if biased else ', no bias'}"
    return OpCase(name, getattr(torch, f"{kind}_cell"), args, operand=path, rows=N, **several)


def layers_of(kind: str) -> Iterator[OpCase]:
    yield from (layer(kind, operand=number) for number in range(4))
    yield layer(kind, "batch first", operand=1)
    yield layer(kind, operand=1, output=1)
    yield layer(kind, "no bias", operand=1)
    yield layer(kind, "both ways", operand=5)
    yield layer(kind, "both ways", operand=1, output=1)
    yield layer(kind, "batch first", operand=0, layers=3)
    yield layer(kind, "both ways", "batch first", operand=4, layers=2)
    yield layer(kind, operand=3, layers=3, dropout=0.4)
    yield layer(kind, "both ways", "batch first", operand=1, layers=2, dropout=0.4)
    yield layer(kind, "packed", operand=1)
    yield layer(kind, "packed", operand=0, output=1)
    yield layer(kind, "packed", "both ways", operand=5)
    yield layer(kind, "packed", "both ways", "no bias", operand=1, layers=2, dropout=0.4, output=1)
    yield layer(kind, operand=1, steps=1)
    yield layer(kind, "both ways", operand=5, samples=1)
    yield layer(kind, operand=(0,) if kind == "lstm" else (), layers=2)
    yield layer(kind, "packed", "both ways", operand=(0,) if kind == "lstm" else (), output=1)


def lstm_calls() -> Iterator[OpCase]:
    yield layer("lstm", operand=0, output=2)
    yield layer("lstm", "packed", "both ways", operand=5, output=2)
    yield layer("lstm", operand=(1,), output=2)
    yield from (layer("lstm", "projected", operand=number) for number in range(5))
    yield layer("lstm", "projected", operand=4, output=1)
    yield layer("lstm", "projected", operand=1, output=2)
    yield layer("lstm", "projected", "both ways", "batch first", operand=9, layers=2, dropout=0.4)
    yield layer("lstm", "projected", "packed", "both ways", "no bias", operand=2, layers=2)


def cells() -> Iterator[OpCase]:
    for kind in GATES:
        yield from (cell(kind, place) for place in range(2, 6))
        yield cell(kind, 3, biased=False)
        yield cell(kind, (1, 0) if kind == "lstm" else (1,))
    yield from (cell("lstm", place, output=1) for place in (2, 3))
    yield cell("lstm", (1, 1), output=1)
    names = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights_of("gru"), strict=True))
    yield OpCase("gru cell, by keyword", torch.gru_cell, (draw(N, I), draw(N, H)), names, ("w_hh",), rows=N)


class TestLstm(AdapterTests):
    adapter = ADAPTER

    def calls(self) -> list[OpCase]:
        return [*layers_of("lstm"), *lstm_calls()]


class TestGru(AdapterTests):
    adapter = ADAPTER

    def calls(self) -> list[OpCase]:
        return list(layers_of("gru"))


class TestRnn(AdapterTests):
    adapter = ADAPTER

    def calls(self) -> list[OpCase]:
        return [*layers_of("rnn_tanh"), *layers_of("rnn_relu")]


class TestCells(AdapterTests):
    adapter = ADAPTER

    def calls(self) -> list[OpCase]:
        return list(cells())


# ---------------------------------------------------------------------- what the kit finds out


class OneOutputAfterTheOther(RecurrentAdapter):
    """Adds rows for every output: right in sum, and wrong as rows."""

    def joint_factors(
        self, call: OpCall, weights: Sequence[Path], adjoints: Mapping[int, Adjoint]
    ) -> Mapping[Path, Factors]:
        each = [super(OneOutputAfterTheOther, self).joint_factors(call, weights, {k: a}) for k, a in adjoints.items()]
        return {path: _joined([one[path] for one in each]) for path in weights}


def _joined(parts: list[Any]) -> Factors:
    if not isinstance(parts[0], OuterFactors):
        return parts[0]
    fields = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("activation", "adjoint", "owners")}
    return replace(parts[0], **fields)


class FirstOutputAlone(RecurrentAdapter):
    def joint_factors(
        self, call: OpCall, weights: Sequence[Path], adjoints: Mapping[int, Adjoint]
    ) -> Mapping[Path, Factors]:
        first = min(adjoints)
        return super().joint_factors(call, weights, {first: adjoints[first]})


class AnotherMask(RecurrentAdapter):
    def note(self, call: OpCall) -> Any:
        torch.rand(3)
        return super().note(call)


@pytest.mark.parametrize(
    ("adapter", "case", "message"),
    [
        (OneOutputAfterTheOther(), layer("gru"), "for all outputs together, 35 for one"),
        (FirstOutputAlone(), layer("gru"), "all outputs together, the weight at"),
        (ADAPTER, replace(layer("gru"), together=None), "`together` has to say where samples lie"),
        (AnotherMask(), layer("gru", layers=2, dropout=0.5), "all outputs together, the weight at"),
    ],
    ids=["rows per output", "an output left out", "nothing told", "another mask"],
)
def test_the_kit_finds_out_what_is_wrong_with_outputs_taken_together(
    adapter: RecurrentAdapter, case: OpCase, message: str
) -> None:
    suite = type("Some", (AdapterTests,), {"adapter": adapter, "calls": lambda self: [case]})()
    with pytest.raises(AssertionError, match=message):
        suite.test_outputs_are_taken_together(case)


# ---------------------------------------------------------------------- what is claimed, and what is refused


def test_states_and_weights_are_claimed_and_data_is_not() -> None:
    case = layer("lstm", "both ways")
    claimed = [path for path, _ in _paths(case) if ADAPTER.claims(replace(case.call(), operand=path))]
    assert claimed == [(1, 0), (1, 1), *((2, number) for number in range(8))]


def test_what_drops_out_on_another_device_is_left_alone() -> None:
    """Its masks are the kernel's own; without dropout there is nothing that could not be had."""
    for dropout, expected in ((0.4, False), (0.0, True)):
        args = layer("gru", layers=2, dropout=dropout).args
        moved = tuple(_to_meta(value) for value in args)
        assert ADAPTER.claims(OpCall(torch.gru, moved, {}, (2, 0))) == expected
    assert not ADAPTER.claims(OpCall(torch.gru, args[:6], {}, (2, 0))), "too few arguments"


def test_a_call_whose_masks_cannot_be_drawn_again_is_an_error() -> None:
    (call, _) = layer("gru", layers=2, dropout=0.4).calls_with_owners()
    assert call.output is not None
    with pytest.raises(AdapterError, match="`gru` drops out values between its layers"):
        ADAPTER.factors(call, draw(*call.output.shape))


@pytest.mark.parametrize(
    "owners",
    [torch.arange(T)[:, None, None], torch.arange(N)[None, :, None] + torch.eye(T, N)[..., None].long()],
    ids=["of a step", "of some step"],
)
def test_an_owner_that_changes_along_time_is_refused(owners: Tensor) -> None:
    (call, _) = layer("gru").calls_with_owners()
    with pytest.raises(RowsCutError):
        ADAPTER.factors(replace(call, owners=owners), draw(T, N, H))


def test_an_owner_that_changes_along_features_or_outputs_is_refused() -> None:
    (call, _) = layer("gru").calls_with_owners()
    with pytest.raises(RowsCutError):
        ADAPTER.factors(replace(call, owners=torch.arange(H)[None, None]), draw(T, N, H))
    own, other = torch.arange(N)[None, :, None], torch.arange(N).flip(0)[None, :, None]
    adjoints = adjoints_of([draw(T, N, H), draw(1, N, H)], [own, other])
    with pytest.raises(RowsCutError):
        ADAPTER.joint_factors(call, [call.operand], adjoints)


def test_what_no_output_knows_of_a_sequence_another_one_tells() -> None:
    """The loss sees some steps of some sequences, and the last state of others."""
    (call, _) = layer("gru", operand=1).calls_with_owners()
    seen = torch.rand(T, N, 1, generator=torch.Generator().manual_seed(1)) > 0.7
    own = torch.arange(N)[None, :, None]
    values = [draw(T, N, H) * seen, draw(1, N, H) * ~seen.any(0)]
    partly = [torch.where(seen, own, -1), torch.where(seen.any(0), -1, own)]
    for owners in ([own, own], partly):
        rows = ADAPTER.joint_factors(call, [call.operand], adjoints_of(values, owners))[call.operand].rows()
        assert rows is not None
        assert torch.equal(rows.owners, torch.arange(N).repeat(T))


# ---------------------------------------------------------------------- in the dtypes that train


DEEP = [
    layer(kind, *settings, layers=2, dropout=dropout)
    for kind in GATES
    for settings in ((), ("both ways", "batch first"), ("packed", "both ways"))
    for dropout in (0.0, 0.4)
]


@pytest.mark.parametrize("case", [*DEEP, layer("lstm", "projected"), cell("lstm"), cell("gru")], ids=lambda c: c.name)
def test_in_single_precision_the_kernels_gradient_is_met(case: OpCase) -> None:
    """There the layers of an LSTM are kernels of oneDNN, and masks are drawn for other numbers."""
    call, weights, drawn = single(case)
    adjoints, gradients = delivered(call, weights, drawn)
    nobody = [torch.full((1,) * d.dim(), -1) for d in drawn]
    found = ADAPTER.joint_factors(call, weights, adjoints_of(adjoints, nobody))
    for path, expected in zip(weights, gradients, strict=True):
        assert torch.linalg.vector_norm(found[path].densify() - expected) <= 2e-6 * found[path].scale()


def single(case: OpCase) -> tuple[OpCall, list[Path], list[Tensor]]:
    """The call in float32, its weights' paths, and a cotangent for each output."""
    args = tuple(_as(value, torch.float32) for value in case.args)
    call = noted(replace(case.call(), args=args), ADAPTER)
    weights = [path for path, _ in _paths(replace(case, args=args)) if ADAPTER.claims(replace(call, operand=path))]
    return call, weights, [draw(*r.shape, dtype=torch.float32, seed=6) for r in outputs(call)]


@pytest.mark.parametrize("large", [(150, 32, 64), (33, 17, 129)], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_masks_of_any_size_are_drawn_again(large: tuple[int, int, int], packed: bool) -> None:
    """Long draws are shared among threads, and must not depend on it."""
    steps, samples, width = large
    network = torch.nn.LSTM(I, width, 3, dropout=0.5, bidirectional=True)
    sizes = torch.arange(steps, 0, -1).clamp(max=samples)
    data = (draw(int(sizes.sum()), I, dtype=torch.float32), sizes) if packed else (
        draw(steps, samples, I, dtype=torch.float32),
    )  # fmt: skip
    first = [torch.zeros(6, samples, width)] * 2
    order = () if packed else (False,)
    flat = [w.detach() for w in network._flat_weights]
    call = OpCall(torch.lstm, (*data, tuple(first), flat, True, 3, 0.5, True, True, *order), {}, (len(data) + 1, 0))
    call = noted(call, ADAPTER)
    cotangents = [draw(*r.shape, dtype=torch.float32) for r in outputs(call)]
    adjoints, (expected,) = delivered(call, [call.operand], cotangents)
    nobody = [torch.full((1,) * c.dim(), -1) for c in cotangents]
    found = ADAPTER.joint_factors(call, [call.operand], adjoints_of(adjoints, nobody))[call.operand]
    assert torch.linalg.vector_norm(found.densify() - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


def _paths(case: OpCase) -> list[tuple[Path, Tensor]]:
    from gradtrace.arguments import paths

    return list(paths(case.args, case.kwargs))


def _to_meta(value: Any) -> Any:
    return _each(value, lambda tensor: tensor.to("meta"))


def _as(value: Any, dtype: torch.dtype) -> Any:
    return _each(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor in it replaced."""
    if isinstance(value, (tuple, list)):
        return type(value)(_each(item, function) for item in value)
    return function(value) if isinstance(value, Tensor) else value
