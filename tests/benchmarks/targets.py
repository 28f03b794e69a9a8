"""The ratios to reach, with two groups and the whole, in float32 training."""

from __future__ import annotations

from collections.abc import Mapping

from tests.benchmarks.models import LARGE, MODELS

Targets = Mapping[tuple[str, str], float]
"""(model, way) -> the ratio to the untraced step that is aimed at, at most."""

_ORDER = ("mlp", "lstm", "transformer", "cnn2d", "cnn3d", "gpt")
_ON_CPU = {
    "gradient": (1.5, 1.8, 1.25, 1.4, 1.1, 1.25),
    "all kinds": (1.8, 2.0, 1.6, 1.8, 1.3, 1.6),
    "every=10": (1.10, 1.12, 1.07, 1.08, 1.05, 1.07),
    "unrecorded": (1.01,) * 6,
}
_ON_GPU = {"gradient": 1.2, "all kinds": 1.2, "every=10": 1.03, "unrecorded": 1.01}


def targets(device: str) -> Targets:
    """What is aimed at on two cores, or on a GPU."""
    if device == "cuda":
        return {(model, way): most for model in (*MODELS, *LARGE) for way, most in _ON_GPU.items()}
    return {(model, way): most for way, row in _ON_CPU.items() for model, most in zip(_ORDER, row, strict=True)}
