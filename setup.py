"""The package, and beside it the CUDA kernels of ``csrc/`` where nvcc and torch's headers are.

nvcc is called here and not by torch's ``CUDAExtension``, which refuses a torch without CUDA: whether there is a GPU,
and which torch this is, does not matter to a library on torch's stable ABI. Without nvcc, or in an isolated build,
which sees no torch, the wheel is pure Python and says so.

``SFT_KERNELS_CUDA=0`` skips the kernels, ``=1`` makes their absence an error. ``TORCH_CUDA_ARCH_LIST`` names the
architectures, as torch reads it.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
# 9.0a alone has clusters to offer; the portable code of 8.0 serves what is neither.
ARCHITECTURES = "8.0+PTX 9.0a"
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that is supported
# AdamW's formula is written to the bit: each operation rounds on its own.
FLAGS_OF = {"adamw": ["--fmad=false"]}
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def find_torch():
    """torch's folder, without importing it; None where there is none, or none with the stable ABI's headers."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/library.h").exists() else None


def why_not():
    """Why the kernels are not built; None where they are."""
    if os.environ.get("SFT_KERNELS_CUDA") == "0":
        return "SFT_KERNELS_CUDA=0"
    if find_nvcc() is None:
        return "there is no nvcc in CUDA_HOME or on the path"
    if find_torch() is None:
        return "the build sees no headers of torch 2.11 or later (pip install --no-build-isolation)"
    return None


def gencode(architectures):
    """nvcc's options for a list as in ``TORCH_CUDA_ARCH_LIST``: ``"8.0 9.0a+PTX"``, by blanks or semicolons."""
    options = []
    for name in architectures.replace(";", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected versions such as 8.0 or 9.0a+PTX, got {name!r}")
        major, minor, variant, ptx = match.groups()
        number = f"{major}{minor}{variant}"
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


class BuildCuda(build_ext):
    """Each source to an object, as many at a time as there are processors, and all into one library."""

    def build_extension(self, ext):
        torch, nvcc = find_torch(), find_nvcc()
        headers = max(path.stat().st_mtime for path in (*CSRC.glob("*.cuh"), Path(__file__)))
        architectures = gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES)
        common = [*FLAGS, *architectures, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", str(torch / "include")]
        folder = Path("build/csrc")  # not build_temp: an editable install throws that away
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source):
            target = folder / f"{Path(source).stem}.o"
            command = [nvcc, *common, *FLAGS_OF.get(Path(source).stem, []), "-c", source, "-o", str(target)]
            stamp = target.with_suffix(".command")  # what it was made by, and of
            newest = max(headers, Path(source).stat().st_mtime)
            if not (stamp.exists() and stamp.read_text() == " ".join(command) and stamp.stat().st_mtime > newest):
                run(command)
                stamp.write_text(" ".join(command))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [*pool.map(compiled, ext.sources)]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked to torch by name alone: the one that is imported is used. Its CUDA part comes with it.
        linker = [
            "-shared",
            "-cudart=static",
            "-Xlinker=--no-as-needed",
            f"-L{torch / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
        ]
        run([nvcc, *architectures, *objects, *linker, "-o", str(library)])


def run(command):
    print(" ".join(command), flush=True)
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"nvcc ended with status {error.returncode}; SFT_KERNELS_CUDA=0 builds without it") from None


reason = why_not()
if reason and os.environ.get("SFT_KERNELS_CUDA") == "1":
    raise SystemExit(f"SFT_KERNELS_CUDA=1, but {reason}")
if reason:
    print(f"sft_kernels without its CUDA kernels: {reason}", file=sys.stderr)
    setup()
else:
    sources = sorted(str(path) for path in CSRC.glob("*.cu"))
    setup(
        ext_modules=[Extension("sft_kernels._C", sources, py_limited_api=True)],
        cmdclass={"build_ext": BuildCuda},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},  # it uses nothing of Python's
    )
