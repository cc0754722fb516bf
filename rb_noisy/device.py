"""Tensors between the host, an accelerator and other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; to a GPU through pinned memory, so that its queue of work is not waited for."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def gather(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The (B, …) tensors of all processes, one below the other, on every process."""
    return accelerator.gather(rows.to(accelerator.device)) if accelerator.num_processes > 1 else rows
