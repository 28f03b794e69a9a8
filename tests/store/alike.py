"""Whether two runs hold the same, wherever they lie and however they are packed."""

from __future__ import annotations

import numpy as np

from gradtrace.store.reading.reader import Run
from gradtrace.store.reading.stream import Stream


def assert_alike(one: Run, other: Run) -> None:
    """Everything that a run says and holds, to the last bit."""
    for name in ("attrs", "closed", "kinds", "keep", "committed", "parameters", "groups", "probe_names"):
        assert getattr(one, name) == getattr(other, name), name
    assert_streams_alike(one.stream(), other.stream())
    for probe in one.probe_names:
        assert_streams_alike(one.stream(probe), other.stream(probe))


def assert_streams_alike(one: Stream, other: Stream) -> None:
    np.testing.assert_array_equal(one.steps, other.steps)
    for name in ("name", "groups", "scalar_names", "cost_parts"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("loss", "epoch", "n_samples", "scalars", "cost"):
        assert_bits_alike(one.per_step(name), other.per_step(name))
    assert {name: place.width for name, place in one.places.items()} == {
        name: place.width for name, place in other.places.items()
    }
    for parameter in one.places:
        assert set(one.variables(parameter)) == set(other.variables(parameter))
        for variable, found in one.variables(parameter).items():
            assert found.dims == other.variables(parameter)[variable].dims
            assert_bits_alike(one.read(parameter, variable), other.read(parameter, variable))


def assert_bits_alike(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
    there = ~np.isnan(one) if one.dtype.kind == "f" else slice(None)
    assert one[there].tobytes() == other[there].tobytes()  # which tells 0.0 from -0.0
