"""The library as it is built: it loads where torch has what it asks for, and then has every operator."""

import subprocess
import sys

import pytest

from bench import csrc

from .host import COMPILER, needs_compiler

# A torch without CUDA lacks one function, which stands in here. Nothing is launched.
STUB = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
LOAD = """
import ctypes, sys, torch
stub, path = sys.argv[1:]
ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
from sft_kernels.ops.adamw import cuda_impl as adamw
from sft_kernels.ops.softmax_grad import cuda_impl as softmax_grad, operators
torch.ops.load_library(path)
names = [schema.split("(")[0] for schema in operators.SCHEMAS] + ["adamw_sum_of_squares", "adamw_update"]
for name in names:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{adamw.NAMESPACE}::{name}", "CUDA"), name
library = ctypes.CDLL(path)
library.sft_kernels_error.restype = ctypes.c_char_p
print(library.sft_kernels_error(0))
"""


@needs_compiler
@pytest.mark.skipif(csrc.library() is None, reason="the CUDA kernels are not built")
def test_it_loads_and_says_why_it_cannot_run_here(tmp_path):
    source, stub = tmp_path / "stub.cpp", tmp_path / "stub.so"
    source.write_text(STUB)
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", stub], check=True)
    command = [sys.executable, "-c", LOAD, str(stub), str(csrc.library())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("None", "b'"))  # None on a GPU, else CUDA's own words


@pytest.mark.skipif(csrc.library() is None, reason="the CUDA kernels are not built")
def test_importing_the_package_does_not_load_it():
    code = "import sft_kernels; print(sum('_C.abi3' in line for line in open('/proc/self/maps')))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "0\n"
