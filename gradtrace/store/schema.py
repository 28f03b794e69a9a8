"""The layout of a run store: names, dimensions, fill values and chunk sizes; in prose, `docs/reference/store.md`.

A store is one zarr group (format 3). Its root attributes, in full:

    gradtrace_schema   "major.minor"; a reader refuses a newer major
    id                 random, the same as long as the run is
    committed          stream path -> number of rows a reader may trust
    closed             False while the run is being written (or when it was killed), True after close()
    kinds, keep        what was asked to be recorded
    parameters         one {name, shape, attrs} per traced parameter, in order
    run                whatever the recorder says about the run (versions, seed, dtype, ...)
    archive            of archives: the command that made it
    runs               of merged runs: label -> its own attributes

Below it, one group per stream (`steps`, `probes/<name>`), and in each one group per width class (`w16`, `w64`, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradtrace.store.rows import Status

SCHEMA = (1, 2)
MAIN_STREAM = "steps"
PROBES = "probes"

STEP, PARAMETER, GROUP, GROUP_OTHER, COMPONENT = "step", "parameter", "group", "group_other", "component"
KIND, METRIC, SCALAR, PART = "kind", "metric", "scalar", "part"
METRICS = "metrics"
RUN = "run"  # the first dimension of the arrays of merged runs

INNER_PRODUCT, RESIDUAL, OWNER_RESIDUAL, STATUS = "inner_product", "residual", "owner_residual", "status"

STRING = "string"  # the type of names
FILLS: Mapping[str, Any] = {
    "float32": math.nan,
    "float64": math.nan,
    "int64": 0,
    "uint8": Status.GROUP_ABSENT,
    STRING: "",
}

SERIES_CHUNK = 16384  # rows of step, loss and epoch in one chunk: many small chunks make opening slow
TABLE_CHUNK = (4096, 16)  # rows x names of n_samples, scalars and cost
LABELS_CHUNK = 1024
CHUNK_BYTES = 1 << 20  # a chunk of spectra, uncompressed
BLOCK_BYTES = 32 << 20  # the rows of one array kept in memory until their chunks are full
MOST_PARAMETERS, MOST_NARROW = 32, 1024  # in a chunk of spectra, and of arrays without components
METRICS_CHUNK = 8

STATUS_ATTRIBUTES: Mapping[str, Any] = {
    "flag_values": list(range(len(Status.NAMES))),
    "flag_meanings": " ".join(name.replace(" ", "_") for name in Status.NAMES),
}


def width_class(components: int) -> int:
    """The smallest power of four that holds `components`: few classes, little padding that compresses away."""
    width = 1
    while width < components:
        width *= 4
    return width


def status_variable(kind: str) -> str:
    """What the tree view calls a kind's status codes."""
    return STATUS if kind == "gradient" else f"{kind}_{STATUS}"


def metric_variable(kind: str, metric: str) -> str:
    """What the tree view calls a metric of a kind; the gradient's metrics go by their bare names."""
    return metric if kind == "gradient" else f"{kind}_{metric}"


def probe_stream(name: str) -> str:
    """The stream, as the writer is told it, of the probe called `name`."""
    return f"probe/{name}"


def chunk_shape(dims: Sequence[str], lengths: Mapping[str, int], *, steps: int) -> tuple[int, ...]:
    """The chunks of an array (step, parameter, ...), given the lengths of its other axes when it is created.

    Chunks hold `steps` steps and stay near CHUNK_BYTES; where that cannot be, or where all chunks of one block of steps
    would exceed BLOCK_BYTES, they hold fewer steps.
    """
    trailing = tuple(lengths[dim] for dim in dims[2:])
    size = 4 * math.prod(trailing)
    while steps > 1 and (steps * size > CHUNK_BYTES or steps * size * lengths[PARAMETER] > BLOCK_BYTES):
        steps //= 2
    limit = MOST_PARAMETERS if COMPONENT in dims else MOST_NARROW
    most = min(max(1, CHUNK_BYTES // (steps * size)), limit)
    return (steps, even_share(lengths[PARAMETER], most), *trailing)


def even_share(count: int, most: int) -> int:
    """The chunk length that splits `count` evenly into as few chunks of at most `most` as possible."""
    chunks = max(1, math.ceil(count / most))
    return max(1, math.ceil(count / chunks))
