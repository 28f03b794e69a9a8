"""Convolutions in one to three dimensions, transposed ones, and the normalisations that go with them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import OUTPUT, SAMPLES, Apply, Case, Problem, case

SIZES = (13, 11, 5)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def images(dims: int, channels: int = 2) -> Tensor:
    return torch.randn(SAMPLES, channels, *SIZES[:dims])


def pooled_head(channels: int) -> nn.Module:
    return Apply(lambda m, x: m.readout(x.flatten(2).mean(2)), readout=nn.Linear(channels, OUTPUT))


def _plain(dims: int) -> Problem:
    convolve = CONV[dims]
    return Problem(
        nn.Sequential(
            convolve(2, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True), convolve(6, 4, 2, groups=2), pooled_head(4)
        ),
        images(dims),
    )


def _dilated(dims: int) -> Problem:
    convolve = CONV[dims]
    return Problem(nn.Sequential(convolve(2, 3, 2, dilation=2, bias=False), nn.Tanh(), convolve(3, 5, 1)), images(dims))


def _depthwise(dims: int) -> Problem:
    convolve = CONV[dims]
    return Problem(nn.Sequential(convolve(2, 4, 3, groups=2, padding=1), nn.GELU(), pooled_head(4)), images(dims))


def _padded(mode: str) -> Problem:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), nn.Tanh(), pooled_head(3))
    return Problem(model, images(2))


def _same(dims: int) -> Problem:
    return Problem(
        nn.Sequential(CONV[dims](2, 3, 3, dilation=2, padding="same"), nn.Tanh(), pooled_head(3)), images(dims)
    )


def _transposed(dims: int, **settings: Any) -> Problem:
    first = CONV[dims](2, 4, 3, stride=2)
    return Problem(nn.Sequential(first, nn.Tanh(), TRANSPOSED[dims](4, 6, 3, **settings), pooled_head(6)), images(dims))


def _batch_norm(dims: int) -> Problem:
    layers = (CONV[dims](2, 5, 3, padding=1), BATCH_NORM[dims](5), nn.ReLU(inplace=True), pooled_head(5))
    return Problem(nn.Sequential(*layers), images(dims))


def _norm(make: Any) -> Problem:
    return Problem(
        nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), make(), nn.ReLU(inplace=True), pooled_head(6)), images(2)
    )


DIMS = (1, 2, 3)
UPSAMPLING = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
NORMS = {
    "group_norm": lambda: nn.GroupNorm(3, 6),
    "instance_norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "layer_norm_images": lambda: nn.LayerNorm([6, 11, 9]),
    "batch_norm_without_statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "batch_norm_evaluated": lambda: nn.BatchNorm2d(6).eval(),
}
FAMILY = [
    *(Case(f"conv{d}d", partial(_plain, d)) for d in DIMS),
    *(Case(f"conv{d}d_dilated", partial(_dilated, d)) for d in DIMS),
    *(Case(f"conv{d}d_depthwise", partial(_depthwise, d)) for d in DIMS),
    *(Case(f"conv{d}d_same", partial(_same, d)) for d in (1, 2)),
    *(Case(f"conv2d_{mode}", partial(_padded, mode)) for mode in ("reflect", "circular", "replicate")),
    *(Case(f"transposed{d}d", partial(_transposed, d)) for d in DIMS),
    *(Case(f"transposed{d}d_upsampling", partial(_transposed, d, **UPSAMPLING)) for d in DIMS),
    *(Case(f"batch_norm{d}d", partial(_batch_norm, d), coupled=True) for d in DIMS),
    *(
        Case(name, partial(_norm, make), coupled=name == "batch_norm_without_statistics")
        for name, make in NORMS.items()
    ),
]


@case(coupled=True)
def residual_network() -> Problem:
    """Two blocks with skips, a strided projection, batch norm in training and in-place activations."""

    def block(inner: int, outer: int, stride: int) -> nn.Module:
        def forward(m: Apply, x: Tensor) -> Tensor:
            h = F.relu(m.norm1(m.conv1(x)), inplace=True)
            return F.relu(m.norm2(m.conv2(h)).add_(m.skip(x)), inplace=True)

        return Apply(
            forward,
            conv1=nn.Conv2d(inner, outer, 3, stride, 1, bias=False),
            norm1=nn.BatchNorm2d(outer),
            conv2=nn.Conv2d(outer, outer, 3, 1, 1),
            norm2=nn.BatchNorm2d(outer),
            skip=nn.Conv2d(inner, outer, 1, stride),
        )

    return Problem(nn.Sequential(block(2, 3, 1), block(3, 5, 2), pooled_head(5)), images(2))


@case(coupled=True)
def batch_norm_mlp() -> Problem:
    model = nn.Sequential(nn.Linear(11, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, OUTPUT))
    return Problem(model, torch.randn(SAMPLES, 11))


@case(coupled=True, opaque=True)
def centred_batch() -> Problem:
    """The batch's mean is subtracted by hand: coupled, with no batch norm to recognise, so rows stay mixed."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        return m.last(h - h.mean(0))

    return Problem(Apply(forward, first=nn.Linear(11, 13), last=nn.Linear(13, OUTPUT)), torch.randn(SAMPLES, 11))


@case()
def frames_folded_into_batch() -> Problem:
    """Video: a 2-d network on every frame, frames folded into the batch, mean over frames."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        frames = m.conv(x.transpose(1, 2).flatten(0, 1)).relu_()
        return m.head(frames.unflatten(0, (-1, 5)).mean(1))

    return Problem(Apply(forward, conv=nn.Conv2d(2, 3, 3), head=pooled_head(3)), torch.randn(SAMPLES, 2, 5, 11, 13))


@case()
def unfolded_convolution() -> Problem:
    """A convolution written as unfold and matmul."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return torch.tanh(m.weight @ F.unfold(x, 3, stride=2)).mean(2)

    return Problem(Apply(forward, weight=nn.Parameter(0.3 * torch.randn(5, 18))), images(2))
