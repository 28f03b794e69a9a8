"""Tables of a run hold what queries find, as of one commit, and are there whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradtrace.errors import SelectionError, StoreError
from gradtrace.metrics import METRICS
from gradtrace.store.places.keys import Directory
from gradtrace.store.queries.query import Record, records
from gradtrace.store.queries.selection import Query, Span, select
from gradtrace.store.reading.opened import open_run
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.tables.export import FORMATS, Export, Exported, format_of
from gradtrace.store.tables.tables import TABLES
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import GROUPS, infos, parameter_row, step_row

Make = Callable[..., RunWriter]
WIDTHS = {"wide": 23, "fc,1.weight": 5, "fc1.bias": 1, 'say "x"': 5, "late": 7}
STEPS = range(0, 46, 2)
QUERIED: dict[tuple[str, ...], list[Record]] = {}


def parameter_of(step: int, name: str, groups: int) -> ParameterRow:
    """A bias has no activation; one step is not finite; one lacks a group."""
    kinds = tuple(kind for kind in KINDS if not (name == "fc1.bias" and kind == "activation"))
    row = parameter_row(1000 * step + len(name), groups=groups, width=WIDTHS[name], kinds=kinds)
    if step == 8:
        spectra = {kind: np.full_like(values, np.nan) for kind, values in row.spectra.items()}
        metrics = {kind: {m: np.full(groups, np.nan) for m in row.metrics[kind]} for kind in kinds}
        status = {kind: np.full(groups, Status.NOT_FINITE, np.uint8) for kind in kinds}
        return replace(row, spectra=spectra, metrics=metrics, status=status)
    if step == 12:
        for kind in kinds:
            row.status[kind][1] = Status.GROUP_ABSENT
            row.spectra[kind][1] = np.nan
            for values in row.metrics[kind].values():
                values[1] = np.nan
        row.inner_product[1, :] = row.inner_product[:, 1] = np.nan
    return row


def row_of(step: int) -> StepRow:
    groups = GROUPS if step < 20 else (*GROUPS, "site=a")
    names = [name for name in WIDTHS if name != "late" or step >= 30]
    rows = {name: parameter_of(step, name, len(groups)) for name in names}
    samples, scalars = np.arange(len(groups)) + step, {"accuracy": step / 7}
    return StepRow(step, groups, samples, rows, loss=1 / (step + 1), epoch=float(step // 10), scalars=scalars)


@pytest.fixture
def keys(new_writer: Make) -> Directory:
    unseen = ParameterInfo("frozen", (3,), {"rung": "ungrouped", "reason": "the op is opaque"})
    about = {"seed": 7, "torch": "2.13.0"}
    with new_writer(parameters=[*infos(list(WIDTHS)), unseen], keep=16, flush_every=4, attrs=about) as writer:
        for step in STEPS:
            writer.append(row_of(step))
        writer.append(step_row(7, ["wide"], groups=("all",)), stream="probe/val")
    return Directory(Path(writer.path))


@pytest.fixture(params=["blocks as they come", "small blocks"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with blocks, row groups and pieces so small that there are many."""
    if request.param == "small blocks":
        monkeypatch.setattr("gradtrace.store.tables.blocks.BLOCK_VALUES", 7 * 3 * 4 * 16)
        monkeypatch.setattr("gradtrace.store.tables.parquet.ROW_GROUP", 100)
        monkeypatch.setattr("gradtrace.store.tables.comma.ROWS", 11)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of CSV with numbers where there can be any."""
    if format_of(path) == "parquet":
        return list(pq.read_table(path).to_pylist())
    data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    texts = ("parameter", "kind", "group", "group_other", "status", "shape", "rung", "dtype", "ownership", "reason")
    return [
        {k: (v or None) if k in (*texts, "attributes") else float(v) if v else None for k, v in row.items()}
        for row in csv.DictReader(io.StringIO(data.decode(), newline=""))
    ]


def exported(keys: Directory, target: Path, table: str, form: str = "parquet", **asked: Any) -> list[dict[str, Any]]:
    done = Export(Query(**asked), [table], form, single=True).write(keys, target)
    rows = rows_of(target)
    assert done.rows == {table: len(rows)}
    return rows


def queried(keys: Directory, *metrics: str) -> list[Record]:
    """What a query finds in the run, which is the same in all tests."""
    if metrics not in QUERIED:
        QUERIED[metrics] = list(records(select(open_run(keys.root), Query(metrics=metrics))))
    return QUERIED[metrics]


def by_key(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows)
    return found


def same(found: float | None, value: float) -> bool:
    return found is None if np.isnan(value) else np.float32(found) == np.float32(value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("small")
def test_spectra_are_those_that_a_query_finds(keys: Directory, tmp_path: Path, form: str) -> None:
    found = by_key(
        exported(keys, tmp_path / f"x.{form}", "spectra", form), "step", "parameter", "kind", "group", "component"
    )
    count = 0
    for record in queried(keys):
        for place, value in record.values.items():
            if not np.isnan(value):
                row = found[record.step, record.parameter, record.kind, record.group, int(place)]
                assert same(row["value"], value)
                assert row["epoch"] == record.epoch
                count += 1
    assert count == len(found) > 5000


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("small")
def test_metrics_are_those_that_a_query_finds(keys: Directory, tmp_path: Path, form: str) -> None:
    found = by_key(exported(keys, tmp_path / f"x.{form}", "metrics", form), "step", "parameter", "kind", "group")
    count = 0
    for record in queried(keys, *METRICS):
        row = found[record.step, record.parameter, record.kind, record.group]
        assert all(same(row[name], value) for name, value in record.values.items())
        groups = row_of(record.step).groups
        assert row["n_samples"] == groups.index(record.group) + record.step
        assert row["status"] == record.status
        count += 1
    assert count == len(found)
    assert {row["status"] for row in found.values()} == {"measured", "not finite"}
    assert not any(key[0] == 12 and key[3] == GROUPS[1] for key in found)


@pytest.mark.usefixtures("small")
def test_products_are_those_that_were_handed_over(keys: Directory, tmp_path: Path) -> None:
    found = by_key(exported(keys, tmp_path / "x.parquet", "products"), "step", "parameter", "group", "group_other")
    count = 0
    for step in STEPS:
        row = row_of(step)
        for name, given in row.parameters.items():
            inner = given.inner_product.astype(np.float32).astype(np.float64)
            for g in range(len(row.groups)):
                for h in range(g + 1, len(row.groups)):
                    if not np.isnan(inner[g, h]):
                        there = found[step, name, row.groups[g], row.groups[h]]
                        assert there["inner_product"] == inner[g, h]
                        cosine = inner[g, h] / np.sqrt(inner[g, g] * inner[h, h])
                        assert there["cosine"] == pytest.approx(cosine, rel=1e-6)
                        count += 1
    assert count == len(found) > 100


@pytest.mark.usefixtures("small")
def test_audits_steps_and_parameters(keys: Directory, tmp_path: Path) -> None:
    audits = by_key(exported(keys, tmp_path / "a.csv", "audits", "csv"), "step", "parameter")
    assert len(audits) == sum(len(row_of(step).parameters) for step in STEPS)
    assert audits[30, "late"]["residual"] == pytest.approx(row_of(30).parameters["late"].residual)
    assert audits[30, "late"]["owner_residual"] is None
    steps = exported(keys, tmp_path / "s.csv", "steps", "csv")
    assert [row["step"] for row in steps] == list(STEPS)
    for row in steps:
        given = row_of(int(row["step"]))
        assert (row["loss"], row["epoch"]) == (given.loss, given.epoch)
        assert row["scalar.accuracy"] == given.scalars["accuracy"]
        assert row["n_samples.diagnosis=HC"] == given.n_samples[1]
        assert row["n_samples.site=a"] == (given.n_samples[3] if len(given.groups) > 3 else 0)
    parameters = by_key(exported(keys, tmp_path / "p.parquet", "parameters"), "parameter")
    assert set(parameters) == {(name,) for name in (*WIDTHS, "frozen")}
    assert parameters["frozen",]["reason"] == "the op is opaque"
    assert (parameters["wide",]["shape"], parameters["wide",]["elements"]) == ("11x5", 55)
    assert parameters["wide",]["components"] == 16
    assert parameters["wide",]["tolerance"] == 1e-2
    assert json.loads(parameters["wide",]["attributes"])["kinds"] == list(KINDS)


@pytest.mark.usefixtures("small")
def test_a_selection_is_that_of_queries(keys: Directory, tmp_path: Path) -> None:
    asked = {"patterns": ["*1.*", "wide"], "groups": ["diagnosis=*"], "kinds": ["adjoint"], "steps": Span(9, 31)}
    rows = exported(keys, tmp_path / "x.parquet", "spectra", **asked, epochs=Span(0, 2), components=2)
    expected = [
        (record.step, record.parameter, record.group, int(place))
        for record in records(select(open_run(keys.root), Query(**asked, epochs=Span(0, 2), components=2)))
        for place, value in record.values.items()
        if not np.isnan(value)
    ]
    found = [(row["step"], row["parameter"], row["group"], row["component"]) for row in rows]
    assert sorted(found) == sorted(expected)
    assert {row["kind"] for row in rows} == {"adjoint"}
    rows = exported(keys, tmp_path / "m.parquet", "metrics", metrics=["condition", "sigma1"], steps=Span(4, 4))
    assert list(rows[0])[-3:] == ["status", "condition", "sigma1"]
    assert {row["step"] for row in rows} == {4}
    rows = exported(keys, tmp_path / "v.parquet", "metrics", probe="val")
    assert [(row["step"], row["parameter"], row["group"]) for row in rows] == [(7, "wide", "all")] * 3
    rows = exported(keys, tmp_path / "s.parquet", "steps", groups=["all"], steps=Span(4, 8))
    assert [name for name in rows[0] if name.startswith("n_samples")] == ["n_samples.all"]
    assert len(rows) == 3


def test_metrics_that_are_not_there_are_refused(keys: Directory, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="table `products`"):
        exported(keys, tmp_path / "x.parquet", "metrics", metrics=["cosine"])
    with pytest.raises(SelectionError, match="no metric 'rank'"):
        exported(keys, tmp_path / "x.parquet", "metrics", metrics=["rank"])
    assert list(tmp_path.glob("*x.parquet*")) == []


def test_strings_are_stored_once_and_the_run_is_in_the_metadata(
    keys: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradtrace.store.tables.parquet.ROW_GROUP", 2000)
    exported(keys, tmp_path / "x.parquet", "spectra")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    about = json.loads(file.schema_arrow.metadata[b"gradtrace"])
    assert about["run"] == {"seed": 7, "torch": "2.13.0"}
    assert (about["stream"], about["closed"], about["keep"]) == ("steps", True, 16)
    assert str(tmp_path) not in json.dumps(about)
    assert file.metadata.num_row_groups > 2
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups - 1)] == [2000] * (
        file.metadata.num_row_groups - 1
    )
    group = file.metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "RLE_DICTIONARY" in columns["parameter"].encodings
    assert "RLE_DICTIONARY" not in columns["value"].encodings
    assert str(file.schema_arrow.field("parameter").type).startswith("dictionary<values=string")
    assert str(file.schema_arrow.field("value").type) == "float"


@pytest.mark.parametrize("form", FORMATS)
def test_a_directory_holds_every_table_and_what_is_said_about_the_run(
    keys: Directory, tmp_path: Path, form: str
) -> None:
    target = tmp_path / "tables"
    done = Export(Query(), list(TABLES), form, single=False).write(keys, target)
    assert {path.name for path in target.iterdir()} == {"run.json", *(f"{name}.{form}" for name in TABLES)}
    about = json.loads((target / "run.json").read_text())
    assert about["run"]["seed"] == 7
    assert about["rows"] == dict(done.rows)
    assert all(len(rows_of(target / f"{name}.{form}")) == rows for name, rows in done.rows.items())


def test_the_same_run_gives_the_same_bytes(keys: Directory, tmp_path: Path) -> None:
    for form in FORMATS:
        for name in ("a", "b"):
            Export(Query(), ["metrics"], form, single=True).write(keys, tmp_path / f"{name}.{form}")
        assert (tmp_path / f"a.{form}").read_bytes() == (tmp_path / f"b.{form}").read_bytes()


def test_nothing_is_overwritten_unless_it_is_asked_for(keys: Directory, tmp_path: Path) -> None:
    single = Export(Query(), ["steps"], "csv", single=True)
    target = tmp_path / "steps.csv"
    target.write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        single.write(keys, target)
    assert target.read_text() == "mine"
    replace(single, force=True).write(keys, target)
    assert target.read_text().startswith("step,epoch,loss")
    several = Export(Query(), ["steps", "audits"], "csv", single=False)
    several.write(keys, tmp_path / "out")
    with pytest.raises(StoreError, match="is there already"):
        several.write(keys, tmp_path / "out")
    replace(several, force=True, tables=["audits"]).write(keys, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "audits.csv"}
    (tmp_path / "out" / "thesis.tex").write_text("years")
    for place in (tmp_path / "out", keys.root, target):
        with pytest.raises(StoreError, match="something else"):
            replace(several, force=True).write(keys, place)
    with pytest.raises(StoreError, match="something else"):
        replace(single, force=True).write(keys, keys.root)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years"
    assert len(open_run(keys.root).stream().steps) == len(STEPS)
    with pytest.raises(StoreError, match="no directory"):
        single.write(keys, tmp_path / "no" / "x.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "steps.csv", "run.zarr"}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("single", [True, False])
def test_what_fails_leaves_nothing(
    keys: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, single: bool
) -> None:
    monkeypatch.setattr("gradtrace.store.tables.blocks.BLOCK_VALUES", 500)
    next((keys.root / "steps" / "w16" / "gradient").glob("c.2.*")).unlink()
    with pytest.raises(StoreError, match="marked as measured"):
        Export(Query(), ["spectra"], form, single=single).write(keys, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run.zarr"}


def test_a_lost_chunk_of_metrics_is_noticed(keys: Directory, tmp_path: Path) -> None:
    next((keys.root / "steps" / "w16" / "metrics").glob("c.1.*")).unlink()
    with pytest.raises(StoreError, match="marked as measured"):
        exported(keys, tmp_path / "x.csv", "metrics", "csv")


@pytest.mark.parametrize("table", [name for name in TABLES if name != "parameters"])
def test_a_run_that_is_rewound_meanwhile_is_exported_anew(
    keys: Directory, tmp_path: Path, new_writer: Make, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """Rows of before and after the rewind never stand in one file."""
    maker, calls = TABLES[table], []

    def rewinding(*arguments: Any) -> Any:
        made = maker(*arguments)
        calls.append(made)
        if len(calls) == 1:
            new_writer(parameters=infos(list(WIDTHS)), keep=16, flush_every=4, resume=20).close()
        return made

    monkeypatch.setitem(TABLES, table, rewinding)
    rows = exported(keys, tmp_path / "x.csv", table, "csv")
    assert len(calls) == 2
    assert {row["step"] for row in rows} == set(range(0, 20, 2)) - ({8} if table == "spectra" else set())


def test_an_empty_selection_writes_nothing(keys: Directory, tmp_path: Path) -> None:
    for table, asked in (("spectra", {"patterns": ["none*"]}), ("products", {"groups": ["all"]})):
        done = Export(Query(**asked), [table], "csv", single=True).write(keys, tmp_path / "x.csv")
        assert isinstance(done, Exported)
        assert not any(done.rows.values())
        assert not (tmp_path / "x.csv").exists()


def test_a_run_without_products_has_an_empty_table_among_others(keys: Directory, tmp_path: Path) -> None:
    query = Query(kinds=["activation"], patterns=["fc1.bias", "wide"])
    done = Export(query, list(TABLES), "parquet", single=False).write(keys, tmp_path / "out")
    assert done.rows["products"] == 0
    assert pq.read_table(tmp_path / "out" / "products.parquet").num_rows == 0
    assert {row["parameter"] for row in rows_of(tmp_path / "out" / "metrics.parquet")} == {"wide"}


def test_without_pyarrow_csv_works_and_parquet_says_what_to_install(keys: Directory, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from gradtrace.errors import StoreError
from gradtrace.store.tables.export import Export, Query
from gradtrace.store.places.place import keys_at
keys, out = keys_at({str(keys.root)!r}), Path({str(tmp_path)!r})
try:
    Export(Query(), ["metrics"], "parquet", single=True).write(keys, out / "x.parquet")
except StoreError as error:
    print(error)
print(Export(Query(), ["metrics"], "csv", single=True).write(keys, out / "x.csv").rows)
print([name for name in ("torch", "xarray", "pandas") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "pip install 'gradtrace[parquet]'; or write CSV" in lines[0]
    assert lines[1] == str({"metrics": len(rows_of(tmp_path / "x.csv"))})
    assert lines[2] == "[]"


def test_memory_does_not_grow_with_the_run(new_writer: Make, tmp_path: Path) -> None:
    """Ten times the rows, and not a megabyte more is held than a block of them."""
    import tracemalloc

    def peak(steps: int) -> int:
        with new_writer(["w"], path=tmp_path / f"{steps}.zarr", flush_every=64) as writer:
            for step in range(steps):
                writer.append(StepRow(step, ("all",), np.ones(1), {"w": row}))
        export = Export(Query(kinds=["gradient"]), ["spectra"], "csv.gz", single=True)
        tracemalloc.start()
        assert export.write(Directory(Path(writer.path)), tmp_path / f"{steps}.csv.gz").rows == {"spectra": 64 * steps}
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    row = parameter_row(1, groups=1, width=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradtrace.store.tables.blocks.BLOCK_VALUES", 1 << 13)
        few = peak(256)
        assert peak(2560) < few + (1 << 20)
