"""Makes a damaged store whole as far as that goes: what cannot be right is given up, what is right stays as it is."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradtrace.errors import StoreError
from gradtrace.store.checking.finding import DAMAGE, Finding, in_order
from gradtrace.store.checking.metadata import orphaned
from gradtrace.store.checking.values import ASIDE
from gradtrace.store.checking.verify import findings
from gradtrace.store.metadata import to_bytes
from gradtrace.store.places.keys import ROOT_KEY, Directory, Keys
from gradtrace.store.places.lock import LOCK_KEY, Lock
from gradtrace.store.places.place import Where, explain, keys_at
from gradtrace.store.reading.reader import root_of
from gradtrace.store.reading.runs import RUNS
from gradtrace.store.reading.sanity import flaws
from gradtrace.store.schema import SCHEMA, STEP


class Repaired(NamedTuple):
    """What was done, in sentences, and what a look at the store finds afterwards."""

    done: list[str]
    left: list[Finding]


def repair(run: Where | Keys) -> Repaired:
    """Removes what a kill left over, writes metadata anew that the root says otherwise, and gives up rows.

    Of each stream the rows before the first that is damaged are kept, unless it is the very first: then nothing would
    be left, and it stays as it is. Where the loss, epochs, scalars or costs of some rows cannot be read, these are
    given up, and the rows are kept. run: a path or a URL. A `StoreError` where somebody writes the store, or its root
    itself is damaged.
    """
    keys = keys_at(run)
    _, document = root_of(keys)
    _check_repairable(keys, document)
    try:
        stale = keys.get(LOCK_KEY) is not None
        lock = Lock.acquire(keys)
        try:
            done = ["removed the lock of a writer that is gone"] if stale else []
            return _repair(keys, done)
        finally:
            lock.release()
    except OSError as error:
        raise StoreError(f"Cannot repair {keys.name!r}: {explain(error)}") from error


def _check_repairable(keys: Keys, document: Mapping[str, Any]) -> None:
    here, version = repr(keys.name), document["attributes"]["gradtrace_schema"]
    if RUNS in document["attributes"]:
        raise StoreError(f"{here} holds merged runs, which are not repaired. Merge the runs again.")
    if tuple(map(int, version.split("."))) > SCHEMA:
        raise StoreError(
            f"{here} has schema {version}, which this gradtrace does not write. Install a newer gradtrace."
        )
    for flaw in flaws(document):
        raise StoreError(
            f"{here} cannot be repaired: {flaw}. Its root is what everything else is understood by. Put a copy of its "
            "zarr.json there, as of any commit of this run: the rows up to that commit can then be read."
        )
    if isinstance(keys, Directory):
        for path in document["consolidated_metadata"]["metadata"]:
            if not Path(os.path.realpath(keys.root / path)).is_relative_to(os.path.realpath(keys.root)):
                raise StoreError(f"{here} cannot be repaired: {path!r} is a link that leads out of it. Undo the link.")


def _repair(keys: Keys, done: list[str]) -> Repaired:
    """The repair, where the lock is held."""
    _, document = root_of(keys)
    while True:
        found = list(findings(keys, document, written=False))
        _put_aside(keys, found, done)
        shorter = _cut(document, found, done)
        if shorter is None:
            break
        document = shorter
        keys.put(ROOT_KEY, to_bytes(document))  # first of all: what follows takes nothing that a reader may still see
    members = document["consolidated_metadata"]["metadata"]
    stale = [one for one in found if one.severity == DAMAGE and one.key.endswith(f"/{ROOT_KEY}")]
    for finding in stale:
        keys.make(finding.array)
        keys.put(finding.key, to_bytes(members[finding.array]))
    if stale:
        done.append(f"wrote {len(stale)} files of metadata anew, as the root has it, such as {stale[0].key}")
    gone = list(orphaned(keys.list(), members))
    for key in gone:
        keys.delete(key)
    if gone:
        done.append(f"removed {len(gone)} files that the last commit does not know, such as {min(gone)}")
    left = [one for one in findings(keys, document, written=False) if one.key != LOCK_KEY]
    return Repaired(done, in_order(left))


def _put_aside(keys: Keys, found: Iterable[Finding], done: list[str]) -> None:
    """Remove chunks that cannot be read of what stands beside the measurements."""
    for finding in found:
        if _is_aside(finding):
            keys.delete(finding.key)
            done.append(f"removed {finding.key}: the {finding.array} of steps {finding.steps} could not be read")


def _is_aside(finding: Finding) -> bool:
    return finding.array in ASIDE and finding.severity == DAMAGE and bool(finding.key)


def _cut(document: Mapping[str, Any], found: Iterable[Finding], done: list[str]) -> dict[str, Any] | None:
    """The root document without rows that are damaged, and those after them; None where there are none to give up."""
    first: dict[str, int] = {}
    for finding in found:
        if finding.severity == DAMAGE and finding.row is not None and not _is_aside(finding):
            first[finding.stream] = min(finding.row, first.get(finding.stream, finding.row))
    kept = {path: row for path, row in first.items() if row > 0}
    if not kept:
        return None
    shorter = copy.deepcopy(dict(document))
    committed = shorter["attributes"]["committed"]
    for path, rows in kept.items():
        done.append(f"gave up {committed[path] - rows} of the {committed[path]} rows of {path!r}: {rows} are kept")
        committed[path] = rows
    for path, member in shorter["consolidated_metadata"]["metadata"].items():
        stream = next((one for one in kept if path.startswith(f"{one}/")), None)
        if stream is not None and member.get("dimension_names", [""])[:1] == [STEP]:
            member["shape"][0] = kept[stream]
    return shorter
