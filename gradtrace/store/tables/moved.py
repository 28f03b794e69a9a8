"""Files and directories that appear whole or not at all: written beside their place, and moved there."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import PARTIAL


@contextmanager
def moved(target: Path, *, force: bool, ours: Callable[[Path], bool] = Path.is_file) -> Iterator[Path]:
    """A free path beside `target`; what is made there is moved to the target at the end, or removed if that fails.

    force: replace what is at the target, if it is `ours`; else a StoreError says that something is there.
    """
    _check(target, force=force, ours=ours)
    partial = _beside(target)
    try:
        yield partial
        _check(target, force=force, ours=ours)  # it may have come meanwhile
        if partial.exists():
            _move(partial, target)
    finally:
        remove(partial)


def _move(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(partial, target)
        return
    former = _beside(target)
    os.rename(target, former)
    os.rename(partial, target)
    remove(former)


def remove(place: Path) -> None:
    """Delete a file or directory; nothing happens where there is none."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")


def _check(target: Path, *, force: bool, ours: Callable[[Path], bool]) -> None:
    if not target.parent.is_dir():
        raise StoreError(f"{str(target.parent)!r} is no directory. Make it first.")
    if not target.exists():
        return
    if not force:
        raise StoreError(f"{str(target)!r} is there already. Choose another name, or replace it with --force.")
    if not ours(target):
        raise StoreError(
            f"{str(target)!r} holds something else and is not replaced. Choose another name, or move it away."
        )
