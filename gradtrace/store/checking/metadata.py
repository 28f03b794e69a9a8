"""Whether what a store says of itself twice is the same, and what lies in it that its last commit does not know."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gradtrace.store.checking.finding import DAMAGE, LEFTOVER, NOTE, REPAIR, Finding
from gradtrace.store.places.keys import PARTIAL, ROOT_KEY, Keys
from gradtrace.store.places.lock import LOCK_KEY
from gradtrace.store.places.orphans import orphans
from gradtrace.store.reading import guard
from gradtrace.store.reading.members import Members
from gradtrace.store.schema import MAIN_STREAM, PROBES

REWRITE = "gradtrace does not read it, but others may: `gradtrace verify --repair` writes it anew."


def own_findings(keys: Keys, members: Members, *, closed: bool) -> Iterator[Finding]:
    """Where an array's or group's own zarr.json is not as the root says; a run that is not closed has room there."""
    for path, member in members.items():
        wrong = _own(keys, path, member, closed)
        if wrong is not None:
            yield Finding(DAMAGE, f"its own zarr.json {wrong}", REWRITE, array=path, key=f"{path}/{ROOT_KEY}")


def _own(keys: Keys, path: str, member: Mapping[str, Any], closed: bool) -> str | None:
    try:
        data = guard.get(keys, f"{path}/{ROOT_KEY}")
        own = {} if data is None else json.loads(data)
    except (ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    if data is None:
        return "is missing"
    if not isinstance(own, dict):
        return "is no mapping"
    loose = ("attributes",) if member["node_type"] == "group" else ("shape",)
    for key in {**member, **own}:
        if own.get(key) != member.get(key) and (closed or key not in loose):
            return f"says otherwise than the root what its {key} is"
    if member["node_type"] == "array" and not _has_room(own["shape"], member["shape"]):
        return f"has the shape {own['shape']}, which is less than {member['shape']}"
    return None


def _has_room(own: Any, shape: list[int]) -> bool:
    fits = isinstance(own, list) and len(own) == len(shape)
    return fits and all(type(room) is int and room >= size for room, size in zip(own, shape, strict=True))


def left_over(keys: Keys, members: Members) -> Iterator[Finding]:
    """What a kill left behind, where nobody writes."""
    try:
        found = list(keys.list())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        yield Finding(NOTE, "what else lies in it cannot be told: a web server does not list it", "Look at a copy.")
        return
    if LOCK_KEY in found:
        yield Finding(LEFTOVER, "the lock of a writer that is gone", REPAIR, array=LOCK_KEY, key=LOCK_KEY)
    kinds: dict[tuple[str, str], list[str]] = {}
    for key in orphaned(found, members):
        what = "half-written files" if key.endswith(PARTIAL) else "files that the last commit does not know"
        kinds.setdefault((key.rpartition("/")[0], what), []).append(key)
    for (path, what), names in sorted(kinds.items()):
        yield Finding(LEFTOVER, f"{len(names)} {what}, such as {min(names)}", REPAIR, array=path)


def orphaned(found: Iterable[str], members: Members) -> Iterator[str]:
    """Those keys that a writer left behind. What lies outside the streams is somebody else's."""
    for key in orphans(found, members):
        if key.partition("/")[0] in (MAIN_STREAM, PROBES, key):
            yield key
