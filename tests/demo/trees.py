"""A small tree of the reader's form, with a known gap between its groups."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

GROUPS = ("all", "cohort=gw", "cohort=hcp", "half=first", "half=second")
PAIRS = {"cohort": ("cohort=gw", "cohort=hcp"), "half": ("half=first", "half=second")}
SAMPLES = np.array([23, 5, 18, 11, 12])


def tree(factors: Mapping[str, float], *, steps: int = 29, components: int = 7, cosine: float = 0.25) -> xr.DataTree:
    """Parameter -> how many times hcp's mean gradient is gw's. Stored, as in a run, are the scaled sums.

    A parameter whose name ends in `bias` is a vector.
    """
    nodes = {f"/{name}": _node(name, factor, steps, components, cosine) for name, factor in factors.items()}
    return xr.DataTree.from_dict(nodes)


def _node(name: str, factor: float, steps: int, components: int, cosine: float) -> xr.Dataset:
    is_vector = name.endswith("bias")
    width = 1 if is_vector else components
    mean = np.exp(-np.arange(width) / 3) * np.ones((steps, len(GROUPS), 1))
    mean[:, GROUPS.index("cohort=hcp")] *= factor
    stored = mean * (SAMPLES / SAMPLES[0])[:, None]
    length = np.sqrt((stored**2).sum(-1))
    inner = length[:, :, None] * length[:, None, :] * np.where(np.eye(len(GROUPS)), 1.0, cosine)
    data = {
        "gradient": (("step", "group", "component"), stored),
        "inner_product": (("step", "group", "group_other"), inner),
        "n_samples": (("step", "group"), np.tile(SAMPLES, (steps, 1))),
    }
    shape = [components] if is_vector else [components, components + 4]
    coords = {"step": np.arange(steps), "group": list(GROUPS)}
    return xr.Dataset(data, coords=coords, attrs={"parameter": name, "shape": shape})
