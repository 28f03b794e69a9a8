"""`record`: what a recording of somebody's own training loop may be asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradtrace.adapters import Adapter, registry
from gradtrace.cadence import checked_cadence
from gradtrace.errors import CaptureError
from gradtrace.measure import checked_coupling, checked_keep
from gradtrace.recorder import Recorder
from gradtrace.selection import checked_kinds
from gradtrace.settings import Recording, Settings
from gradtrace.store.rows import KINDS


def record(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    every: int = 1,
    budget: float | None = None,
    kinds: Sequence[str] = KINDS,
    keep: int | None = 64,
    parameters: str | Sequence[str] | None = None,
    sample_dim: int | None = None,
    coupling: str = "rows",
    adapters: Mapping[str, str] | Sequence[Adapter] | None = None,
    scaler: Any = None,
    attrs: Mapping[str, Any] | None = None,
    behind: bool | None = None,
    resume: bool | int = False,
    changed: bool = False,
    min_samples: int = 1,
) -> Recorder:
    """A recorder that writes the spectra of every `every`-th training step to a store at `path`.

    path: of a directory, or a URL: `s3://bucket/run.zarr` and its like, `memory://name`.

    Use it as a context manager. Training is untouched: parameters after n recorded steps are bitwise those of n steps
    without it. Stored are the raw sums as they enter `p.grad`; a `torch.amp.GradScaler` given as `scaler=` has its
    scale divided out. `attrs`: anything JSON-serialisable about the run. The other arguments are those of `spectra`.

    budget: instead of `every`, the fraction of the training time that tracing may add, above 0 and at most 1. The first
    thirty-odd steps calibrate a cadence, which is then fixed, and stored as the run's `every`.

    behind: whether steps are decomposed on a thread behind the training, which goes on meanwhile; at most two steps
    wait there. By default where the model is on an accelerator. On a CPU it pays where torch leaves cores idle; numpy's
    BLAS is then kept to one thread while something is decomposed.

    resume: True goes on after the last step of the run at `path`, or begins one if there is none. A number: that many
    steps of the training are done, as a checkpoint says; what the run holds of later ones is given up. A model or
    groupings that are not those of the run are refused, unless `changed`: then what follows is a new segment of it.

    min_samples: groups with fewer samples in a step are not stored, nor those that would tell of them by subtraction.

    A store that cannot be written does not stop the training: a `StoreWarning` says what is lost. Ctrl-C and SIGTERM
    take effect when the step under way is whole, where nobody else answers these signals.
    """
    cadence = checked_cadence(every, budget)
    if isinstance(min_samples, bool) or not isinstance(min_samples, int) or min_samples < 1:
        raise CaptureError(f"min_samples={min_samples!r} must be a whole number of samples, 1 or more.")
    for name, value in {"behind": behind, "changed": changed}.items():
        if value is not None and not isinstance(value, bool):
            raise CaptureError(f"{name}={value!r} must be True or False.")
    return Recorder(
        model,
        path,
        Recording(
            cadence=cadence,
            settings=Settings(checked_kinds(kinds), sample_dim, checked_coupling(coupling)),
            keep=checked_keep(keep),
            parameters=parameters,
            adapters=registry(adapters),
            scaler=scaler,
            attrs=attrs or {},
            behind=behind,
            resume=resume,
            changed=changed,
            min_samples=min_samples,
        ),
    )
