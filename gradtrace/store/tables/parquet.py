"""Parquet files: of columns that come block by block, and of rows whose types show only as they come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gradtrace.errors import StoreError
from gradtrace.store.tables.columns import STRING, TEXT, Block, Coded, Column
from gradtrace.store.tables.moved import moved

ROW_GROUP = 1 << 20  # rows that a reader may skip, or has to hold, together
BATCH = 1 << 16


def arrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, or a StoreError that says how to come by them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError(
            "Parquet files need the package pyarrow. Install it with: pip install 'gradtrace[parquet]'; or write CSV, "
            "which needs nothing."
        ) from error
    return pyarrow, pyarrow.parquet


class ParquetFile:
    """A file of these columns (name -> dtype, see `gradtrace.store.tables.columns`), with `about` in its metadata."""

    def __init__(self, path: Path, columns: Mapping[str, str], about: Mapping[str, Any]) -> None:
        self._pa, pq = arrow()
        fields = [self._pa.field(name, self._type(dtype)) for name, dtype in columns.items()]
        self._schema = self._pa.schema(fields, metadata={"gradtrace": json.dumps(about)})
        few = [name for name, dtype in columns.items() if not dtype.startswith("float") or name == "epoch"]
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", use_dictionary=few)
        self._known: dict[int, tuple[np.ndarray, Any]] = {}  # names, by identity, and the array that they are
        self._held: list[Any] = []

    def write(self, block: Block) -> None:
        """Append rows."""
        arrays = [self._convert(block[field.name], field.type) for field in self._schema]
        self._held.append(self._pa.Table.from_arrays(arrays, schema=self._schema))
        if sum(map(len, self._held)) >= ROW_GROUP:
            self._put(everything=False)

    def close(self) -> None:
        """Write what is left."""
        self._put(everything=True)
        self._writer.close()

    def _put(self, *, everything: bool) -> None:
        together = self._pa.concat_tables(self._held) if self._held else self._schema.empty_table()
        whole = len(together) if everything else len(together) // ROW_GROUP * ROW_GROUP
        if whole:
            self._writer.write_table(together.slice(0, whole), row_group_size=ROW_GROUP)
        self._held = [together.slice(whole)]

    def _type(self, dtype: str) -> Any:
        if dtype == TEXT:
            return self._pa.dictionary(self._pa.int32(), self._pa.string())
        return self._pa.string() if dtype == STRING else self._pa.from_numpy_dtype(np.dtype(dtype))

    def _convert(self, column: Column, type_: Any) -> Any:
        if not isinstance(column, Coded):
            return self._pa.array(column, type_, from_pandas=True)  # NaN is null
        if not self._pa.types.is_dictionary(type_):
            return self._pa.array(column.values[column.codes], type_, from_pandas=True)
        if id(column.values) not in self._known:
            self._known[id(column.values)] = (column.values, self._pa.array(column.values.tolist(), self._pa.string()))
        names = self._known[id(column.values)][1]
        return self._pa.DictionaryArray.from_arrays(self._pa.array(column.codes, self._pa.int32()), names)


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a new or former file; they are held as arrays until the types of all columns are known."""
    pa, pq = arrow()
    batches = [[_array(pa, [row.get(name) for row in batch]) for name in columns] for batch in _batches(rows)]
    together = [_together(pa, list(arrays)) for arrays in zip(*batches, strict=True)]
    table = pa.table(together or [pa.array([], pa.string()) for _ in columns], names=list(columns))
    with moved(path, force=True) as partial:
        pq.write_table(table, partial, compression="zstd", row_group_size=ROW_GROUP)


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _array(pa: Any, values: list[Any]) -> Any:
    """The values as an array: of text where they are strings, or of several types."""
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        array = pa.array(list(map(_plain, values)))
    return array.dictionary_encode() if pa.types.is_string(array.type) else array


def _together(pa: Any, arrays: list[Any]) -> Any:
    """Arrays of one column, one after another: of text where they are of several types."""
    types = {array.type for array in arrays if not pa.types.is_null(array.type)}
    if len(types) > 1:
        arrays = [_array(pa, list(map(_plain, array.to_pylist()))) for array in arrays]
    common = next(iter(types)) if len(types) == 1 else pa.dictionary(pa.int32(), pa.string())
    return pa.chunked_array([pa.nulls(len(a), common) if pa.types.is_null(a.type) else a for a in arrays], common)


def _plain(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
