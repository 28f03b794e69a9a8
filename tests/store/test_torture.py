"""A few of the kills that `make torture` makes hundreds of."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.store.torture import Torture


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_when_a_recording_is_killed(tmp_path: Path, seed: int) -> None:
    torture, rng = Torture(tmp_path / "a run ü.zarr", steps=160), random.Random(seed)
    for count in range(6):
        back = torture.seen // 2 if count == 4 else True
        torture.kill_after(rng.choice([0, 1, 9, 20]), rng.uniform(0, 0.2), rng, back)
    run = torture.finish()
    assert torture.reads > 6
    assert torture.kills == 6
    assert run.attrs["segments"], "it was gone on with"
