"""Whether a writer may begin at a place: whether somebody else writes there, and what is there already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.keys import PARTIAL, ROOT_KEY, Directory, Keys
from gradtrace.store.lock import LOCK_KEY, Holder, Lock, refuse
from gradtrace.store.orphans import orphans
from gradtrace.store.past import Past
from gradtrace.store.place import explain, occupant


def enter(keys: Keys, resume: bool | int, *, kinds: Sequence[str], keep: int | None) -> tuple[Lock, Past | None]:
    """The lock of a place, and what is there to go on with; a StoreError where a run cannot be written there.

    resume: whether to go on with a run, if there is one; a number: from that step on, later rows are given up.
    """
    if isinstance(keys, Directory) and keys.root.is_file():
        raise StoreError(f"Cannot record into {keys.name!r}: {occupant(keys)}")
    try:
        held = keys.get(LOCK_KEY)
        refuse(keys, Holder.read(held) if held is not None else None)
        stump = keys.get(ROOT_KEY) is None and all(_is_ours(keys.list()))
        if not stump and resume is False:
            raise StoreError(f"Cannot record into {keys.name!r}: {occupant(keys)}")
        keys.begin()
        lock = Lock.acquire(keys)
    except OSError as error:
        raise StoreError(f"Cannot create {keys.name!r}: {explain(error)}") from error
    try:
        if stump:
            return lock, None
        past = Past(keys, None if resume is True else int(resume))
        compare(keys.name, past.attributes, {"kinds": list(kinds), "keep": keep})
    except BaseException:
        lock.release()
        raise
    return lock, past


def _is_ours(names: Iterable[str]) -> Iterable[bool]:
    """Which keys a writer may have left that was killed before its first commit."""
    for name in names:
        ours = name == LOCK_KEY or name.endswith(PARTIAL) or name in set(orphans([name], {}))
        yield ours


def compare(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """None, or a StoreError that says what differs between the run and what is to be recorded now."""
    changes = [f"{key} was {before.get(key)} and is {value}" for key, value in now.items() if before.get(key) != value]
    if changes:
        raise StoreError(f"Cannot go on with {name!r}: {'; '.join(changes)}. Record as before, or into another path.")
