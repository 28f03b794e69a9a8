"""A finished run as an archive: the same arrays and attributes, in a few large files."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import zarr

from gradtrace.store.archives.archive import (
    Archive,
    Content,
    Progress,
    Size,
    check_apart,
    contents_of,
    size_of,
    source_of,
)
from gradtrace.store.places.place import Where, keys_at
from gradtrace.store.reading.snapshot import Snapshot
from gradtrace.store.schema import SCHEMA


class Compacted(NamedTuple):
    """What a run takes up, if that can be told, and what its archive does."""

    before: Size | None
    after: Size


def compact(source: Where, target: Where, *, progress: Progress = lambda *_: None) -> Compacted:
    """Writes an archive of a run, closed or killed, and compares every value of it with the run's.

    source, target: paths or URLs. What `gradtrace.open_run` and xarray find in the two is the same. Memory: a few
    times `gradtrace.store.archives.shards.SHARD_BYTES`. Raises a `StoreError` where the run is still being written or
    damaged, where something is at the target, or where it cannot be written or does not read back the same.
    """
    keys, place = keys_at(source), keys_at(target)
    check_apart([keys], place)
    snapshot = source_of(keys)
    return Compacted(size_of(keys), archive_of(snapshot).write(place, progress))


def archive_of(snapshot: Snapshot) -> Archive:
    """All that the last commit of a run says is there."""
    members = dict(snapshot.run.group.members(max_depth=None))
    return Archive(
        made_by="compact",
        attributes={**snapshot.about, "gradtrace_schema": ".".join(map(str, SCHEMA))},
        groups={path: member.attrs.asdict() for path, member in members.items() if isinstance(member, zarr.Group)},
        arrays=[
            Content(path, member.metadata.to_dict(), partial(contents_of, snapshot.run.path, member))
            for path, member in sorted(members.items())
            if isinstance(member, zarr.Array)
        ],
        sources=[snapshot],
    )
