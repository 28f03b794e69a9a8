"""Weights applied element by element: shifts (biases, position tables), scales (layer scale), and those of norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradtrace.calls import OpCall, cast_as_used, is_dense
from gradtrace.factors import ElementFactors, Factors

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SUB = {"sub", "subtract", "sub_", "__sub__", "__isub__"}
_MUL = {"mul", "multiply", "__mul__", "__rmul__"}
_PRODUCTS = {"addmm", "addmv", "baddbmm"}
_NORMS = {"layer_norm": 2, "group_norm": 2, "rms_norm": 2, "batch_norm": 3, "instance_norm": 3}
_BIASED = {"linear": 2, "conv1d": 2, "conv2d": 2, "conv3d": 2, "conv_transpose1d": 2, "conv_transpose2d": 2,
           "conv_transpose3d": 2, "bilinear": 3}  # fmt: skip
_SPATIAL = {"1": 1, "2": 2, "3": 3}


class ElementwiseAdapter:
    """Factors of shifts and scales, the biases of products and convolutions, and the weights of norms."""

    name = "elementwise"
    ops = (
        "add, sub, mul, biases of linear, bilinear, conv, addmm, addmv and baddbmm, "
        "scale and shift of layer, group, batch, instance and RMS norm"
    )

    def claims(self, call: OpCall) -> bool:
        if call.name in _ADD | _SUB | _MUL:
            return _is_sum_or_product(call)
        if not is_dense(call.argument(0, "input1" if call.name == "bilinear" else "input")):
            return False
        if call.name in _NORMS:
            return _is_scale(call) or _is_shift(call)
        if call.name in _PRODUCTS:
            return call.is_operand(0, "input") and _is_number(call.kwargs.get("beta", 1))
        return call.name in _BIASED and call.is_operand(_BIASED[call.name], "bias")

    def factors(self, call: OpCall, adjoint: Tensor) -> Factors:
        """The adjoint, times what the weight multiplied (nothing for a shift), broadcast as the op broadcast it."""
        assert call.owners is not None
        if call.name in _NORMS or call.name in _BIASED:
            return _along_channel(call, adjoint)
        if call.name in _MUL:
            activation = cast_as_used(_other(call), adjoint)
            return ElementFactors(activation, adjoint, call.owners, tuple(call.weight.shape))
        scale = _scale(call)
        adjoint = adjoint * scale.conjugate() if scale != 1 else adjoint
        if adjoint.is_complex() and not call.weight.is_complex():
            adjoint = adjoint.real
        return ElementFactors(None, adjoint, call.owners, tuple(call.weight.shape))


def _is_sum_or_product(call: OpCall) -> bool:
    if not (call.is_operand(0, "input") or call.is_operand(1, "other")):
        return False
    other = _other(call)
    if call.name in _MUL:
        return is_dense(other) and (call.weight.is_complex() or not other.is_complex())
    return is_dense(other) and _is_number(call.kwargs.get("alpha", 1))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, complex))


def _other(call: OpCall) -> Any:
    return call.argument(1, "other") if call.is_operand(0, "input") else call.argument(0, "input")


def _scale(call: OpCall) -> complex:
    """What a sum multiplies the weight by."""
    if call.name in _PRODUCTS:
        return call.kwargs.get("beta", 1)
    if call.is_operand(0, "input"):
        return 1
    return call.kwargs.get("alpha", 1) * (-1 if call.name in _SUB else 1)


def _is_scale(call: OpCall) -> bool:
    return call.is_operand(_NORMS[call.name], "weight")


def _is_shift(call: OpCall) -> bool:
    return call.name != "rms_norm" and call.is_operand(_NORMS[call.name] + 1, "bias")


def _along_channel(call: OpCall, adjoint: Tensor) -> ElementFactors:
    """Factors of a weight that lies along the channel axis, moved last so that it broadcasts."""
    axis = _channel_axis(call, adjoint)
    activation = None
    if call.name in _NORMS and _is_scale(call):
        activation = _normalised(call, adjoint)
    owners = call.owners
    assert owners is not None
    if axis is not None:
        adjoint, owners = adjoint.movedim(axis, -1), owners.movedim(axis, -1)
        activation = None if activation is None else activation.movedim(axis, -1)
    return ElementFactors(activation, adjoint, owners, tuple(call.weight.shape))


def _channel_axis(call: OpCall, adjoint: Tensor) -> int | None:
    """The output's channel axis; None where the weight already broadcasts from the last axes."""
    if call.name in ("layer_norm", "rms_norm", "linear", "bilinear"):
        return None
    if call.name.startswith("conv"):
        return adjoint.dim() - 1 - _SPATIAL[call.name[-2]]
    return 1


@torch.no_grad()
def _normalised(call: OpCall, adjoint: Tensor) -> Tensor:
    """The norm's output before scale and shift, from the same input and statistics."""
    x = cast_as_used(call.argument(0, "input"), adjoint)
    if call.name == "layer_norm":
        return F.layer_norm(x, call.argument(1, "normalized_shape"), eps=call.argument(4, "eps", 1e-5))
    if call.name == "rms_norm":
        return F.rms_norm(x, call.argument(1, "normalized_shape"), eps=call.argument(3, "eps"))
    if call.name == "group_norm":
        return F.group_norm(x, call.argument(1, "num_groups"), eps=call.argument(4, "eps", 1e-5))
    mean, variance = call.argument(1, "running_mean"), call.argument(2, "running_var")
    own = call.argument(5, "training" if call.name == "batch_norm" else "use_input_stats", call.name != "batch_norm")
    eps = call.argument(7, "eps", 1e-5)
    if call.name == "instance_norm":
        return F.instance_norm(x, None if own else mean, None if own else variance, use_input_stats=own, eps=eps)
    return F.batch_norm(x, None if own else mean, None if own else variance, training=own, eps=eps)
