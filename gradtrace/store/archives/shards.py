"""How the arrays of an archive lie on disk: few large shards, of chunks that can be read by themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from gradtrace.store.metadata import CHECKSUM, to_bytes
from gradtrace.store.places.keys import ROOT_KEY
from gradtrace.store.schema import PARAMETER, RUN, STEP, STRING, even_share

CHUNK_BYTES = 1 << 19  # of a chunk, uncompressed
SHARD_BYTES = 64 << 20  # of a shard, uncompressed: what is held in memory
FEW_PARAMETERS = 4  # in a chunk of spectra
LEAST_STEPS = 128  # in such a chunk, where it can be

Region = tuple[slice, ...]


def sharded(document: Mapping[str, Any]) -> dict[str, Any]:
    """The zarr.json of the same array, cut into shards (or whole chunks, where a shard would hold one)."""
    if document["data_type"] == STRING:
        return {**document, "chunk_grid": _grid([max(1, size) for size in document["shape"]])}
    size = np.dtype(document["data_type"]).itemsize
    inner = chunk_shape(document["dimension_names"], document["shape"], size)
    outer = shard_shape(document["dimension_names"], document["shape"], inner, size)
    pack: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}} if size > 1 else {"name": "bytes"}
    blosc = {"typesize": size, "cname": "zstd", "clevel": 5, "shuffle": "shuffle", "blocksize": 0}
    codecs: list[dict[str, Any]] = [pack, {"name": "blosc", "configuration": blosc}, {"name": CHECKSUM}]
    if inner != outer:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": CHECKSUM}]
        settings = {"chunk_shape": inner, "codecs": codecs, "index_codecs": index, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": settings}]
    return {**document, "chunk_grid": _grid(outer), "codecs": codecs}


def chunk_shape(dims: Sequence[str], shape: Sequence[int], item: int) -> list[int]:
    """The chunks of an array: CHUNK_BYTES of few parameters in many steps, or of more where all steps need less.

    Other axes are never cut. item: bytes of a value.
    """
    lengths = dict(zip(dims, shape, strict=True))
    cell = item * math.prod(max(1, size) for dim, size in lengths.items() if dim not in (RUN, STEP, PARAMETER))
    few = min(FEW_PARAMETERS, max(1, CHUNK_BYTES // (LEAST_STEPS * cell))) if PARAMETER in dims else 1
    steps = even_share(lengths.get(STEP, 1), max(1, CHUNK_BYTES // (few * cell)))
    more = even_share(lengths.get(PARAMETER, 1), max(few, CHUNK_BYTES // (steps * cell)))
    cut = {RUN: 1, STEP: steps, PARAMETER: more}
    return [cut.get(dim, max(1, size)) for dim, size in lengths.items()]


def shard_shape(dims: Sequence[str], shape: Sequence[int], inner: Sequence[int], item: int) -> list[int]:
    """Whole chunks: all parameters, then as many steps, then as many runs, as SHARD_BYTES hold."""
    grown = dict(zip(dims, inner, strict=True))
    lengths = dict(zip(dims, shape, strict=True))
    room = SHARD_BYTES // (item * math.prod(inner))
    for dim in (PARAMETER, STEP, RUN):
        if dim in grown:
            share = even_share(math.ceil(lengths[dim] / grown[dim]), max(1, room))
            grown[dim] *= share
            room //= share
    return [grown[dim] for dim in dims]


def regions(document: Mapping[str, Any]) -> Iterator[Region]:
    """What each shard of an array holds of it."""
    cuts = document["chunk_grid"]["configuration"]["chunk_shape"]
    axes = [range(0, size, cut) for size, cut in zip(document["shape"], cuts, strict=True)]
    for starts in product(*axes):
        ends = zip(starts, cuts, document["shape"], strict=True)
        yield tuple(slice(start, min(start + cut, size)) for start, cut, size in ends)


class Encoder:
    """Makes the bytes of an array's shards: zarr writes each into memory."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._held: dict[str, Buffer] = {}
        self._held[ROOT_KEY] = default_buffer_prototype().buffer.from_bytes(to_bytes(document))
        self._array = zarr.open_array(MemoryStore(self._held), mode="r+", zarr_format=3)

    def encode(self, region: Region, values: np.ndarray) -> dict[str, bytes]:
        """The key of the shard that holds the region, below the array's own, and its bytes; nothing for a shard of
        nothing but fill values."""
        self._array[region] = values
        return {key: self._held.pop(key).to_bytes() for key in list(self._held) if key != ROOT_KEY}


def _grid(shape: Sequence[int]) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}
