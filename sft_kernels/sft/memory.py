"""The largest memory in use."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(device):
    """Free what nobody uses, and measure the peak from here on; returns False if the system cannot."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError, AttributeError):  # of glibc alone; it keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def peak(device):
    """The largest number of bytes in use since :func:`forget_peak`, or None if the system does not tell.

    On a GPU they are those of torch's tensors, on a CPU the process's resident memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return None
