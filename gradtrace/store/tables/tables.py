"""The tables that a run is exported as: tidy, one observation a row, made block by block from the store's arrays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gradtrace.errors import SelectionError
from gradtrace.metrics import BUILT_IN, METRICS
from gradtrace.store.queries.query import Whole, cosines_of
from gradtrace.store.queries.selection import OF_PRODUCTS, Selected, recorded_metrics
from gradtrace.store.reading.reader import Run
from gradtrace.store.rows import Status
from gradtrace.store.schema import INNER_PRODUCT, OWNER_RESIDUAL, RESIDUAL, metric_variable
from gradtrace.store.tables.blocks import SIGMA1, Part, parts
from gradtrace.store.tables.columns import STRING, TEXT, Block, Coded, text

WHEN = {"step": "int64", "epoch": "float64", "parameter": TEXT}
FOR_WHOM = {**WHEN, "kind": TEXT, "group": TEXT}


@dataclass(frozen=True)
class Table:
    """The rows of one table. columns: name -> numpy's dtype, or one of those of `gradtrace.store.tables.columns`."""

    columns: Mapping[str, str]
    blocks: Iterator[Block]


def spectra(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per singular value."""

    def blocks() -> Iterator[Block]:
        keys = _Keys(selected)
        for part in parts(selected, whole):
            values, status = part.spectra(selected.components), part.status()
            part.check(status, np.isnan(values).all(axis=-1))
            there = ~np.isnan(values) & (status == Status.MEASURED)[..., None]
            *place, component = np.nonzero(there)
            yield {
                **keys.of(part, *place),
                "component": Coded(component, np.arange(1, values.shape[-1] + 1, dtype=np.int32)),
                "value": values[there],
            }

    return Table({**FOR_WHOM, "component": "int32", "value": "float32"}, blocks())


def metrics(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per step, parameter, kind and group, with a column per metric; absent groups and kinds have none."""
    names = _metric_names(selected)

    def blocks() -> Iterator[Block]:
        keys, statuses = _Keys(selected), text(Status.NAMES)
        samples = selected.stream.per_step("n_samples")
        for part in parts(selected, whole):
            status, found = part.status(), part.metrics(names)
            for together in ([SIGMA1], [name for name in names if name in BUILT_IN and name != SIGMA1]):
                if known := [found[name] for name in together if name in found]:
                    part.check(status, np.isnan(np.stack(known)).all(axis=0))
            there = (status != Status.GROUP_ABSENT) & (status != Status.KIND_ABSENT)
            place = np.nonzero(there)
            yield {
                **keys.of(part, *place),
                "n_samples": samples[part.rows[place[1]], np.array(selected.groups)[place[3]]],
                "status": Coded(status[there], statuses),
                **{name: values[there] for name, values in found.items()},
            }

    return Table({**FOR_WHOM, "n_samples": "int64", "status": TEXT, **dict.fromkeys(names, "float32")}, blocks())


def products(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per step, parameter and pair of groups."""

    def blocks() -> Iterator[Block]:
        keys, groups = _Keys(selected), list(selected.groups)
        first, second = np.triu_indices(len(groups), 1)
        for part in parts(selected, whole) if "gradient" in selected.kinds else ():
            if INNER_PRODUCT in part.variables:
                inner = part.read(INNER_PRODUCT)[..., groups]
                pairs, cosines = inner[..., first, second], cosines_of(inner)[..., first, second]
                parameter, row, pair = np.nonzero(~np.isnan(pairs))
                yield {
                    **keys.when(part, parameter, row),
                    "group": Coded(first[pair], keys.groups),
                    "group_other": Coded(second[pair], keys.groups),
                    "inner_product": pairs[parameter, row, pair],
                    "cosine": cosines[parameter, row, pair].astype(np.float32),
                }

    numbers = {"inner_product": "float32", "cosine": "float32"}
    return Table({**WHEN, "group": TEXT, "group_other": TEXT, **numbers}, blocks())


def audits(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per step and parameter that was audited."""

    def blocks() -> Iterator[Block]:
        keys = _Keys(selected)
        for part in parts(selected, whole):
            found = {name: part.read(name) for name in (RESIDUAL, OWNER_RESIDUAL) if name in part.variables}
            nothing = np.full((len(part.names), len(part.rows)), np.nan, np.float32)
            both = {name: found.get(name, nothing) for name in (RESIDUAL, OWNER_RESIDUAL)}
            there = np.logical_or.reduce([~np.isnan(values) for values in both.values()])
            yield {
                **keys.when(part, *np.nonzero(there)),
                **{name: values[there] for name, values in both.items()},
            }

    return Table({**WHEN, RESIDUAL: "float32", OWNER_RESIDUAL: "float32"}, blocks())


def steps(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per step: loss, scalars, what tracing cost, and how many samples of each group there were."""
    stream, rows = selected.stream, selected.rows
    scalars, samples, cost = (stream.per_step(name)[rows] for name in ("scalars", "n_samples", "cost"))
    found: dict[str, np.ndarray] = {"step": stream.steps[rows]}
    found |= {name: stream.per_step(name)[rows] for name in ("epoch", "loss")}
    found |= {f"scalar.{name}": scalars[:, at] for at, name in enumerate(stream.scalar_names)}
    found |= {f"n_samples.{stream.groups[at]}": samples[:, at] for at in selected.groups}
    found |= {f"cost.{name}": cost[:, at] for at, name in enumerate(stream.cost_parts)}
    return Table({name: str(values.dtype) for name, values in found.items()}, iter([found]))


def parameters(run: Run, selected: Selected, whole: Whole) -> Table:
    """One row per parameter, measured or not; `attributes` has all that is said about it, as JSON."""
    names = [name for name in run.parameters if name in {*selected.parameters, *selected.unmeasured}]
    infos = [run.parameters[name] for name in names]
    places = [selected.stream.places.get(name) for name in names]

    def said(key: str) -> np.ndarray:
        return text(tuple(info.attrs.get(key) or None for info in infos))

    found: dict[str, np.ndarray] = {
        "parameter": text(tuple(names)),
        "shape": text(tuple("x".join(map(str, info.shape)) or "scalar" for info in infos)),
        "elements": np.array([math.prod(info.shape) for info in infos], dtype=np.int64),
        "components": np.array([place.width if place else 0 for place in places], dtype=np.int64),
        **{key: said(key) for key in ("dtype", "rung", "ownership", "reason")},
        "tolerance": np.array([_number(info.attrs.get("tolerance")) for info in infos], dtype=np.float64),
        "attributes": text(tuple(json.dumps(dict(info.attrs), ensure_ascii=False) for info in infos)),
    }
    columns = {name: STRING if values.dtype == object else str(values.dtype) for name, values in found.items()}
    return Table(columns, iter([found]))


Maker = Callable[[Run, Selected, Whole], Table]
TABLES: Mapping[str, Maker] = {
    "spectra": spectra,
    "metrics": metrics,
    "products": products,
    "audits": audits,
    "steps": steps,
    "parameters": parameters,
}


class _Keys:
    """The columns that say which observation a row is, given positions in a part's arrays."""

    def __init__(self, selected: Selected) -> None:
        self._stream = selected.stream
        self._epochs = selected.stream.per_step("epoch")
        self.parameters, self.kinds = text(selected.parameters), text(selected.kinds)
        self.groups = text(selected.group_names)

    def when(self, part: Part, parameter: np.ndarray, row: np.ndarray) -> dict[str, Coded]:
        return {
            "step": Coded(row, self._stream.steps[part.rows]),
            "epoch": Coded(row, self._epochs[part.rows]),
            "parameter": Coded(part.names[parameter], self.parameters),
        }

    def of(
        self, part: Part, parameter: np.ndarray, row: np.ndarray, kind: np.ndarray, group: np.ndarray
    ) -> dict[str, Coded]:
        keys = self.when(part, parameter, row)
        return keys | {"kind": Coded(kind, self.kinds), "group": Coded(group, self.groups)}


def _metric_names(selected: Selected) -> tuple[str, ...]:
    """The metrics asked for, or all that were recorded."""
    firsts = {selected.stream.places[name].member: name for name in selected.parameters}
    known = set[str]().union(*(selected.stream.variables(name) for name in firsts.values()))
    every = dict.fromkeys((*METRICS, *recorded_metrics(selected.stream)))
    there = [m for m in every if m == SIGMA1 or any(metric_variable(kind, m) in known for kind in selected.kinds)]
    for name in selected.metrics:
        if name in OF_PRODUCTS:
            raise SelectionError(
                f"The {name} is in the table `products`, or follows from it, and not among the metrics. Leave it out."
            )
        if name not in there:
            raise SelectionError(f"This run did not record the metric {name!r}. It recorded: {', '.join(there)}.")
    return tuple(selected.metrics or there)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
