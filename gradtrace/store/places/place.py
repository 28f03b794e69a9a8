"""Where a run is: the keys behind a path or a URL, what stands there already, and why writing there fails."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import ROOT_KEY, Directory, Keys, Memory

if TYPE_CHECKING:
    from zarr.abc.store import Store

Where = str | os.PathLike[str]
BUCKETS = ("s3", "s3a", "gs", "az", "abfs", "abfss", "adl", "azure", "http", "https")


def keys_at(where: Where | Keys) -> Keys:
    """The keys at a path, or at a URL: `s3://bucket/run.zarr` and its like, `file:///run.zarr`, `memory://run`.

    Keys that are given are returned as they are.
    """
    if isinstance(where, Keys):
        return where
    text = os.fspath(where)
    if re.match(r"[a-z][a-z0-9+.]+:/[^/]", text):
        raise StoreError(f"{text!r} looks like a URL that lost a slash on its way through a path. Pass it as a string.")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Directory(Path(text))
    if scheme == "file":
        return Directory(Path(unquote(urlsplit(text).path)))
    if scheme == "memory":
        return Memory(rest)
    if scheme in BUCKETS:
        from gradtrace.store.places.bucket import Bucket

        return Bucket(text)
    raise StoreError(f"{scheme}:// is no place that runs can be at. Use a path, or a URL with {', '.join(BUCKETS)}.")


def zarr_store(keys: Keys) -> Store:
    """The same keys for zarr to read."""
    if isinstance(keys, Directory):
        from zarr.storage import LocalStore

        return LocalStore(keys.root, read_only=True)
    if isinstance(keys, Memory):
        from zarr.core.buffer import default_buffer_prototype
        from zarr.storage import MemoryStore

        make = default_buffer_prototype().buffer.from_bytes
        return MemoryStore({key: make(keys.get(key) or b"") for key in keys.list()}, read_only=True)
    return keys.to_zarr()  # type: ignore[attr-defined]


def attributes_of(keys: Keys) -> dict[str, Any]:
    """What the root says of itself; nothing where there is no root that can be read."""
    try:
        found = json.loads(keys.get(ROOT_KEY) or b"{}").get("attributes", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def occupant(keys: Keys) -> str:
    """What stands there, and what to do about it, in a sentence or two."""
    if isinstance(keys, Directory) and not keys.root.is_dir():
        return "it is a file. Choose another path."
    attributes = attributes_of(keys)
    if "gradtrace_schema" not in attributes:
        return "something is there that is no gradtrace run. Choose another path."
    again = "Go on with it by resume=True, choose another path, or move or delete that run first."
    if attributes.get("closed"):
        return f"it is a finished gradtrace run. {again}"
    return f"it is an unfinished gradtrace run, whose writer is gone; what it committed stays readable. {again}"


def explain(error: BaseException) -> str:
    """Why writing failed, in plain words, and what would help."""
    if isinstance(error, OSError) and "://" in str(error.filename):  # of a bucket, which says it by itself
        return f"{error.strerror}."
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full (or a quota is used up). Free some space, or use another disk."
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "the place cannot be written to (read-only, or not yours). Choose another path or change permissions."
    if code == errno.ENOENT:
        return "the directory has vanished; somebody moved or deleted it. Record into a new path."
    if code == errno.ENOTDIR:
        return "a part of the path is a file. Choose another path."
    if isinstance(error, StoreError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def may_pass(error: BaseException) -> bool:
    """Whether what failed may work again by itself, or when somebody makes room."""
    passing = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.EBUSY)
    return isinstance(error, OSError) and (error.errno in passing or isinstance(error, ConnectionError | TimeoutError))
