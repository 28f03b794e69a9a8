"""What stands beside every number: date, versions and machine, but nobody's name."""

from __future__ import annotations

import os
import platform
from datetime import date

import torch

import gradtrace as gt


def environment(device: str) -> dict[str, str | int]:
    """Date, versions, architecture, cores, threads, device and dtype."""
    return {
        "date": date.today().isoformat(),
        "gradtrace": gt.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": "float32",
    }


def headline(device: str) -> str:
    """The environment in one line."""
    at = environment(device)
    return (
        f"{at['date']}, gradtrace {at['gradtrace']}, torch {at['torch']}, {at['machine']}, {at['cores']} cores, "
        f"{at['threads']} thread{'s' * (at['threads'] != 1)}, {at['device']}, {at['dtype']}."
    )
