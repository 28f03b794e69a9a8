"""What is hidden cannot be had from what is shown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.hiding import hidden_groups, without
from gradtrace.store.rows import Status, StepRow
from tests.store.samples import parameter_row

COUNTS = st.lists(st.integers(0, 12), min_size=2, max_size=6)


def grouped(sites: list[int], sexes: int) -> tuple[dict[str, list[int]], dict[int, int]]:
    """Groups of two groupings that cross, and the samples of their cells."""
    cells = {(site, sex): 1 + site * sexes + sex for site in range(len(sites)) for sex in range(sexes)}
    counts = {cell: sites[site] // (1 + sex) for (site, sex), cell in cells.items()}
    groups = {"all": [0, *cells.values()]}
    groups |= {f"site={s}": [c for (site, _), c in cells.items() if site == s] for s in range(len(sites))}
    groups |= {f"sex={s}": [c for (_, sex), c in cells.items() if sex == s] for s in range(sexes)}
    return groups, counts


@settings(max_examples=300, deadline=None)
@given(COUNTS, st.integers(1, 3), st.integers(2, 6))
def test_no_hidden_group_is_a_combination_of_shown_ones(sites: list[int], sexes: int, least: int) -> None:
    groups, counts = grouped(sites, sexes)
    hidden = hidden_groups(groups, counts, least)
    size = {name: sum(counts.get(cell, 0) for cell in own) for name, own in groups.items()}
    cells = sorted({cell for own in groups.values() for cell in own if counts.get(cell, 0)})
    vector = {name: np.array([float(cell in own) for cell in cells]) for name, own in groups.items()}
    shown = [name for name in groups if size[name] and name not in hidden]
    for name in groups:
        if 0 < size[name] < least:
            assert name in hidden
        if size[name] == 0:
            assert name not in hidden, "there is nothing to hide"
        if name in hidden and shown:
            matrix = np.array([vector[one] for one in shown])
            assert np.linalg.matrix_rank(np.vstack([matrix, vector[name]])) > np.linalg.matrix_rank(matrix)
    for outer in shown:
        for inner in shown:
            if (vector[inner] <= vector[outer]).all():
                assert not 0 < size[outer] - size[inner] < least


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(5, 12), min_size=2, max_size=6))
def test_where_all_groups_are_large_nothing_is_hidden(sites: list[int]) -> None:
    groups, counts = grouped(sites, 1)
    groups.pop("sex=0")  # the same as all
    assert hidden_groups(groups, counts, 5) == frozenset()


@pytest.mark.parametrize(
    ("sizes", "hidden"),
    [
        ((50, 50, 3), {"g2", "g0"}),  # with the other two, it could be had; one of them goes with it
        ((50, 40, 3), {"g2", "g1"}),  # the smaller of them
        ((50, 3, 2), {"g0", "g1", "g2"}),  # together they are still too few
        ((50, 8, 9), {"g1", "g2"}),  # together they hide each other
        ((50, 3), {"g0", "g1"}),
        ((3, 2), {"g0", "g1", "all"}),
        ((50, 50, 0), set()),
    ],
)
def test_examples(sizes: tuple[int, ...], hidden: set[str]) -> None:
    groups = {"all": [0, *range(1, len(sizes) + 1)]} | {f"g{i}": [i + 1] for i in range(len(sizes))}
    found = hidden_groups(groups, {i + 1: n for i, n in enumerate(sizes)}, 10)
    assert found == hidden


def test_nothing_of_a_hidden_group_is_left_in_a_row() -> None:
    measured = parameter_row(1)
    row = StepRow(0, ("all", "a", "b"), np.array([9, 7, 2]), {"w": measured})
    found = without(row, frozenset(["b"]))
    own = found.parameters["w"]
    assert found.n_samples.tolist() == [9, 7, 0]
    assert own.status["gradient"].tolist() == [Status.MEASURED, Status.MEASURED, Status.TOO_FEW]
    assert np.isnan(own.inner_product[2]).all()
    assert np.isnan(own.inner_product[:, 2]).all()
    assert np.isfinite(own.inner_product[:2, :2]).all()
    for values in (*own.spectra.values(), *(v for m in own.metrics.values() for v in m.values())):
        assert np.isnan(values[2]).all()
        assert np.isfinite(values[:2]).all()
    assert without(row, frozenset()) is row
