"""Rows whose numbers agree with each other, as a recorder's do, runs made of them, and ways to damage these."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc

from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.checking.finding import DAMAGE, Finding
from gradtrace.store.checking.repair import repair
from gradtrace.store.checking.verify import verify
from gradtrace.store.chunks import CRC, Packing
from gradtrace.store.places.keys import Directory, Keys, Memory
from gradtrace.store.reading.reader import Run, open_keys
from gradtrace.store.rows import KINDS, ParameterInfo, ParameterRow, Status, StepRow
from gradtrace.store.writing.column import _encode_strings
from gradtrace.store.writing.writer import RunWriter

WIDTHS = {"bias": 1, "fc.weight": 3, "conv/weight ü": 7}
KEEP = 5  # the spectra of the last one are cut
GROUPS = ("all", "sex=f", "sex=m", "sex=<missing>")


def parameter_row(seed: int, width: int, n_samples: np.ndarray) -> ParameterRow:
    """What a step measured of a parameter; groups without samples are absent."""
    rng = np.random.default_rng(seed)
    present, groups = n_samples > 0, len(n_samples)
    whole = {kind: -np.sort(-rng.random((groups, width)) - 0.01, axis=1) for kind in KINDS}
    for sigma in whole.values():
        sigma[~present] = np.nan
    metrics = {kind: {name: METRICS[name](sigma) for name in WHOLE} for kind, sigma in whole.items()}
    directions = rng.normal(size=(groups, 4))
    directions *= (metrics["gradient"]["frobenius"] / np.linalg.norm(directions, axis=1))[:, None]
    return ParameterRow(
        spectra={kind: sigma[:, :KEEP] for kind, sigma in whole.items()},
        metrics=metrics,
        status={kind: np.where(present, Status.MEASURED, Status.GROUP_ABSENT).astype(np.uint8) for kind in KINDS},
        inner_product=directions @ directions.T,
        residual=1e-7,
        owner_residual=float("nan") if seed // 100 % 2 else 1e-7,
    )


def step_row(step: int, names: Sequence[str] = tuple(WIDTHS), *, groups: int = len(GROUPS)) -> StepRow:
    """A step in which the last of the groups, if there are several, has no samples now and then."""
    counts = np.array([0, *range(1, groups)]) + step % 3
    if groups > 2 and step % 4 == 1:
        counts[-1] = 0
    counts[0] = counts[1:].sum() if groups > 1 else 5
    rows = {name: parameter_row(100 * step + i, WIDTHS[name], counts) for i, name in enumerate(names)}
    return StepRow(
        step, GROUPS[:groups], counts, rows,
        loss=1 / (step + 1), epoch=step // 4, scalars={"lr": 0.1}, cost={"reduce": 0.25},
    )  # fmt: skip


def spoiled(row: StepRow, name: str) -> StepRow:
    """The row, with a gradient that was not finite and an adjoint that the parameter does not have."""
    measured, nothing = row.parameters[name], {metric: np.full(len(row.groups), np.nan) for metric in WHOLE}
    present = row.n_samples > 0
    status = {kind: np.where(present, code, 0) for kind, code in (("gradient", 3), ("adjoint", 2), ("activation", 1))}
    other = ParameterRow(
        spectra={k: v if k == "activation" else np.full_like(v, np.nan) for k, v in measured.spectra.items()},
        metrics={k: v if k == "activation" else nothing for k, v in measured.metrics.items()},
        status=status,
        inner_product=np.full_like(measured.inner_product, np.nan),
    )
    return replace(row, parameters={**row.parameters, name: other})


def write(writer: RunWriter, steps: Sequence[int]) -> None:
    """Rows in which groups and parameters join, one thing was not finite, and two probes."""
    for step in steps:
        row = step_row(step, tuple(WIDTHS)[: 2 + step // 3], groups=min(2 + step, len(GROUPS)))
        writer.append(spoiled(row, "fc.weight") if step == 3 else row)
        if step % 4 == 2:
            writer.append(step_row(step, ("bias", "fc.weight"), groups=3), stream="probe/val")


def infos() -> list[ParameterInfo]:
    return [ParameterInfo(name, (9, width), {"rung": "factored"}) for name, width in WIDTHS.items()]


def make(where: str | Path, steps: int = 10, **options: Any) -> RunWriter:
    """A writer of a run, with so many steps appended."""
    writer = RunWriter(
        where, attrs={"seed": 7}, kinds=KINDS, keep=KEEP, parameters=infos(), **{"flush_every": 4, **options}
    )
    write(writer, range(steps))
    return writer


ROWS = 10  # of the run that is damaged; four of them in a block


@functools.cache
def intact() -> Mapping[str, bytes]:
    """Key -> bytes of a closed run."""
    make("memory://intact", ROWS).close()
    keys = Memory("intact")
    return {key: keys.get(key) or b"" for key in keys.list()}


def lay_out(path: Path) -> Path:
    """The closed run as a directory, to be damaged."""
    for key, data in intact().items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(data)
    return path


def leaves(path: Path) -> dict[str, bytes]:
    """Every file, by its key."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------- ways to damage it


