"""Looks through a whole store: what is damaged, what is left over, and what else there is to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.checking.blocks import Blocks, Index
from gradtrace.store.checking.finding import DAMAGE, NOTE, RESTORE, Finding, in_order
from gradtrace.store.checking.metadata import left_over, own_findings
from gradtrace.store.checking.values import stream_findings
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.lock import writer_of
from gradtrace.store.places.place import Where, keys_at
from gradtrace.store.reading.members import Members
from gradtrace.store.reading.reader import root_of
from gradtrace.store.reading.runs import RUNS, checked_runs
from gradtrace.store.reading.sanity import flaws
from gradtrace.store.reading.snapshot import is_later
from gradtrace.store.schema import SCHEMA


def verify(run: Where | Keys) -> list[Finding]:
    """Everything that was found, damage first; nothing where all is well. Memory: some blocks of rows.

    run: a path or a URL. A `StoreError` where there is no run, or its root cannot be read. Where a run is being
    written, it is looked at as of its last commit; what is not yet committed is nobody's business.
    """
    keys = keys_at(run)
    writer = writer_of(keys)
    data, document = root_of(keys)
    found = list(findings(keys, document, written=writer is not None))
    again, now = root_of(keys)
    if again != data and ([*flaws(now)] or not is_later(document["attributes"], now["attributes"])):
        raise StoreError(f"{keys.name!r} was rewound to an earlier step while it was read. Run the command again.")
    if writer is not None:
        what = f"it is being written by {writer}: this is about its last commit"
        found.append(Finding(NOTE, what, "Look again when it is closed."))
    return in_order(found)


def findings(keys: Keys, document: Mapping[str, Any], *, written: bool) -> Iterator[Finding]:
    """What there is to find in the store of this root, in the order in which it is looked for.

    written: whether somebody writes it, so that what the root does not know is not left over.
    """
    attributes = document["attributes"]
    if tuple(map(int, attributes["gradtrace_schema"].split("."))) > SCHEMA:
        what = f"it has schema {attributes['gradtrace_schema']}; what is new in it is not looked at"
        yield Finding(NOTE, what, "Use a newer gradtrace.")
    wrong = list(_root_flaws(keys, document))
    yield from wrong
    if wrong:
        yield Finding(NOTE, "nothing else was looked at, because its root is damaged", RESTORE)
        return
    members = document["consolidated_metadata"]["metadata"]
    yield from own_findings(keys, members, closed=attributes["closed"])
    if RUNS in attributes:
        yield from _unreadable(keys, members)
    else:
        for path in attributes["committed"]:
            yield from stream_findings(keys, members, attributes, path)
    if not written:
        yield from left_over(keys, members)


def _root_flaws(keys: Keys, document: Mapping[str, Any]) -> Iterator[Finding]:
    if RUNS not in document["attributes"]:
        for flaw in flaws(document):
            yield Finding(DAMAGE, flaw.what, RESTORE, array=flaw.path)
        return
    try:
        checked_runs(document, keys.name)
    except StoreError as error:
        yield Finding(DAMAGE, f"what it says of the runs in it is wrong: {error}", "Merge the runs again.")


def _unreadable(keys: Keys, members: Members) -> Iterator[Finding]:
    """Chunks of merged runs that cannot be read: their checksums tell whether they are as they were written.

    Where a step or a name is missing, nothing tells how much there is, and nothing else is looked at.
    """
    arrays = {path: Blocks(keys, path, one) for path, one in members.items() if one["node_type"] == "array"}
    for path, blocks in arrays.items():
        if members[path]["dimension_names"] == [path.rpartition("/")[2]]:
            blocks.until_lost()
            for index in blocks.lost:
                yield _of_merged(blocks, index, "is missing")
    if any(blocks.lost for blocks in arrays.values()):
        return
    for blocks in arrays.values():
        blocks.read()
        for index, why in sorted(blocks.bad.items()):
            yield _of_merged(blocks, index, f"cannot be read: {why}")


def _of_merged(blocks: Blocks, index: Index, what: str) -> Finding:
    key = blocks.key(index)
    what = f"the chunk {key.rpartition('/')[2]} {what}"
    return Finding(DAMAGE, what, "Merge the runs again.", array=blocks.path, key=key)
