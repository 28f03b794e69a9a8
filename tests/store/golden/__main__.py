"""`python -m tests.store.golden`: writes the archive of the present version of the schema, which must not be there yet.

It holds `run.zarr` and, in `expected.npz`, what was handed over to its writer: a run that was gone on with, rewound and
closed, with a probe, a parameter that came late, spectra wider than `keep`, and names that are no plain words.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.store.rows import KINDS, StepRow
from gradtrace.store.schema import SCHEMA
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos, step_row

KEEP, NAMES = 17, ("fc1.weight", "blocks/0 ü")
EARLY = ("all", "diagnosis=HC")
GROUPS = (*EARLY, "diagnosis=SZ")


def main() -> None:
    target = Path(__file__).parent / f"{SCHEMA[0]}.{SCHEMA[1]}.zip"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        place = Path(folder)
        np.savez_compressed(place / "expected.npz", allow_pickle=False, **record(place / "run.zarr"))
        for file in sorted(path for path in place.rglob("*") if path.is_file()):
            archive.write(file, file.relative_to(place))


def record(place: Path) -> dict[str, np.ndarray]:
    """stream|index of the row|parameter|variable -> what was handed over."""
    given: dict[str, list[StepRow]] = {"steps": [], "probe/val": []}

    def writer(**more: Any) -> RunWriter:
        return RunWriter(place, kinds=KINDS, keep=KEEP, parameters=infos(NAMES), flush_every=4, **more)

    with writer(attrs={"seed": 7}) as first:
        for step in range(9):
            first.append(step_row(step, NAMES, groups=EARLY if step < 2 else GROUPS, width=20, scalars={"lr": 0.1}))
        first.append(step_row(3, NAMES, width=20), stream="probe/val")
    given["steps"] += [
        step_row(step, NAMES, groups=EARLY if step < 2 else GROUPS, width=20, scalars={"lr": 0.1}) for step in range(7)
    ]
    given["probe/val"].append(step_row(3, NAMES, width=20))
    with writer(attrs={"seed": 8}, resume=7) as second:
        second.add_parameter(infos(["late"])[0])
        for step in range(7, 11):
            given["steps"].append(step_row(step, [*NAMES, "late"], width=20))
            second.append(given["steps"][-1])
        given["probe/val"].append(step_row(7, NAMES, width=20))
        second.append(given["probe/val"][-1], stream="probe/val")
    return {key: value for stream, rows in given.items() for key, value in flat(stream, rows).items()}


def flat(stream: str, rows: list[StepRow]) -> dict[str, np.ndarray]:
    found = {
        f"{stream}|steps": np.array([row.step for row in rows]),
        f"{stream}|loss": np.array([row.loss for row in rows]),
    }
    for place, row in enumerate(rows):
        found[f"{stream}|{place}|n_samples"] = row.n_samples
        for name, measured in row.parameters.items():
            at = f"{stream}|{place}|{name}|"
            found |= {at + kind: np.asarray(sigma)[:, :KEEP] for kind, sigma in measured.spectra.items()}
            found[at + "nuclear"] = measured.metrics["gradient"]["nuclear"]
            found[at + "status"] = measured.status["gradient"]
            found[at + "inner_product"] = measured.inner_product
    return {key.replace("/", "\\"): value for key, value in found.items()}


if __name__ == "__main__":
    main()
