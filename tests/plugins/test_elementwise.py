"""The elementwise adapter keeps the contract for every shift and scale it claims, and leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradtrace_plugins.elementwise import ElementwiseAdapter
from torch import Tensor

from gradtrace.calls import OpCall
from gradtrace.factors import ElementFactors
from gradtrace.testing import AdapterTests, OpCase, draw, reference_gradient

C = torch.complex128
N, T, I, O = 7, 5, 3, 2  # noqa: E741  samples, time, channels, outputs
BROADCAST: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # data, weight
    "features": ((N, T, I), (I,)),
    "features of a matrix": ((N, I), (I,)),
    "the whole sample": ((N, T, I), (T, I)),
    "the whole sample, with a sample axis": ((N, T, I), (1, T, I)),
    "positions": ((N, T, I), (T, 1)),
    "channels": ((N, I, T, O), (I, 1, 1)),
    "outer axes": ((N, I, T, O), (1, I, 1, O)),
    "a number": ((N, T), ()),
    "one": ((N, T), (1,)),
    "a weight per sample": ((N, T), (N, 1)),
    "a weight per entry": ((N, T), (N, T)),
    "data broadcast along positions": ((N, 1, I), (T, I)),
    "data broadcast along features": ((N, 1), (I,)),
    "data broadcast along all but samples": ((N, 1, 1), (1, T, I)),
    "no samples": ((0, I), (I,)),
    "no positions": ((N, 0, I), (I,)),
}


def sum_calls() -> Iterator[OpCase]:
    functions: dict[str, Any] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}
    for name, function in functions.items():
        for kind, (data, weight) in BROADCAST.items():
            x, w = draw(*data), draw(*weight, seed=1)
            yield OpCase(f"{name}, {kind}", function, (x, w))
            yield OpCase(f"{name}, {kind}, weight first", function, (w, x), operand=(0,))
    x, w = draw(N, T, I), draw(I)
    operators = ["add", "sub", "subtract", "mul", "multiply", "__add__", "__radd__", "__sub__", "__mul__", "__rmul__"]
    for name in operators:
        yield OpCase(f"method {name}", getattr(torch.Tensor, name), (x, w))
        yield OpCase(f"method {name}, weight first", getattr(torch.Tensor, name), (w, x), operand=(0,))
    for name in ("add_", "sub_", "__iadd__", "__isub__"):
        yield OpCase(f"method {name}", getattr(torch.Tensor, name), (x, w))
        yield OpCase(f"method {name}, weight first", getattr(torch.Tensor, name), (draw(N, T), draw(T)), operand=(0,))
    for function in (functions["add"], functions["sub"]):
        yield OpCase(f"{function.__name__}, alpha", function, (x, w), {"alpha": 0.3})
        yield OpCase(f"{function.__name__}, alpha, weight first", function, (w, x), {"alpha": 0.3}, (0,))
        yield OpCase(f"{function.__name__}, complex alpha", function, (x.to(C), w.to(C)), {"alpha": 1 + 2j})
        yield OpCase(f"{function.__name__}, a real shift of complex data", function, (draw(N, T, I, dtype=C), w))
        yield OpCase(f"{function.__name__}, a complex shift of real data", function, (x, draw(I, dtype=C)))
    yield OpCase("add, by keyword", torch.add, (x,), {"other": w}, ("other",))
    yield OpCase("add, all by keyword", torch.add, (), {"input": x, "other": w}, ("other",))
    yield OpCase("add, all by keyword, weight first", torch.add, (), {"input": w, "other": x}, ("input",))
    yield OpCase("add, samples last", torch.add, (draw(T, I, N), draw(I, 1)), sample_axis=2)
    yield OpCase("add, one number", torch.add, (draw(), draw(seed=1)), sample_axis=None)
    yield OpCase("add, whole numbers", torch.add, (torch.arange(N * I).reshape(N, I), w))
    yield OpCase("mul, one number", torch.mul, (draw(), draw(seed=1)), sample_axis=None)
    yield OpCase("mul, one sample", torch.mul, (draw(I), draw(I, seed=1)), sample_axis=None)
    yield OpCase("mul, by keyword", torch.mul, (x,), {"other": w}, ("other",))
    yield OpCase("mul, complex", torch.mul, (draw(N, T, I, dtype=C), draw(I, dtype=C)))
    yield OpCase("mul, a complex scale of real data", torch.mul, (x, draw(I, dtype=C)))
    yield OpCase("mul, a mask", torch.mul, (x > 0, w))
    yield OpCase("mul, whole numbers", torch.mul, (torch.arange(N * I).reshape(N, I), w))
    routed = torch.randperm(N * T, generator=torch.Generator().manual_seed(0)).reshape(N, T, 1) % 4 - 1
    yield OpCase("mul, an owner per position", torch.mul, (x, w), owners=routed)
    entries = torch.arange(N * T * I).reshape(N, T, I) % 4 - 1
    yield OpCase("mul, an owner per entry", torch.mul, (x, w), owners=entries)


def bias_calls() -> Iterator[OpCase]:
    for axes in ((I,), (N, I), (N, T, I)):
        sample = 0 if len(axes) > 1 else None
        yield OpCase(f"linear {axes}", F.linear, (draw(*axes), draw(O, I), draw(O)), operand=(2,), sample_axis=sample)
    yield OpCase("linear, by keyword", F.linear, (draw(N, I), draw(O, I)), {"bias": draw(O)}, ("bias",))
    plain: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
    turned: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    for transposed, functions in ((False, plain), (True, turned)):
        for dims, function in enumerate(functions, start=1):
            kernel = (2,) * dims
            weight = draw(I, O, *kernel) if transposed else draw(O, I, *kernel)
            size = (5, 3, 2)[:dims]
            name = function.__name__
            yield OpCase(name, function, (draw(N, I, *size), weight, draw(O)), operand=(2,))
            yield OpCase(f"{name}, one sample", function, (draw(I, *size), weight, draw(O)), {}, (2,), sample_axis=None)
            options = {"stride": 2, "padding": 1, "bias": draw(O)}
            yield OpCase(f"{name}, by keyword", function, (draw(N, I, *size), weight), options, ("bias",))
    complex_args = (draw(N, I, T, dtype=C), draw(O, I, 2, dtype=C), draw(O, dtype=C))
    yield OpCase("conv1d, complex", F.conv1d, complex_args, operand=(2,))


def added_calls() -> Iterator[OpCase]:
    shape: tuple[int, ...]
    x, w, scaled = draw(N, I), draw(I, O), {"beta": -2.5, "alpha": 3}
    for shape in ((O,), (1, O), (N, O), (N, 1), (1,), ()):
        yield OpCase(f"addmm {shape}", torch.addmm, (draw(*shape), x, w), operand=(0,))
    yield OpCase("addmm, scaled", torch.addmm, (draw(O), x, w), scaled, (0,))
    yield OpCase("addmm, beta of zero", torch.addmm, (draw(O), x, w), {"beta": 0}, (0,))
    complex_args = (draw(O, dtype=C), x.to(C), w.to(C))
    yield OpCase("addmm, complex beta", torch.addmm, complex_args, {"beta": 1 - 2j}, (0,))
    yield OpCase("addmm, by keyword", torch.addmm, (), {"input": draw(O), "mat1": x, "mat2": w}, ("input",))
    yield OpCase("method addmm", torch.Tensor.addmm, (draw(N, O), x, w), scaled, (0,))
    for shape in ((N,), (1,), ()):
        yield OpCase(f"addmv {shape}", torch.addmv, (draw(*shape), x, draw(I)), scaled, (0,))
    for shape in ((O,), (T, 1, O), (T, N, O), (N, 1)):
        args = (draw(*shape), draw(T, N, I), draw(T, I, O))
        yield OpCase(f"baddbmm {shape}", torch.baddbmm, args, scaled, (0,), sample_axis=1)


def both(name: str, function: Any, args: tuple[Any, ...], places: dict[str, int], **options: Any) -> Iterator[OpCase]:
    """Scale and shift of a norm, by position and by keyword."""
    first = min(places.values())
    for part, place in places.items():
        yield OpCase(f"{name}, {part}", function, args, options, (place,))
    tail = args[max(places.values()) + 1 :]
    if not tail:
        named = {**dict(zip(places, args[first:], strict=True)), **options}
        for part in places:
            yield OpCase(f"{name}, {part} by keyword", function, args[:first], named, (part,))


def norm_calls() -> Iterator[OpCase]:
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    early, late = {"weight": 2, "bias": 3}, {"weight": 3, "bias": 4}
    wide = {"eps": 0.3}
    for shape in ((I,), (T, I)):
        args = (draw(N, T, I), shape, draw(*shape), draw(*shape, seed=1))
        yield from both(f"layer norm {shape}", F.layer_norm, args, early)
        yield from both(f"layer norm {shape}, eps", F.layer_norm, args, early, **wide)
        yield from both(f"RMS norm {shape}", F.rms_norm, args[:3], {"weight": 2})
        yield from both(f"RMS norm {shape}, eps", F.rms_norm, args[:3], {"weight": 2}, **wide)
    yield from both("layer norm, scale alone", F.layer_norm, (draw(N, I), (I,), draw(I)), {"weight": 2})
    yield from both("layer norm, eps by position", F.layer_norm, (draw(N, I), (I,), draw(I), draw(I), 0.3), early)
    for shape in ((N, 6), (N, 6, T), (N, 6, T, 2)):
        args = (draw(*shape), 2, draw(6), draw(6, seed=1))
        yield from both(f"group norm {shape}", F.group_norm, args, early)
        yield from both(f"group norm {shape}, eps", F.group_norm, args, early, **wide)
    mean, variance = draw(I), draw(I).square() + 0.5
    for shape in ((N, I), (N, I, T), (N, I, T, 2), (N, I, T, 2, 2)):
        args = (draw(*shape), mean, variance, draw(I, seed=1), draw(I, seed=2))
        yield from both(f"batch norm {shape}, evaluating", F.batch_norm, args, late)
        yield from both(f"batch norm {shape}, training", F.batch_norm, args, late, training=True)
        yield from both(f"batch norm {shape}, eps", F.batch_norm, args, late, eps=0.3)
        if len(shape) > 2:
            yield from both(f"instance norm {shape}", F.instance_norm, args, late)
            yield from both(f"instance norm {shape}, evaluating", F.instance_norm, args, late, use_input_stats=False)
            yield from both(f"instance norm {shape}, eps", F.instance_norm, args, late, eps=0.3)
    bare = (draw(N, I, T), None, None, draw(I, seed=1), draw(I, seed=2))
    yield from both("batch norm, nothing running", F.batch_norm, bare, late, training=True)
    yield from both("batch norm, by position", F.batch_norm, (*bare, True, 0.1, 0.3), late)
    yield from both("instance norm, nothing running", F.instance_norm, bare, late)
    yield from both("instance norm, by position", F.instance_norm, (*bare, True, 0.1, 0.3), late)


class TestElementwise(AdapterTests):
    adapter = ElementwiseAdapter()

    def calls(self) -> list[OpCase]:
        return [*sum_calls(), *bias_calls(), *added_calls(), *norm_calls()]


x, w = draw(N, I), draw(I)


@pytest.mark.parametrize(
    "call",
    [
        OpCall(torch.mul, (draw(N, I, dtype=C), w)),
        OpCall(torch.mul, (x.to_sparse(), draw(N, I, seed=1))),
        OpCall(torch.add, (w, x.to_sparse()), operand=(0,)),
        OpCall(torch.add, (x, w), {"alpha": torch.tensor(2.0)}),
        OpCall(torch.add, (x, 2.0, w), operand=(2,)),
        OpCall(torch.Tensor.mul_, (x, w)),
        OpCall(torch.div, (x, w)),
        OpCall(torch.rsub, (x, w)),
        OpCall(torch.addcmul, (x, x, w), operand=(2,)),
        OpCall(torch.addmm, (2.0, draw(O), x, draw(I, O))),
        OpCall(torch.addmm, (draw(O), x, draw(I, O)), {"beta": torch.tensor(2.0)}, (0,)),
        OpCall(F.batch_norm, (x, w, draw(I)), {"weight": w, "training": True}),
        OpCall(torch.batch_norm, (x, w, draw(I), None, None, True, 0.1, 1e-5, False)),
        OpCall(F.rms_norm, (x, (I,), w, 0.1), operand=(1,)),
        OpCall(F.linear, (x, draw(O, I), draw(O))),
    ],
    ids=lambda call: call.name,
)
def test_what_is_neither_shift_nor_scale_is_left_alone(call: OpCall) -> None:
    assert not ElementwiseAdapter().claims(call)


def test_a_penalty_on_a_weight_is_one_row_of_nobodys() -> None:
    factors = ElementFactors(None, torch.tensor(0.3), torch.tensor(-1), ())
    rows = factors.rows()
    assert rows is not None
    assert rows.adjoint.shape == (1, 1)
    assert rows.owners.tolist() == [-1]
    assert factors.by_cell(torch.tensor([4, 5])) == {5: torch.tensor(0.3)}


def test_under_autocast_a_norm_is_taken_in_the_ops_own_precision() -> None:
    """Low-precision data, normalised in float32."""
    x, w = draw(N, T, I, dtype=torch.float32).bfloat16(), draw(I, dtype=torch.float32)

    def cast(x: Tensor, shape: tuple[int, ...], w: Tensor) -> Tensor:
        return F.layer_norm(x.float(), shape, w)

    call = OpCall(F.layer_norm, (x, (I,), w), operand=(2,), owners=torch.arange(N).reshape(N, 1, 1))
    adjoint = draw(N, T, I, dtype=torch.float32)
    expected = reference_gradient(OpCall(cast, call.args, operand=(2,)), adjoint)
    assert ElementwiseAdapter().factors(call, adjoint).densify() == pytest.approx(expected, rel=1e-5)
