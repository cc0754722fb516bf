"""Tensors between the host, an accelerator and other processes."""

from __future__ import annotations

import ctypes
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


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it allocates next; without glibc nothing is done.

    glibc gives large blocks back to the system at once, and the system clears every page of the next feature map when
    it is first written to. For commands, not for a library: it is a setting of the whole process.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    set_option(mmap_threshold, 2**30)
    set_option(trim_threshold, 2**31 - 1)
