"""The device that a model is on."""

from __future__ import annotations

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The accelerator that some of the model is on, else the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((device for device in devices if device.type not in ("cpu", "meta")), torch.device("cpu"))


def synchronize(model: nn.Module) -> None:
    """Waits for the accelerator that the model is on, if any: its work is put off, and would be taken for no work."""
    accelerator = torch.accelerator.current_accelerator()
    for device in {p.device for p in model.parameters()}:
        if accelerator is not None and device.type == accelerator.type:
            torch.accelerator.synchronize(device)
