"""A pretended GPU: CPU tensors that say they lie on ``cuda:0``, so that code for a GPU runs where there is none.

``python -m bench.pretend MODULE ARGUMENT …`` runs a module under it, with Triton's kernels interpreted. Every branch
that asks for a device takes the GPU's way, and every number is right. No time means anything, and what only a real GPU
has is missing: asynchrony, graphs, limits.

A tensor lies on the pretended GPU unless it was made on the host: by ``.cpu()`` or ``.to("cpu")``, by a factory that
names no device, or from such tensors alone.
"""

import contextlib
import os
import runpy
import sys
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
PROPERTIES = SimpleNamespace(
    name="a pretended GPU",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    L2_cache_size=1 << 20,  # small: suites hold more than this in inputs
    shared_memory_per_block_optin=227 << 10,
)
_GET_DEVICE = torch.Tensor.device.__get__
_IS_CUDA, _IS_CPU = torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__
_ABOUT_DEVICES = (torch.device, torch._C._nn._parse_to)  # nothing is made there
_SET_DATA = torch.Tensor.data.__set__
_FACTORIES = {
    getattr(torch, name)
    for name in "arange as_tensor empty empty_strided eye from_numpy full linspace ones rand randint randn randperm"
    " tensor zeros".split()
}


class Pretence(TorchFunctionMode):
    """Answers what tensors are asked about devices, and lets the CPU do what is asked of the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _ABOUT_DEVICES:
            return function(*args, **kwargs)
        if function == _GET_DEVICE:
            return HOST if _on_host(args[0]) else GPU
        if function in (_IS_CUDA, _IS_CPU):
            return _on_host(args[0]) == (function == _IS_CPU)
        if function is torch.Tensor.get_device:
            return -1 if _on_host(args[0]) else 0
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.record_stream:
            return None
        if function == _SET_DATA:
            _mark(args[0], _on_host(args[1]))
        if function is torch.Tensor.cuda:
            function, args, kwargs = torch.Tensor.to, (args[0], GPU), {}
        asked = _asked(function, args, kwargs)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if function in (torch.mm, torch.addmm) and "out_dtype" in kwargs:  # which the CPU's products do not have
            dtype = kwargs.pop("out_dtype")
            args = (*args[:-2], *(t.to(dtype) for t in args[-2:]))
        out = function(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if asked is not None:
            host = asked.type == "cpu"
        elif function in _FACTORIES:
            host = True
        else:
            host = bool(given) and all(map(_on_host, given))
        if asked is not None and any(out is t for t in given) and _on_host(out) != host:
            out = out.clone()  # a copy to another device is another tensor
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not any(t is g for g in given):
                _mark(t, host)
        return out


def _on_host(tensor):
    return getattr(tensor, "_pretended_host", False)


def _mark(tensor, host):
    if host != _on_host(tensor):
        tensor._pretended_host = host


def _on_cpu(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return HOST
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


def _asked(function, args, kwargs):
    """Returns the device that a call names for its result, or None."""
    if function is torch.Tensor.cpu:
        return HOST
    device = kwargs.get("device")
    if device is None and function is torch.Tensor.to:
        device = next((a for a in args[1:] if isinstance(a, torch.device | str | torch.Tensor)), None)
    if isinstance(device, torch.Tensor):
        return HOST if _on_host(device) else GPU
    if isinstance(device, int):
        return GPU
    return None if device is None else torch.device(device)


class _Generator(torch.Generator):
    """A generator on the CPU that says it is on the device that was asked for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.asked = GPU if torch.device(device).type == "cuda" else HOST
        return made

    @property
    def device(self):
        return self.asked


class _Event:
    """Wall clock in the place of a GPU's."""

    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def query(self):
        return self.at is not None

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class _Stream:
    cuda_stream = 0
    device = GPU

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass


def _nothing():
    """Returns a function of its own that does nothing: torch's compiler refuses one under two names."""
    return lambda *args, **kwargs: None


_CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": _nothing(),
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda device: contextlib.nullcontext(),
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "current_stream": lambda device=None: _Stream(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "reset_peak_memory_stats": _nothing(),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "manual_seed": _nothing(),
    "manual_seed_all": _nothing(),
    "_sleep": _nothing(),
    "Event": _Event,
}


@contextlib.contextmanager
def pretended():
    """Within it ``torch.cuda`` has a GPU, as far as the benches and the package ask for one.

    To be entered before ``sft_kernels`` is imported: it registers operators, whose bodies shall be deceived too.
    """
    mode = Pretence()
    run_backward, implement = torch.autograd._engine_run_backward, torch.library.Library.impl

    def deceived(function):  # torch takes the mode off within what it calls
        def call(*args, **kwargs):
            with mode:
                return function(*args, **kwargs)

        return call

    on_gpu = {}  # bodies of operators whose GPU's is not the CPU's

    def register(library, name, function, key="", **options):
        if key == "CUDA":
            on_gpu[name] = function

        def body(*args, **kwargs):
            host = all(_on_host(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            return (function if host else on_gpu.get(name, function))(*args, **kwargs)

        return implement(library, name, deceived(body), key, **options)

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch.cuda, _CUDA),
            (torch, {"Generator": _Generator}),
            (torch.autograd, {"_engine_run_backward": deceived(run_backward)}),
            (torch.library.Library, {"impl": register}),
        ):
            stack.enter_context(mock.patch.multiple(owner, **names))
        stack.enter_context(mode)
        yield


def main(argv):
    if not argv:
        print("usage: python -m bench.pretend MODULE [ARGUMENT …]", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    sys.argv = argv
    with pretended():
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
