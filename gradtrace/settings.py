"""What a traced step, or a whole recording, is asked to measure, and the samples it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradtrace.cadence import Cadence
from gradtrace.groups import Labels


@dataclass(frozen=True)
class Settings:
    """What to measure, of what a session is made for."""

    kinds: tuple[str, ...]
    sample_dim: int | None = None
    coupling: str = "rows"


@dataclass(frozen=True)
class Recording:
    """How a training is recorded: the arguments of `gradtrace.record`. behind: None leaves it to the device."""

    cadence: Cadence
    settings: Settings
    keep: int | None
    parameters: str | Sequence[str] | None
    adapters: Any
    scaler: Any
    attrs: Mapping[str, Any]
    behind: bool | None
    resume: bool | int
    changed: bool
    min_samples: int


@dataclass(eq=False)
class Batch:
    """The samples of one forward pass: their labels, and the cell of each once their number is known."""

    labels: Labels | None
    n_samples: int | None
    of_sample: Tensor | None = None  # (samples + 1,), the last for ownerless rows
