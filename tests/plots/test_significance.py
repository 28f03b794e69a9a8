"""A picture of a difference marks when it is more than chance, as the cluster test has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradtrace.plots.pictures import PICTURES
from gradtrace.plots.reading import Series
from gradtrace.plots.request import Request
from gradtrace.plots.significance import significant_steps
from gradtrace.store import merge
from gradtrace.store.places.keys import Keys
from gradtrace.store.places.place import keys_at
from gradtrace.store.queries.selection import Query
from tests.inference.synthetic import GROUPS, write_run

A, B = GROUPS[1:]
NAMES = ("fc1.weight", "fc2.weight")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Eight runs whose group A has gradients four times as large from step 20 on."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for seed in range(8):
        path = write_run(folder / f"{seed}.zarr", seed, steps=range(20))
        runs[str(seed)] = write_run(path, 50 + seed, steps=range(20, 40), level={A: 2.0}, resume=True)
    merge(runs, folder / "all.zarr")
    return keys_at(folder / "all.zarr")


def asked(metric: str = "sigma1") -> Request:
    return Request(Query(NAMES, ("gradient",), (A, B), metrics=(metric,)))


def series(steps: np.ndarray) -> Series:
    return Series((), NAMES, steps, (A, B), np.zeros((1, 2, len(steps), 2)))


def test_the_steps_of_significant_clusters_are_marked(merged: Keys) -> None:
    marked, said = significant_steps(merged, asked(), series(np.arange(40)))
    assert marked[:, 22:].all()
    assert not marked[:, :16].any()
    assert "over 8 runs" in said


def test_a_picture_of_fewer_steps_is_marked_where_these_are(merged: Keys) -> None:
    marked, _ = significant_steps(merged, asked(), series(np.arange(0, 40, 5)))
    assert marked.tolist() == [[False] * 4 + [True] * 4] * 2


def test_the_bars_are_drawn_and_the_caption_names_the_test(merged: Keys) -> None:
    picture = PICTURES["difference"](merged, asked())
    bars = [bar for axis in picture.figure.axes for bar in axis.collections if bar.get_label() != ""]
    spans = [path.vertices[:, 0] for bar in bars for path in bar.get_paths() if path.vertices[:, 1].max() < 0.1]
    assert min(span.min() for span in spans) == pytest.approx(19.5, abs=3)
    assert "clusters with q ≤ 0.05, over what is shown, of a cluster test over 8 runs" in picture.caption


def test_of_one_run_that_is_too_short_nothing_is_marked(tmp_path: Path) -> None:
    keys = keys_at(write_run(tmp_path / "run.zarr", 0, steps=range(12), level={A: 3.0}))
    marked, said = significant_steps(keys, asked(), series(np.arange(12)))
    assert not marked.any()
    assert said.endswith("of this run; of 2 too few independent stretches are there to tell.")
