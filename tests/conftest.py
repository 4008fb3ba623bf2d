"""What holds for every test: seeded, on one thread. And for tests of ops: no memory is silently clean."""

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples every time: a run that fails can be repeated, and none takes longer than the last.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, max_examples=100, suppress_health_check=[*HealthCheck]
)
settings.load_profile("same")
# On a busy machine threads wait for each other: with two, these small tests took ten times as long as with one.
torch.set_num_threads(1)
# Without a GPU Triton's kernels are interpreted; triton reads this when it is imported, so before any test is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# torch.device as a context looks up torch's allocators once: before tests of ops put others into their place.
with torch.device("cpu"):
    torch.empty(0)

# What Inductor compiles is kept here, a folder for each torch and kind of CPU, which its cache does not tell apart: in
# one folder torch 2.13 ran C++ that torch 2.11 had compiled, and freed memory that was not its own.
_INDUCTOR = f"inductor-{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / _INDUCTOR))

# Tokenised data of tests is not kept. Matplotlib would look for its fonts there, too, which takes seconds.
_CACHE = tempfile.TemporaryDirectory(prefix="sft_kernels-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ.setdefault("MPLCONFIGDIR", str(Path(__file__).parents[1] / "build" / "matplotlib"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_unwritten_memory(request, monkeypatch):
    """``torch.empty`` and its kin come back full of NaN in tests of ops, so that what nothing wrote shows."""
    if "ops" not in request.path.parts:
        return

    def poisoned(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                out.detach().fill_(float("nan"))
            return out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_sessionfinish(session, exitstatus):
    """Under ``SFT_KERNELS_NO_SKIPS=1`` a run of which everything was skipped fails: on a GPU, whoever asked for tests
    and got none must hear of it."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("SFT_KERNELS_NO_SKIPS") == "1" and exitstatus == 0 and not reporter.stats.get("passed"):
        session.exitstatus = 1
