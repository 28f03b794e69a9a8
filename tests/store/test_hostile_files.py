"""Files, chunks and shards that are damaged or hostile give a clear error: no hang, no huge allocation."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.blosc import Blosc
from zarr.storage import MemoryStore

from gradtrace.errors import StoreError
from gradtrace.store.chunks import CRC
from gradtrace.store.reading.opened import open_run
from tests.store.hostile import bounded, explore, put_in_memory, small
from tests.store.sound import change_member, chunk_of, edit, members_of, sealed

HUGE = 10**12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    for key, data in small().items():
        (tmp_path / "run" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / key).write_bytes(data)
    return tmp_path / "run"


# ---------------------------------------------------------------------- files


def test_a_link_to_something_else_is_refused_and_not_shown(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_text("hunter2 " * 1000)
    for array in ("steps/loss", "steps/group", "steps/w1/gradient"):
        chunk = chunk_of(path, array)
        kept = chunk.read_bytes()
        chunk.unlink()
        chunk.symlink_to(secret)
        said = explore(path)
        assert any(f"{array}' cannot be read" in text for text in said), said
        assert not any("hunter2" in text for text in said)
        chunk.unlink()
        chunk.write_bytes(kept)
    (path / "zarr.json").unlink()
    (path / "zarr.json").symlink_to(secret)
    assert not any("hunter2" in text for text in explore(path))


def test_a_link_to_the_run_itself_or_to_its_chunks_is_followed(path: Path) -> None:
    """As version control of data does."""
    annex = path.parent / "annex"
    annex.mkdir()
    for number, chunk in enumerate(sorted((path / "steps").rglob("c.*"))):
        chunk.rename(annex / str(number))
        chunk.symlink_to(annex / str(number))
    (path.parent / "link").symlink_to(path)
    assert explore(path.parent / "link") == {"works"}


def _fifo(file: Path) -> None:
    os.mkfifo(file)


def _device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def _sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


def _loop(file: Path) -> None:
    file.symlink_to(file)


@pytest.mark.skipif(os.name == "nt", reason="there are none of these")
@pytest.mark.parametrize("make_it", [_fifo, _device, _sparse, _loop, Path.mkdir])
@pytest.mark.parametrize("key", ["zarr.json", "steps/loss/zarr.json", "steps/loss/c.0", "steps/group/c.0"])
def test_files_that_are_none_do_not_hang_the_reader(path: Path, key: str, make_it: Callable[[Path], None]) -> None:
    (path / key).unlink()
    make_it(path / key)
    said = explore(path)
    assert said == {"works"} if key == "steps/loss/zarr.json" else "works" not in said


# ---------------------------------------------------------------------- chunks


def with_header(chunk: bytes, place: int, value: int) -> bytes:
    """A blosc chunk with another number in its header: at 4 the bytes it unpacks to, at 8 of a block, at 12 its own."""
    return chunk[:place] + struct.pack("<I", value) + chunk[place + 4 :]


@pytest.mark.parametrize("value", [0, 1, 2**31 - 1, 2**32 - 1, 2**31])
@pytest.mark.parametrize("place", [4, 8, 12])
def test_a_chunk_that_lies_about_its_size_is_refused(path: Path, place: int, value: int) -> None:
    chunk = chunk_of(path, "steps/loss")
    chunk.write_bytes(sealed(with_header(chunk.read_bytes()[:-CRC], place, value)))
    said = explore(path)
    assert any("'steps/loss' cannot be read" in text for text in said) or place == 8


def test_a_chunk_that_unpacks_to_far_more_is_refused_before_it_is(path: Path) -> None:
    bomb = Blosc(cname="lz4", clevel=9).encode(np.zeros(1 << 28, np.uint8))
    assert len(bomb) < 1 << 22
    chunk_of(path, "steps/w1/gradient").write_bytes(sealed(bomb))
    assert any("has" in text and "what belongs there has at most" in text for text in explore(path))


@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 2**31 - 1, 2**32 - 1])
def test_names_that_lie_about_their_number_are_refused(path: Path, count: int) -> None:
    chunk = chunk_of(path, "steps/group")
    chunk.write_bytes(sealed(struct.pack("<I", count) + chunk.read_bytes()[4:-CRC]))
    assert any("'steps/group' cannot be read" in text for text in explore(path))


@pytest.mark.parametrize("length", [4, 2**31 - 1, 2**31, 2**32 - 1])
def test_names_that_lie_about_their_length_are_refused(path: Path, length: int) -> None:
    chunk = chunk_of(path, "steps/group")
    data = chunk.read_bytes()[:-CRC]
    chunk.write_bytes(sealed(data[:4] + struct.pack("<I", length) + data[8:]))
    assert any("'steps/group' cannot be read" in text for text in explore(path))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(number=st.integers(0, 10**6), at=st.integers(0, 10**6), part=st.binary(min_size=1, max_size=20))
def test_any_bytes_in_a_chunk_work_or_are_a_clear_error(number: int, at: int, part: bytes) -> None:
    names = sorted(key for key in small() if not key.endswith("zarr.json"))
    key = names[number % len(names)]
    data = small()[key][:-CRC]
    place = at % len(data)
    explore(put_in_memory({key: sealed(data[:place] + part + data[place + len(part) :])}))


UNPACK = """
import random, sys
import numpy as np
from numcodecs.blosc import Blosc
from gradtrace.store.chunks import Packing
rng, packing = random.Random(0), Packing("float32", (64, 8))
values = np.random.default_rng(0).random((64, 8), dtype=np.float32).round(2)
refused = 0
for name in ("lz4", "lz4hc", "zstd", "zlib", "blosclz"):
    good = Blosc(cname=name, clevel=5, shuffle=Blosc.BITSHUFFLE).encode(values)
    for _ in range(4000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert packing.unpack(bytes(data)).shape == (64, 8)
        except (ValueError, RuntimeError):
            refused += 1
print(refused)
"""


def test_mutated_chunks_do_not_crash_the_decompressor() -> None:
    done = subprocess.run([sys.executable, "-c", UNPACK], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 20_000


# ---------------------------------------------------------------------- shards


def in_shards(path: Path, member: str, location: str = "end") -> Path:
    """Writes an array anew in shards of two chunks along its first axis; its first shard."""
    values, held = zarr.open_array(path / member, mode="r")[...], {}
    inner = (1, *values.shape[1:])
    made = zarr.create_array(
        MemoryStore(held),
        shape=values.shape,
        dtype=values.dtype,
        chunks=inner,
        shards=(2, *inner[1:]),
        fill_value=np.nan,
    )
    made[...] = values
    old, new = members_of(path)[member], json.loads(held["zarr.json"].to_bytes())
    settings_ = new["codecs"][0]["configuration"]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {**settings_, "codecs": old["codecs"], "index_location": location},
    }
    document = {**old, "chunk_grid": new["chunk_grid"], "codecs": [sharding]}
    for file in (path / member).iterdir():
        file.unlink()
    (path / member / "zarr.json").write_text(json.dumps(document))
    written = zarr.open_array(path / member, mode="r+")
    written[...] = values
    edit(path, change_member(member, to=document))
    return chunk_of(path, member)


@pytest.mark.parametrize("location", ["start", "end"])
def test_shards_are_read_and_looked_at(path: Path, location: str) -> None:
    before = open_run(path).stream().read("bias", "gradient")
    in_shards(path, "steps/w1/gradient", location)
    assert explore(path) == {"works"}
    np.testing.assert_array_equal(open_run(path).stream().read("bias", "gradient"), before)
    for row in range(3):
        np.testing.assert_array_equal(
            open_run(path).stream().read("bias", "gradient", slice(row, row + 1))[0], before[row]
        )


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("entry", [(0, 2**62), (2**62, 8), (0, 0), (0, 3), (2**64 - 2, 2**63), (8, 60)])
def test_an_index_of_a_shard_that_lies_is_refused(path: Path, location: str, entry: tuple[int, int]) -> None:
    from google_crc32c import value

    shard = in_shards(path, "steps/w1/gradient", location)
    index = struct.pack("<4Q", *entry, *entry)
    index += value(index).to_bytes(4, "little")
    data = shard.read_bytes()
    shard.write_bytes(index + data[36:] if location == "start" else data[:-36] + index)
    said = explore(path)
    assert any("'steps/w1/gradient' cannot be read" in text for text in said), said
    with bounded(), pytest.raises(StoreError, match="cannot be read"):
        open_run(path).stream().read("bias", "gradient", slice(0, 1))
