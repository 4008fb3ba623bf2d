"""A suite: what an op says about itself, and what is the same for all of them.

A cell is one set of shapes and shares. Everyone in it, the machine's own copy and matmul included, is timed in turns by
``timing.interleaved``, so that a ratio never compares two moments of the machine.
"""

import contextlib
import gc
import warnings

import torch

from . import peers, timing
from .watch import Watch


class Suite:
    """One op. The subclass says what to measure; :meth:`measure` does it."""

    op: str
    passes: str  # what one sample is, for the tables
    tiny = False  # shapes for a rehearsal: nothing measured with them is a figure

    def __init__(self, device, tiny=False, rivals="all"):
        """``rivals``: all of them, the ``"quick"`` ones, or the ``"slow"`` ones, which compile for long, and ours."""
        self.device = torch.device(device)
        self.tiny = tiny
        adapters = self.adapters()
        chosen = {
            name: adapter
            for name, adapter in adapters.items()
            if rivals == "all" or (rivals == "slow" and name == "ours") or (rivals == "slow") == (name in peers.SLOW)
        }
        self.present, self.absent = peers.load(chosen, self.device)
        other = "quick" if rivals == "slow" else "slow"
        self.absent |= dict.fromkeys(adapters.keys() - chosen.keys(), f"left to a run with --rivals {other}")
        if tiny:
            for name in peers.COMPILED & self.present.keys():
                del self.present[name]
                self.absent[name] = "not compiled in a rehearsal: it would take longer than all the rest"
        self.errors = {}

    def adapters(self):
        """``{name: load}``, ours first."""
        raise NotImplementedError

    def cells(self):
        """``{name: parameters}``, in the order of the table. Parameters are what JSON can carry."""
        raise NotImplementedError

    def error(self, adapter, parameters):
        """What ``right.checked`` says of the adapter, in the cell's dtypes."""
        raise NotImplementedError

    def sets(self, parameters):
        """Input sets that together exceed the cache."""
        raise NotImplementedError

    def rival(self, adapter, parameters):
        """The adapter as a ``timing.Rival`` over these sets."""
        raise NotImplementedError

    def machine(self, parameters):
        """``{name: Rival}`` of what the floor is made of."""
        raise NotImplementedError

    def floor(self, parameters, medians):
        """Seconds below which no version runs, from the medians of :meth:`machine`, and in words what they are."""
        raise NotImplementedError

    def left_out(self, name, parameters):
        """Returns why ``name`` is not measured in a cell, or None."""

    def budget(self):
        """Seconds of timed rounds a cell."""
        if self.tiny:
            return 0.2
        return 1 if self.device.type == "cuda" else 6  # a GPU is rented by the minute

    def one_run(self, name, parameters):
        """``prepare`` and ``run`` of one adapter's work: what ``timing.peak_extra_bytes`` asks for."""
        inputs = self.sets(parameters)[0]
        rival = self.rival(self.present[name], parameters)
        return lambda: rival.prepare(*inputs), rival.run

    def measure(self, cell):
        """Everything about one cell, as JSON can carry it."""
        parameters = self.cells()[cell]
        rivals, rows = {}, {name: {"absent": why} for name, why in self.absent.items()}
        for name, adapter in self.present.items():
            if why := self.left_out(name, parameters):
                rows[name] = {"absent": why}
                continue
            rows[name] = row = dict(self._error(name, parameters))
            if "error" in row:
                try:
                    rivals[name] = self.rival(adapter, parameters)
                except peers.Absent as error:
                    row["absent"] = str(error)
                except Exception as error:  # memory, most likely: it costs this peer its row, not all theirs
                    if name.startswith("ours"):
                        raise
                    row["raised"] = timing.reason(error)
        machine = self.machine(parameters)
        sets = self.sets(parameters)
        rounds = (2, 2) if self.tiny else (4, 25)
        with Watch() if self.device.type == "cuda" else contextlib.nullcontext() as gpu:
            samples, failed = timing.interleaved(
                rivals | machine, sets, self.device, budget=self.budget(), rounds=rounds
            )
        for name, why in failed.items():
            if name in machine:
                raise RuntimeError(f"{cell}: the floor's {name} raised {why}")
            rows[name]["raised"] = why
        for name in rivals:
            if name in samples:
                rows[name] |= recorded(samples[name])
                rows[name]["peak_extra_bytes"] = self._peak(name, cell, rivals[name], sets[0])
        medians = {name: timing.spread(samples[name].device)[0] for name in machine}
        floor, made_of = self.floor(parameters, medians)
        del rivals, machine, sets
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {
            "cell": cell,
            "parameters": parameters,
            "floor_seconds": floor,
            "floor": made_of,
            "machine": {name: recorded(samples[name]) for name in medians},
            "gpu": gpu and gpu.summary(),
            "rows": {name: rows[name] | {"version": peers.version(name)} for name in self.adapters()},
        }

    def _error(self, name, parameters):
        key = name, *(value for key, value in sorted(parameters.items()) if key in ("dtype", "state_dtype", "clip"))
        if key not in self.errors:
            self.errors[key] = self.error(self.present[name], parameters)
        return self.errors[key]

    def _peak(self, name, cell, rival, inputs):
        """Bytes, or None where they are not measured: on the CPU only in cells that ask, each costs a process."""
        try:
            return self._measured_peak(name, cell, rival, inputs)
        except Exception as error:  # what was timed is kept
            warnings.warn(f"{cell}: peak memory of {name} not measured: {timing.reason(error)}", stacklevel=2)
            return None

    def _measured_peak(self, name, cell, rival, inputs):
        if self.device.type == "cuda":
            return timing.peak_extra_bytes_cuda(rival, inputs)
        if not self.cells()[cell]["peak_on_cpu"] or (self.tiny and name != "ours"):
            return None
        return timing.peak_extra_bytes(f"{type(self).__module__}:one_run", name, cell, self.tiny)


