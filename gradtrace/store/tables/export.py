"""A run as tables in files that other programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import explain
from gradtrace.store.queries.selection import Query, Selected, select
from gradtrace.store.reading.snapshot import Snapshot, consistent
from gradtrace.store.tables.columns import length
from gradtrace.store.tables.comma import CommaFile
from gradtrace.store.tables.moved import moved, remove
from gradtrace.store.tables.parquet import ParquetFile, arrow
from gradtrace.store.tables.tables import TABLES

FORMATS = ("parquet", "csv", "csv.gz")
ABOUT = "run.json"  # what is said about the run, beside its tables


@dataclass(frozen=True)
class Exported:
    """What was selected, and table -> number of rows; none where nothing was found, and nothing written."""

    selected: Selected
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Export:
    """What becomes of a run: tables (names of TABLES) of what a query selects, as one of FORMATS.

    single: the one table becomes a file; else a directory holds a file for each. force: replace a former export.
    """

    query: Query
    tables: Sequence[str]
    format: str
    single: bool
    force: bool = False

    def write(self, keys: Keys, target: Path, label: str | None = None) -> Exported:
        """Everything as of one commit, in bounded memory; it is there whole or not at all.

        label: of the one that is meant of merged runs.
        Raises a StoreError where something else is there, or pyarrow is missing.
        """
        if self.format == "parquet":
            arrow()
        try:
            return consistent(keys, lambda snapshot: self._write(snapshot, target), label)
        except OSError as error:
            raise StoreError(f"Cannot write {str(target)!r}: {explain(error)}") from error

    def _write(self, snapshot: Snapshot, target: Path) -> Exported:
        ours = Path.is_file if self.single else _is_export
        with moved(target, force=self.force, ours=ours) as partial, snapshot.whole():
            selected = select(snapshot.run, self.query)
            rows = self._write_all(snapshot, selected, partial) if selected.empty is None else {}
            if not any(rows.values()):
                remove(partial)
        return Exported(selected, rows)

    def _write_all(self, snapshot: Snapshot, selected: Selected, place: Path) -> dict[str, int]:
        if self.single:
            return {name: self._write_table(name, snapshot, selected, place) for name in self.tables}
        place.mkdir()
        rows = {
            name: self._write_table(name, snapshot, selected, place / f"{name}.{self.format}") for name in self.tables
        }
        text = json.dumps(_about(snapshot, selected) | {"rows": rows}, ensure_ascii=False, indent=2)
        (place / ABOUT).write_text(text + "\n", encoding="utf-8")
        return rows

    def _write_table(self, name: str, snapshot: Snapshot, selected: Selected, place: Path) -> int:
        table, rows = TABLES[name](snapshot.run, selected, snapshot.whole), 0
        file: ParquetFile | CommaFile
        if self.format == "parquet":
            file = ParquetFile(place, table.columns, _about(snapshot, selected))
        else:
            file = CommaFile(place, table.columns, zipped=self.format == "csv.gz")
        with closing(file):
            for block in table.blocks:
                file.write(block)
                rows += length(block)
        return rows


def format_of(path: Path) -> str | None:
    """The format that the name of a file asks for."""
    return next((form for form in FORMATS if path.name.lower().endswith(f".{form}")), None)


def _is_export(place: Path) -> bool:
    """Whether a directory holds what we wrote, and nothing else."""
    ours = {ABOUT, *(f"{name}.{form}" for name in TABLES for form in FORMATS)}
    return place.is_dir() and {found.name for found in place.iterdir()} <= ours


def _about(snapshot: Snapshot, selected: Selected) -> dict[str, Any]:
    """What is said about the run and about what was taken of it; no path, no name of a host or user."""
    run = snapshot.run
    about = {"gradtrace_schema": run.schema, "closed": run.closed, "kinds": list(run.kinds), "keep": run.keep}
    about["run"] = run.attrs
    return {"stream": selected.stream.name, "groups": list(selected.group_names), **about}
