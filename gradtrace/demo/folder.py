"""The folder a demo writes: made new, or taken over from a former demo, never from anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from gradtrace.errors import GradtraceError

MARK = "gradtrace-demo.json"
PICTURE = "spectra.png"


def prepare(folder: Path, *, networks: tuple[str, ...], attrs: dict[str, object]) -> bool:
    """Makes the folder ready and marks it as a demo's; True when a former demo's files in it were removed.

    Only what a demo writes is removed. Raises GradtraceError, before anything is touched, when the folder holds things
    and was not written by a demo.
    """
    if folder.exists() and not folder.is_dir():
        raise GradtraceError(f"{folder} is a file, and the demo writes a folder. Name another one: -o FOLDER.")
    former = (folder / MARK).is_file()
    if not former and folder.exists() and (held := sorted(path.name for path in folder.iterdir())):
        listed = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
        raise GradtraceError(
            f"{folder} holds {listed} and was not written by a demo (it has no {MARK}), so it is left alone. Name "
            "another folder: gradtrace demo -o FOLDER."
        )
    if former:
        _clear(folder, networks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps(attrs, indent=2) + "\n")
    return former


def store(folder: Path, network: str) -> Path:
    """Where a network's spectra go."""
    return folder / f"{network}.zarr"


def _clear(folder: Path, networks: tuple[str, ...]) -> None:
    (folder / PICTURE).unlink(missing_ok=True)
    for network in networks:
        path = store(folder, network)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