def recorded(samples):
    """Returns the :class:`timing.Samples` that are not empty, as a row of a results file has them."""
    names = {"seconds": samples.called, "queued_seconds": samples.queued, "host_seconds": samples.host}
    return {name: taken for name, taken in names.items() if taken}


def labels(N, V, kept, pattern, generator, example=256):
    """Class indices [N], the share ``kept`` of them not -100.

    ``"prompt"`` masks the first part of every ``example`` tokens, ``"scattered"`` as many anywhere.
    """
    y = torch.randint(V, (N,), generator=generator, device=generator.device)
    example = min(example, N)
    masked = round((1 - kept) * example)
    if pattern == "prompt":
        y.view(-1, example)[:, :masked] = -100
    else:
        y[torch.randperm(N, generator=generator, device=generator.device)[: masked * (N // example)]] = -100
    return y


def confident(V):
    """How far a trained model's target logit stands above others of unit variance: at V = 32000 it gets 82 %."""
    return float(torch.tensor(float(V)).log()) + 2


def sweep(cuda, tiny):
    """The cells of a loss: shares kept, where, and over which logits. Thinned on the CPU."""
    if tiny:
        kept = [(1.0, "prompt", "uniform"), (0.2, "scattered", "peaked")]
    else:
        shares = (1.0, 0.5, 0.35, 0.2, 0.05)
        kept = [(share, "prompt", "uniform") for share in shares]
        kept += [(share, "scattered", "uniform") for share in (shares[1:] if cuda else (0.5, 0.2))]
        kept += [(share, "prompt", "peaked") for share in (shares if cuda else (1.0, 0.2))]
    for share, pattern, logits in kept:
        on_cpu = (pattern, logits) == ("prompt", "uniform") and share != 0.35
        name = f"kept {share:.0%} {pattern} {logits}"
        yield name, {"kept": share, "pattern": pattern, "logits": logits, "peak_on_cpu": on_cpu}