def change(*keys: Any, to: Any) -> Callable[[Any], object]:
    """A change of a document: what stands under the keys becomes something else."""

    def inside(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = to

    return inside


def change_member(member: str, *keys: Any, to: Any) -> Callable[[Any], object]:
    """The same of what the root says of an array or group."""
    return change("consolidated_metadata", "metadata", member, *keys, to=to)


def edit(path: Path, change: Callable[[Any], object], member: str = "") -> None:
    """Change a zarr.json in place."""
    file = path / member / "zarr.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def members_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    return found


def chunk_of(path: Path, array: str, number: int = 0) -> Path:
    """The first chunk, or the first of those of that number along the first axis."""
    return sorted((path / array).glob(f"c.{number}*"))[0]


def change_values(path: Path, array: str, change: Callable[[np.ndarray], object], number: int = 0) -> None:
    """Change the values of a chunk in place."""
    file, packing = chunk_of(path, array, number), Packing.of(members_of(path)[array])
    values = packing.unpack(file.read_bytes()).copy()
    change(values)
    if packing.dtype == "string":
        file.write_bytes(sealed(_encode_strings(values.tolist())))
    else:
        packed = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE).encode(np.ascontiguousarray(values))
        file.write_bytes(sealed(packed))


def sealed(data: bytes) -> bytes:
    """The bytes of a chunk with their checksum."""
    return data + google_crc32c.value(data).to_bytes(CRC, "little")


# ---------------------------------------------------------------------- what it holds


def contents(run: Run | Keys) -> dict[str, Any]:
    """Everything that a reader finds: name -> value."""
    run = run if isinstance(run, Run) else open_keys(run)
    found: dict[str, Any] = {"committed": run.committed, "closed": run.closed, "kinds": run.kinds, "keep": run.keep}
    found |= {"parameters": dict(run.parameters), "run": run.attrs}
    for probe in (None, *run.probe_names):
        stream = run.stream(probe)
        here = stream.name
        found |= {f"{here}|groups": stream.groups, f"{here}|steps": stream.steps, f"{here}|places": stream.places}
        found |= {f"{here}|scalar": stream.scalar_names, f"{here}|part": stream.cost_parts}
        for name in ("loss", "epoch", "n_samples", "scalars", "cost"):
            found[f"{here}|{name}"] = stream.per_step(name)
        for parameter in stream.places:
            for variable in stream.variables(parameter):
                found[f"{here}|{parameter}|{variable}"] = stream.read(parameter, variable)
    return found


@functools.cache
def intact_contents() -> Mapping[str, Any]:
    intact()
    return contents(Memory("intact"))


def damage_in(path: Path) -> list[Finding]:
    return [one for one in verify(Directory(path)) if one.severity == DAMAGE]


def assert_same(before: Mapping[str, Any], after: Mapping[str, Any], rows: Mapping[str, int]) -> None:
    """The first rows of each stream are what they were, to the last bit; names and attributes are."""
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(after[name], value[: rows[name.split("|")[0]]], err_msg=name)
        elif name != "committed":
            assert after[name] == value, name


def assert_repaired(path: Path, rows: int) -> None:
    """After repairing, so many rows of the training run are there, as they were, and all is well."""
    done, left = repair(Directory(path))
    assert left == []
    assert verify(Directory(path)) == []
    assert any(f"{ROWS - rows} of the {ROWS} rows" in sentence for sentence in done) == (rows < ROWS)
    after = contents(Directory(path))
    assert after["committed"] == {**intact_contents()["committed"], "steps": rows}
    assert_same(intact_contents(), after, after["committed"])
    assert repair(Directory(path)) == ([], []), "there is nothing more to do"
