"""Whether a writer may begin at a place: whether somebody else writes there, and what is there already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import PARTIAL, ROOT_KEY, Directory, Keys
from gradtrace.store.places.lock import LOCK_KEY, Holder, Lock, refuse
from gradtrace.store.places.orphans import orphans
from gradtrace.store.places.place import attributes_of, explain, occupant
from gradtrace.store.writing.past import Past

ARCHIVE = "archive"  # the attribute of a store that nobody adds to: the command that made it
TRACED = "traced"  # the attribute of a run that tells one set of parameters from another
MOST_NAMED = 5


class Recorded(NamedTuple):
    """What is to be recorded: kinds, how many singular values, and the shapes of all parameters if they are known."""

    kinds: Sequence[str]
    keep: int | None
    shapes: Mapping[str, Sequence[int]] | None = None


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """A digest of names and shapes."""
    plain = sorted((name, *map(int, shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def enter(keys: Keys, resume: bool | int, recorded: Recorded, *, changed: bool = False) -> tuple[Lock, Past | None]:
    """The lock of a place, and what is there to go on with; a StoreError where a run cannot be written there.

    resume: whether to go on with a run, if there is one; a number: from that step on, later rows are given up.
    changed: whether other parameters than before are fine.
    """
    if isinstance(keys, Directory) and keys.root.is_file():
        raise StoreError(f"Cannot record into {keys.name!r}: {occupant(keys)}")
    if resume is not True and resume < 0:
        raise StoreError(f"resume={resume} is no step. Give the number of optimizer steps that were done, or True.")
    try:
        held = keys.get(LOCK_KEY)
        refuse(keys, Holder.read(held) if held is not None else None)
        stump = is_stump(keys)
        if not stump and ARCHIVE in attributes_of(keys):
            raise StoreError(
                f"Cannot record into {keys.name!r}: it is an archive, to which nothing is added. Go on with the run "
                "that it was made of, or choose another path."
            )
        if not stump and resume is False:
            raise StoreError(f"Cannot record into {keys.name!r}: {occupant(keys)}")
        keys.begin()
        lock = Lock.acquire(keys)
    except OSError as error:
        raise StoreError(f"Cannot create {keys.name!r}: {explain(error)}") from error
    try:
        past = None if stump else Past(keys, None if resume is True else int(resume))
        if past is not None:
            _compare(keys.name, past.attributes, recorded, changed=changed)
    except BaseException:
        lock.release()
        raise
    return lock, past


def is_stump(keys: Keys) -> bool:
    """Whether nothing is there, or only what a kill left behind before the first commit."""
    return keys.get(ROOT_KEY) is None and all(_is_ours(keys.list()))


def _is_ours(names: Iterable[str]) -> Iterable[bool]:
    """Which keys a writer may have left that was killed before its first commit."""
    for name in names:
        ours = name == LOCK_KEY or name.endswith(PARTIAL) or name in set(orphans([name], {}))
        yield ours


def _compare(name: str, before: Mapping[str, Any], now: Recorded, *, changed: bool) -> None:
    """None, or a StoreError that says what differs between the run and what is to be recorded now."""
    asked = {"kinds": list(now.kinds), "keep": now.keep}
    others = [f"{key} was {before[key]} and is {value}" for key, value in asked.items() if before[key] != value]
    if others:
        raise StoreError(f"Cannot go on with {name!r}: {'; '.join(others)}. Record as before, or into another path.")
    if now.shapes is None or changed:
        return
    changes = list(_changes({e["name"]: e["shape"] for e in before["parameters"]}, now.shapes))
    if changes or before["run"].get(TRACED, digest(now.shapes)) != digest(now.shapes):
        shown = "; ".join(changes[:MOST_NAMED]) or "other parameters than before are traced"
        more = f" and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
        raise StoreError(
            f"Cannot go on with {name!r}, the model has changed: {shown}{more}. Record it into another path, or say "
            "changed=True: what follows is a new segment of this run."
        )


def _changes(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What became of parameters, one sentence each; of those that were there without a gradient nothing is known."""
    for name in before.keys() & now.keys():
        if list(before[name]) != list(now[name]):
            yield f"{name!r} was {tuple(before[name])} and is {tuple(now[name])}"
    yield from (f"{name!r} is gone" for name in before if name not in now)
    if before.keys() - now.keys():
        yield from (f"{name!r} is new" for name in now if name not in before)
