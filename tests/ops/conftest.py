"""``impl="cuda"`` takes CPU tensors in tests of ops: its kernels run over fibers, as Triton's are interpreted."""

import pytest

from sft_kernels._backend import Unavailable
from sft_kernels.ops.linear_cross_entropy import matmul

from ..csrc import host


@pytest.fixture
def half_products(monkeypatch):
    """Products in the inputs' own half precision, as on a GPU."""
    monkeypatch.setattr(matmul, "compute_dtype", lambda x: x.dtype)


@pytest.fixture(autouse=True)
def _cuda_over_fibers():
    with host.on_cpu():
        yield


def _skipping_what_is_not_carried(item):
    """A test of an option that the CUDA kernels do not carry, or where there is no compiler for them, is skipped."""
    try:
        return (yield)
    except Unavailable as reason:
        if "impl='cuda'" in str(reason):
            pytest.skip(str(reason))
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_skipping_what_is_not_carried)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_skipping_what_is_not_carried)
