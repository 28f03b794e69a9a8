"""The zarr.json documents of a store, built by hand: zarr's own consolidation lists the store again and warns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradtrace.errors import StoreError
from gradtrace.store.schema import FILLS, STRING

CHECKSUM = "crc32c"  # the codec
_SEPARATOR = "."  # chunk keys c.0.1.2: one directory per array rather than one per chunk row


@dataclass(frozen=True)
class ArraySpec:
    """What stays the same about one array while it grows: where, of what, in which chunks.

    checksum: whether every chunk ends in one; those of schema 1.0 and 1.1 do not.
    """

    path: str
    dims: tuple[str, ...]
    dtype: str
    chunks: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    checksum: bool = True

    def key(self, index: tuple[int, ...]) -> str:
        """The key of the chunk at `index` of the chunk grid."""
        return f"{self.path}/c{_SEPARATOR}{_SEPARATOR.join(map(str, index))}"


def array_document(spec: ArraySpec, shape: tuple[int, ...]) -> dict[str, Any]:
    """The zarr.json of an array, as of the zarr v3 specification."""
    return {
        "shape": list(shape),
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.chunks)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": _SEPARATOR}},
        "fill_value": fill_value(spec.dtype),
        "codecs": _codecs(spec.dtype, checksum=spec.checksum),
        "attributes": dict(spec.attributes),
        "dimension_names": list(spec.dims),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def fill_value(dtype: str) -> Any:
    """The fill value of arrays of this type, as JSON has it."""
    fill = FILLS[dtype]
    return "NaN" if isinstance(fill, float) and math.isnan(fill) else fill


def _codecs(dtype: str, *, checksum: bool) -> list[dict[str, Any]]:
    last = [{"name": CHECKSUM}] * checksum
    if dtype == STRING:
        return [{"name": "vlen-utf8", "configuration": {}}, *last]
    size = np.dtype(dtype).itemsize
    pack: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}} if size > 1 else {"name": "bytes"}
    blosc = {"typesize": size, "cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
    return [pack, {"name": "blosc", "configuration": blosc}, *last]


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The zarr.json of a group."""
    return {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}


def root_document(attributes: Mapping[str, Any], members: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The root's zarr.json: a snapshot of everything below it, so that one PUT of it is the commit.

    zarr-python (3.1) loses members whose siblings are not next to each other in it, hence the order.
    """
    ordered = sorted(members, key=lambda path: (path.count("/"), path))
    consolidated = {"kind": "inline", "must_understand": False, "metadata": {path: members[path] for path in ordered}}
    return {**group_document(attributes), "consolidated_metadata": consolidated}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """The document as JSON text."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def plain(value: Any, where: str) -> Any:
    """`value` as plain JSON: numpy scalars become numbers, tuples lists, and numbers that JSON lacks become strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, where) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StoreError(
        f"The attribute {where} is a {type(value).__name__}, which JSON cannot hold. "
        "Pass numbers, strings, lists or mappings of them."
    )
