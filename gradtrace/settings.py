"""What a traced step is asked to measure, and the samples it works on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradtrace.groups import Labels


@dataclass(frozen=True)
class Settings:
    """What to measure, of what a session is made for."""

    kinds: tuple[str, ...]
    sample_dim: int | None = None
    coupling: str = "rows"


@dataclass(eq=False)
class Batch:
    """The samples of one forward pass: their labels, and the cell of each once their number is known."""

    labels: Labels | None
    n_samples: int | None
    of_sample: Tensor | None = None  # (samples + 1,), the last for ownerless rows
