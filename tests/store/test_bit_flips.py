"""A changed bit or a lost end of any file is found by `verify`, but for text that nothing else says."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradtrace.errors import StoreError
from gradtrace.store.checking.finding import DAMAGE
from gradtrace.store.checking.verify import verify
from gradtrace.store.places.keys import Memory
from tests.store.sound import contents, intact, intact_contents

KEYS = 400  # more than there are


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    number=st.integers(0, KEYS),
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 8),
    root=st.sampled_from([False] * 5 + [True]),
)
def test_a_changed_bit_or_a_lost_end_is_found(number: int, at: float, bit: int, root: bool) -> None:
    """Chunks have checksums, metadata of members is there twice: only the root's own text can change unseen.

    bit: 8 cuts the bytes off there.
    """
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
    if not found:
        assert key == "zarr.json", (key, place, bit)
        assert bit < 8, "what is cut off is always found"
        before, after = intact_contents(), contents(keys)
        for name, value in before.items():
            assert name in ("run", "parameters", "keep") or is_same(value, after.get(name)), (place, bit, name)


def is_same(before: Any, after: Any) -> bool:
    if isinstance(before, np.ndarray):
        return np.array_equal(before, after, equal_nan=before.dtype.kind == "f")
    return bool(before == after)
