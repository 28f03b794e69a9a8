"""Whose row is whose is worked out on the host; this brings it to the rows, wherever they are.

Nothing here reads what a device computed, so that nothing waits for it: sizes and places are known beforehand.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, by a copy that nobody waits for."""
    if values.device == device:
        return values
    if device.type == "cuda":  # a copy of memory that may be paged out waits for all that the device still computes
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def picked(values: Tensor, index: Tensor) -> Tensor:
    """The rows of `values` at the places `index`, which lie on the host."""
    return values.index_select(0, sent(index, values.device))


def is_here(values: Tensor) -> bool:
    """Whether values can be read at once."""
    return values.device.type == "cpu"


def number(value: Tensor) -> float | Tensor:
    """A tensor of one number as that number, where nobody has to wait for it; else it is read later."""
    return value.item() if is_here(value) else value


def places_of(mask: Tensor) -> Tensor:
    """Where a mask of the host holds, ascending."""
    return mask.nonzero(as_tuple=True)[0]
