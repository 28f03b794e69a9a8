"""What one recorded step is made of, in numpy: the hand-over between measuring (torch) and storing (zarr)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KINDS = ("gradient", "activation", "adjoint")


class Status:
    """Why a value is there, or is NaN. One uint8 per step, parameter, group and kind."""

    GROUP_ABSENT = 0  # no sample of the group in this step; also the fill value of rows never written
    MEASURED = 1
    KIND_ABSENT = 2  # this parameter does not have this kind (see the parameter's attributes for why)
    NOT_FINITE = 3  # NaN or infinity in the factors or the gradient
    NOT_CONVERGED = 4  # the decomposition failed on finite values
    TOO_FEW = 5  # the group has too few samples to be shown, or would tell of one that has (since 1.1)

    NAMES = ("group absent", "measured", "kind absent", "not finite", "not converged", "too few samples")


@dataclass(frozen=True)
class ParameterInfo:
    """What does not change from step to step about one traced parameter. `attrs` is JSON-serialisable."""

    name: str
    shape: tuple[int, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterRow:
    """One parameter in one step.

    spectra: kind -> (groups, components), singular values, descending, NaN-padded.
    metrics: kind -> metric name -> (groups,), from the whole spectrum.
    status: kind -> (groups,) uint8, see `Status`.
    inner_product: (groups, groups), of the groups' gradients; NaN where a group is absent.
    """

    spectra: Mapping[str, np.ndarray]
    metrics: Mapping[str, Mapping[str, np.ndarray]]
    status: Mapping[str, np.ndarray]
    inner_product: np.ndarray
    residual: float = float("nan")
    owner_residual: float = float("nan")


@dataclass(frozen=True)
class StepRow:
    """One recorded optimizer step (or one probe): every array is ordered as `groups`."""

    step: int
    groups: tuple[str, ...]
    n_samples: np.ndarray  # (groups,) int64
    parameters: Mapping[str, ParameterRow]
    loss: float = float("nan")
    epoch: float = float("nan")
    scalars: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)  # seconds, by part of the work
