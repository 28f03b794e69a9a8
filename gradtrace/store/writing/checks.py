"""What a row must satisfy before it is taken: checked in the caller's thread, where the mistake was made."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.errors import StoreError, nearest
from gradtrace.store.names import check_names, directory_name
from gradtrace.store.rows import ParameterRow, StepRow
from gradtrace.store.schema import MAIN_STREAM, PROBES


def stream_path(stream: str) -> str:
    """The zarr group of a stream: "steps", or "probes/<name>" for "probe/<name>"."""
    if stream == MAIN_STREAM:
        return MAIN_STREAM
    prefix, _, name = stream.partition("/")
    if prefix != "probe" or not name:
        raise StoreError(f"There is no stream {stream!r}. Use {MAIN_STREAM!r}, or 'probe/<name>' for a probe.")
    check_names("probe name", [name])
    return f"{PROBES}/{directory_name(name)}"


def row_bytes(row: StepRow) -> int:
    """About how much memory a row holds on to."""
    return sum(
        measured.inner_product.nbytes + sum(values.nbytes for values in measured.spectra.values()) + 1024
        for measured in row.parameters.values()
    )


def check_row(row: StepRow, stream: str, *, known: Container[str], kinds: Sequence[str], last: int | None) -> None:
    """None, or a StoreError saying what is wrong with the row."""
    if last is not None and row.step <= last:
        raise StoreError(
            f"Step {row.step} of {stream!r} comes after step {last}; steps must increase. "
            "Record a repeated or resumed training into a new path."
        )
    check_names("group", row.groups)
    check_names("name of a scalar", row.scalars)
    if len(set(row.groups)) != len(row.groups):
        raise StoreError(f"Step {row.step} of {stream!r} names a group twice: {', '.join(row.groups)}.")
    _check_length(len(row.n_samples), row, "n_samples")
    for name, measured in row.parameters.items():
        if name not in known:
            choices = nearest(name, known) if isinstance(known, Mapping) else ""
            raise StoreError(
                f"Step {row.step} measures {name!r}, which the store does not know. {choices} "
                "Make it known by add_parameter() first."
            )
        _check_kinds(name, measured, row, kinds)
        _check_parameter(name, measured, row)


def _check_kinds(name: str, measured: ParameterRow, row: StepRow, kinds: Sequence[str]) -> None:
    for kind in (*measured.spectra, *measured.metrics, *measured.status):
        if kind not in kinds:
            raise StoreError(
                f"Step {row.step} measures the {kind!r} of {name!r}, but this run records {', '.join(kinds)}. "
                "Name it in kinds= when the run is opened for writing."
            )


def _check_parameter(name: str, measured: ParameterRow, row: StepRow) -> None:
    for kind, spectrum in measured.spectra.items():
        if np.ndim(spectrum) != 2:
            raise StoreError(
                f"The {kind} of {name!r} in step {row.step} has shape {np.shape(spectrum)}; "
                "spectra are (groups, components)."
            )
        _check_length(len(spectrum), row, f"the {kind} of {name!r}")
    _check_each(measured.status.items(), row, f"status of {name!r}")
    for kind, metrics in measured.metrics.items():
        _check_each(metrics.items(), row, f"{kind} metrics of {name!r}")
    if np.shape(measured.inner_product) != (len(row.groups),) * 2:
        raise StoreError(
            f"The inner_product of {name!r} in step {row.step} has shape {np.shape(measured.inner_product)}; "
            f"with {len(row.groups)} groups it is {(len(row.groups),) * 2}."
        )


def _check_each(items: Iterable[tuple[str, Any]], row: StepRow, what: str) -> None:
    for key, values in items:
        _check_length(np.size(values), row, f"{key} in the {what}")


def _check_length(found: int, row: StepRow, what: str) -> None:
    if found != len(row.groups):
        raise StoreError(f"Step {row.step} has {len(row.groups)} groups, but {what} has {found} entries.")
