"""Files that appear whole or not at all: the only code that touches the disk for writing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from pathlib import Path

from gradtrace.errors import StoreError

ROOT_KEY = "zarr.json"


class Files:
    """A directory of keys. Every `put` is atomic: a reader sees the old bytes or the new ones, never a part.

    Written without asyncio or a thread pool, so that it still works while the interpreter shuts down. Directories are
    made once and never again: when somebody deletes the run, writing fails instead of bringing back a stump.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def make(self, path: str) -> None:
        """Make the directory `path` and those between the root and it."""
        here = self.root
        for part in path.split("/"):
            here = here / part
            try:
                here.mkdir()
            except FileExistsError:
                continue

    def put(self, key: str, data: bytes) -> None:
        """Write `data` under `key`, replacing what was there in one move."""
        target = self.root / key
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            with open(partial, "xb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)
            raise


def create(path: Path) -> Files:
    """A new, empty place for a store at `path`, or a StoreError that says what stands there already."""
    if ":/" in str(path):
        raise StoreError(
            f"{str(path)!r} looks like a URL, but runs are written to local directories. Copy the closed run there."
        )
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise StoreError(f"Cannot record into {str(path)!r}: {occupant(path)}") from None
    except OSError as error:
        raise StoreError(f"Cannot create {str(path)!r}: {explain(error)}") from error
    return Files(path)


def occupant(path: Path) -> str:
    """What stands at `path`, and what to do about it, in a sentence or two."""
    if not path.is_dir():
        return "it is a file. Choose another path."
    try:
        attributes = json.loads((path / ROOT_KEY).read_bytes()).get("attributes", {})
    except (OSError, ValueError, AttributeError):
        attributes = {}
    if "gradtrace_schema" not in attributes:
        return "the directory is not empty and is no gradtrace run. Choose another path."
    if attributes.get("closed"):
        return "it is a finished gradtrace run. Choose another path, or move or delete that run first."
    return (
        "it is an unfinished gradtrace run, still being written or killed; what it committed stays readable. "
        "Choose another path: a run cannot be continued yet."
    )


def explain(error: BaseException) -> str:
    """Why writing failed, in plain words, and what would help."""
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full (or a quota is used up). Free some space, or record to another disk."
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "the place cannot be written to (read-only, or not yours). Choose another path or change permissions."
    if code == errno.ENOENT:
        return "the directory has vanished; somebody moved or deleted it. Record into a new path."
    if code == errno.ENOTDIR:
        return "a part of the path is a file. Choose another path."
    return f"{type(error).__name__}: {error}"
