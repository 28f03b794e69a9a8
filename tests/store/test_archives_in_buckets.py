"""Archives in buckets: compacted and merged from there and to there, and gone where that fails."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest

from gradtrace.errors import StoreError
from gradtrace.store.archives import shards
from gradtrace.store.archives.compact import compact
from gradtrace.store.archives.merge import merge
from gradtrace.store.places.bucket import Bucket
from gradtrace.store.places.keys import ROOT_KEY
from gradtrace.store.places.place import keys_at
from gradtrace.store.reading.merged import open_merged
from gradtrace.store.reading.opened import open_run
from tests.store.alike import assert_alike
from tests.store.test_buckets import environment, new_writer, server, url, write

__all__ = ["environment", "server", "url"]  # fixtures


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards an array, of several chunks each."""
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    monkeypatch.setattr(shards, "LEAST_STEPS", 4)


def record(place: str, steps: range) -> str:
    with new_writer(place) as writer:
        write(writer, steps)
    return place


def test_an_archive_goes_into_a_bucket_and_comes_back(url: str, tmp_path: Path) -> None:
    run = record(f"{url}/run.zarr", range(17))
    done = compact(run, f"{url}/archive.zarr")
    assert done.before is None
    assert_alike(open_run(run), open_run(f"{url}/archive.zarr"))
    keys = list(keys_at(f"{url}/archive.zarr").list())
    assert done.after.files == len(keys)
    shards_of = Counter(key.rpartition("/")[0] for key in keys if key.rpartition("/")[2].startswith("c."))
    assert max(shards_of.values()) > 1
    compact(f"{url}/archive.zarr", tmp_path / "back.zarr")
    assert_alike(open_run(run), open_run(tmp_path / "back.zarr"))
    with pytest.raises(StoreError, match="something is there already"):
        compact(run, f"{url}/archive.zarr")
    with pytest.raises(StoreError, match="lies inside the run"):
        compact(run, f"{run}/archive.zarr")
    with pytest.raises(StoreError, match="it is an archive"):
        new_writer(f"{url}/archive.zarr", resume=True)


def test_runs_are_merged_in_a_bucket(url: str, tmp_path: Path) -> None:
    sources = {"far": record(f"{url}/run.zarr", range(9)), "near": record(str(tmp_path / "run.zarr"), range(4, 15, 2))}
    merge(sources, f"{url}/merged.zarr")
    together = open_merged(keys_at(f"{url}/merged.zarr"))
    for label, source in sources.items():
        assert_alike(open_run(source), together.run(label))


@pytest.mark.parametrize("key", ["steps/w16/status/c.0.0.0.0", ROOT_KEY])
def test_nothing_is_left_where_a_bucket_fails(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    run, put = record(str(tmp_path / "run.zarr"), range(17)), Bucket.put

    def failing(self: Bucket, name: str, data: bytes) -> None:
        if name == key:
            raise OSError(errno.ENOSPC, "the bucket is full", f"{self.name}/{name}")
        put(self, name, data)

    monkeypatch.setattr(Bucket, "put", failing)
    with pytest.raises(StoreError, match=r"failed: the bucket is full\. Nothing of it is left"):
        compact(run, f"{url}/archive.zarr")
    assert list(keys_at(f"{url}/archive.zarr").list()) == []
