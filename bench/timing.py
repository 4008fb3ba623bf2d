"""How everything here is measured: seconds, peak memory, and what the machine itself can do.

Rivals take turns within one process, in an order that changes every round, each turn on the next of several input sets
that together exceed the last-level cache. So a slow minute of the machine is shared by all, and nobody finds its inputs
in the cache.
"""

import gc
import importlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sft_kernels.sft.memory import peak

from .facts import ROOT

_CPU = torch.device("cpu")


class Rival(NamedTuple):
    """One way to do the work: ``run(prepare(*inputs))``, of which ``run`` is timed."""

    run: Callable[[Any], Any]
    prepare: Callable[..., Any] = lambda *inputs: inputs


class Clock:
    """A clock that stands still until it is told how long something took.

    As the ``timer`` of a pytest-benchmark it lets event times of a GPU, and samples that were taken in turns, enter
    that plugin's statistics.
    """

    __name__ = __qualname__ = "Clock"

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


CLOCK = Clock()


SMALL = 5e-3  # seconds: a cell in which anyone takes less on a GPU is also timed behind a filled queue
_CLOCK_RATE = 2e9  # an SM's clock, at most, for the length of a wait


class Samples(NamedTuple):
    """The measurements of one rival, in seconds."""

    called: list  # from an idle device to the end of the work: launch gaps included
    queued: list  # the same behind a filled launch queue: the device's own time; of small work on CUDA alone
    host: list  # until the call returned, on CUDA

    @property
    def device(self):
        """The samples that say how long the device works."""
        return self.queued or self.called


def seconds(function, device, behind=0.0):
    """Returns ``(seconds, seconds of host time)`` of ``function()``.

    By events on CUDA, where ``behind`` first gives the device that many seconds of waiting: by the time they are over,
    all of a short function's launches stand in the queue, and no launch gap is left in the first number. By the wall
    clock on the CPU, where both numbers are the same.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin,) * 2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    if behind:
        torch.cuda._sleep(int(behind * _CLOCK_RATE))
    begin = time.perf_counter()
    start.record()
    function()
    end.record()
    host = time.perf_counter() - begin
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def interleaved(rivals, sets, device, *, budget, rounds=(3, 25)):
    """Samples of rivals that take turns: ``({name: Samples}, {name: why it failed})``.

    Args:
        rivals: ``{name: Rival}``.
        sets: input sets, each the arguments of ``prepare``.
        budget: seconds of wall clock to spend on the timed rounds, within the bounds ``rounds``.

    The first round warms up, compiles and is not counted. Who raises takes no further part. If anyone on CUDA took less
    than ``SMALL`` in the round after that, everyone's turns are taken twice, the second time behind a filled queue: no
    ratio compares one kind of time with the other.
    """
    taken = {name: Samples([], [], []) for name in rivals}
    failed = {}
    shuffle = random.Random(0).shuffle
    turn, twice = 0, False

    def one_turn(name, behind=0.0):
        nonlocal turn
        turn += 1
        prepared = rivals[name].prepare(*sets[turn % len(sets)])
        return seconds(lambda: rivals[name].run(prepared), device, behind)

    def one_round(warm_up):
        order = [name for name in rivals if name not in failed]
        shuffle(order)
        for name in order:
            try:
                called, host = one_turn(name)
                if not warm_up:
                    taken[name].called.append(called)
                    if device.type == "cuda":
                        taken[name].host.append(host)
                    if twice:
                        taken[name].queued.append(one_turn(name, behind=2 * host + 1e-4)[0])
            except Exception as error:
                failed[name] = reason(error)

    one_round(warm_up=True)
    gc.collect()
    gc.disable()  # a collection would be charged to whoever is running
    try:
        deadline = time.perf_counter() + budget
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() > deadline:
                break
            one_round(warm_up=False)
            if done == 0 and device.type == "cuda":
                twice = any(sample < SMALL for each in taken.values() for sample in each.called)
    finally:
        gc.enable()
    return {name: samples for name, samples in taken.items() if name not in failed}, failed


def reason(error):
    """An exception in one short line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def last_level_cache(device):
    """Bytes of the largest cache before memory: L2 on CUDA; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [file.read_text().strip() for file in files]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=0)


def sets_beyond_cache(nbytes, device):
    """How many input sets of ``nbytes`` to rotate, so that between two turns on one set the others fill the cache."""
    return 1 + max(1, math.ceil(last_level_cache(device) / nbytes))


def copy(size, device):
    """Reads ``size`` bytes (a multiple of 4) and writes as many: the bandwidth is ``2 · size`` over its time.

    A copy on CUDA, in place on the CPU, where a write elsewhere first fetches what it overwrites, uncounted: an
    in-place update, which does not, would beat such a floor.
    """
    source = torch.ones(size // 4, device=device)
    if device.type == "cpu":
        return Rival(lambda _: source.neg_())
    target = torch.empty_like(source)
    return Rival(lambda _: target.copy_(source))


def matmul(n, dtype, device):
    """The product of two random square matrices: ``2 n³`` FLOPs. (Zeros would run faster than data does.)"""
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return Rival(lambda _: a @ b)


def spread(samples):
    """Median and quartiles of seconds."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return middle, low, high


def peak_extra_bytes_cuda(rival, inputs):
    """Growth of the allocated memory over one run, above what stood before it, inputs and parameters included."""
    prepared = rival.prepare(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rival.run(prepared)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_extra_bytes(case, *arguments):
    """Growth of the peak resident set over one call, in a process of its own.

    ``case`` is ``"module:function"``; called with ``arguments`` (what JSON can carry), it returns ``prepare`` and
    ``run``, of which ``run(prepare())`` is measured after one to warm up, and ``prepare`` not counted. Raises
    ``RuntimeError`` with the last line of a process that fails, as it does where the system lets no process reset its
    own peak.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the resident set
    command = [sys.executable, "-m", "bench.timing", case, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}{arguments}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(done.stdout.split()[-1])


def _growth(case, arguments):
    module, name = case.split(":")
    prepare, run = getattr(importlib.import_module(module), name)(*arguments)
    run(prepare())
    gc.collect()
    prepared = prepare()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = peak(_CPU)
    run(prepared)
    return peak(_CPU) - before


if __name__ == "__main__":
    print(_growth(sys.argv[1], json.loads(sys.argv[2])))
