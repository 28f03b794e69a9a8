"""What a changed bit or a lost end of a file does: it is found, or changes little that a reader sees.

Chunks have no checksums while a run is written, so what is found is what contradicts something else. `allowed` says all
that may change unseen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.errors import StoreError
from gradtrace.metrics import WHOLE
from gradtrace.store.checking.finding import DAMAGE
from gradtrace.store.checking.verify import verify
from gradtrace.store.places.keys import Memory
from gradtrace.store.rows import KINDS, Status
from tests.store.sound import KEEP, WIDTHS, contents, intact, intact_contents

UNSEEN = ("loss", "epoch", "scalars", "cost", "residual", "owner_residual")
KEYS = 400  # more than there are


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    number=st.integers(0, KEYS),
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 8),
    root=st.sampled_from([False] * 5 + [True]),
)
def test_a_changed_bit_or_a_lost_end_is_found_or_changes_little(number: int, at: float, bit: int, root: bool) -> None:
    """Chunks have no checksums: `allowed` says what a changed bit may do unseen. bit: 8 cuts the bytes off there."""
    files = intact()
    names = sorted(files)
    key = "zarr.json" if root else names[number % len(names)]
    data = bytearray(files[key])
    place = int(at * len(data))
    if bit == 8:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    keys = Memory("flipped")
    keys._held.clear()
    keys._held.update({**files, key: bytes(data)})
    try:
        found = [one for one in verify(keys) if one.severity == DAMAGE]
    except StoreError:
        return
    if found:
        return
    assert bit < 8, "what is cut off is always found"
    assert key == "zarr.json" or not key.endswith("zarr.json"), "metadata of members is there twice"
    before, after = intact_contents(), contents(keys)
    for name, value in before.items():
        assert allowed(name, value, after.get(name)), (key, place, bit, name)


def allowed(name: str, before: Any, after: Any) -> bool:
    """Whether a value may have become another one unseen."""
    variable = name.rpartition("|")[2]
    if not isinstance(before, np.ndarray):
        # text in the root, and names of scalars and costs, say what nothing else does
        return before == after or variable in ("run", "parameters", "keep", "scalar", "part")
    assert isinstance(after, np.ndarray)
    assert after.shape == before.shape
    if np.array_equal(before, after, equal_nan=True) or variable in UNSEEN:
        return True
    if variable == "steps":
        return bool((np.diff(after) > 0).all())
    if variable.endswith("status"):
        return np.array_equal(after == Status.MEASURED, before == Status.MEASURED)
    if variable == "n_samples":
        return False
    return np.array_equal(np.isnan(before), np.isnan(after)) and is_close(name.split("|")[1], variable, before, after)


def is_close(parameter: str, variable: str, before: np.ndarray, after: np.ndarray) -> bool:
    """Of numbers: what follows from others changes by rounding; where a spectrum was cut, some follow from nothing."""
    cut, change = WIDTHS[parameter] > KEEP, np.nan_to_num(np.abs(after - before))
    if variable == "inner_product":  # of two groups it may change, if it does so twice
        own = (np.diagonal(values, axis1=1, axis2=2) for values in (before, after))
        lopsided = np.nanmax(np.abs(after - after.swapaxes(1, 2)))
        return np.allclose(*own, rtol=1e-4, equal_nan=True) and bool(lopsided <= 1e-4 * np.nanmax(np.abs(after)))
    if variable in KINDS:
        top = np.nan_to_num(before[..., 0])
        return bool((change[..., 0] <= 1e-4 * top).all() and (change <= (1 if cut else 1e-2) * top[..., None]).all())
    metric = variable.removeprefix("activation_").removeprefix("adjoint_")
    follows = ("frobenius", "stable_rank") if cut else [name for name in WHOLE if name != "numerical_rank"]
    return metric not in follows or np.allclose(before, after, rtol=1e-3, equal_nan=True)
