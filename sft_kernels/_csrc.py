"""The compiled kernels of ``csrc/``: loaded on first use, and why not where they cannot be."""

import ctypes
import functools
from pathlib import Path

import torch


@functools.cache
def why_not(device):
    """Why the compiled kernels cannot run on ``device`` (None: the CPU); None where they can."""
    if device is None or device.type != "cuda":
        return f"needs a CUDA device, got {device or 'cpu'}"
    library, reason = _load()
    if reason:
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    error = library.sft_kernels_error(index)  # a driver too old, a GPU that there is no code for
    return (
        f"the compiled kernels do not run on {torch.cuda.get_device_name(index)}: {error.decode()}" if error else None
    )


@functools.cache
def _load():
    """The library, its operators registered, or None and why not."""
    path = next(Path(__file__).parent.glob("_C*.so"), None)
    if path is None:
        return None, "the CUDA kernels were not built: install with nvcc on the path, or make cuda"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    library.sft_kernels_error.restype = ctypes.c_char_p
    return library, None
