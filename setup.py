"""The package, and beside it the CUDA kernels of ``csrc/`` where nvcc and torch's headers are.

nvcc is called here and not by torch's ``CUDAExtension``, which refuses a torch without CUDA: whether there is a GPU,
and which torch this is, does not matter to a library on torch's stable ABI. Without nvcc, or in an isolated build,
which sees no torch, the wheel is pure Python and says so.

``SFT_KERNELS_CUDA=0`` skips the kernels, ``=1`` makes their absence an error. ``TORCH_CUDA_ARCH_LIST`` names the
architectures, as torch reads it. Those that the kernels or nvcc cannot have are left out, with a sentence.
"""

import ctypes
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
LIST = "TORCH_CUDA_ARCH_LIST"
# Clusters need 9.0, or 9.0a, which is the same to these kernels. Any other GPU runs the portable code of 8.0.
ARCHITECTURES = "8.0+PTX 9.0a"
OLDEST = 80  # bf16 and asynchronous copies came with 8.0
NAMES = {  # torch's words for NVIDIA's generations
    "kepler": "3.5+PTX",
    "kepler+tesla": "3.7",
    "maxwell": "5.0 5.2+PTX",
    "maxwell+tegra": "5.3",
    "pascal": "6.0 6.1+PTX",
    "volta": "7.0+PTX",
    "volta+tegra": "7.2",
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
}
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest that is supported
# AdamW's formula is written to the bit: each operation rounds on its own.
FLAGS_OF = {"adamw": ["--fmad=false"]}
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def say(sentence):
    print(f"sft_kernels: {sentence}", file=sys.stderr)


def find_nvcc():
    """Returns ``(nvcc, None)``, or ``(None, why there is none)``.

    ``CUDA_HOME`` and ``CUDA_PATH`` go before the path.
    """
    homes = {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}
    without = []
    for name, home in homes.items():
        if nvcc := shutil.which("nvcc", path=str(Path(home, "bin"))):
            break
        without.append(f"{name}={home}")
    else:
        nvcc = shutil.which("nvcc")
    without = " and ".join(without)
    if nvcc is None:
        return None, f"there is no nvcc {f'in {without}, nor ' if without else ''}on the path"
    if without:
        say(f"there is no nvcc in {without}; {nvcc} is used instead")
    return nvcc, None


def find_torch():
    """torch's folder, without importing it; None where there is none, or none with the stable ABI's headers."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/library.h").exists() else None


def answer(nvcc, *options):
    """Returns ``(status, output)`` of nvcc; the status is None if it cannot be run."""
    try:
        done = subprocess.run([nvcc, *options], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None, ""
    return done.returncode, done.stdout + done.stderr


def known_to(nvcc):
    """The architectures, without suffixes, that nvcc lists, as ``{80, 90}``; empty if it does not answer."""
    listed = []
    for option, word in (("--list-gpu-arch", "compute"), ("--list-gpu-code", "sm")):
        status, output = answer(nvcc, option)
        found = {int(number) for number in re.findall(rf"\b{word}_(\d+)\b", output)} if status == 0 else set()
        listed += [found] if found else []
    return set.intersection(*listed) if listed else set()


def knows(nvcc, number, known):
    if known and int(number.rstrip("af")) not in known:
        return False
    if number.isdecimal():
        return True
    # nvcc does not list 90a or 120f. A dry run reads the options and compiles nothing.
    options = "--dryrun", f"-gencode=arch=compute_{number},code=sm_{number}", "-x", "cu", "-c", os.devnull
    return "unsupported gpu architecture" not in answer(nvcc, *options, "-o", os.devnull)[1].lower()


def visible_gpus():
    """The compute capabilities of the GPUs that CUDA's driver shows, as ``{90}``; empty without a GPU or driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return set()
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return set()
    found = set()
    for index in range(count.value):
        calls = (
            driver.cuDeviceGet(ctypes.byref(device), index),
            driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # COMPUTE_CAPABILITY_MAJOR, then MINOR
            driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
        )
        found |= set() if any(calls) else {10 * major.value + minor.value}
    return found


def native(known):
    """The GPUs of this machine as torch takes them: PTX for the newest, and none newer than nvcc knows."""
    numbers = sorted({max((k for k in known if k <= gpu), default=gpu) for gpu in visible_gpus()})
    if not numbers:
        say(f"{LIST} is native, but no GPU is visible: the default {ARCHITECTURES} is used")
        return read(ARCHITECTURES)
    return {str(number): number == numbers[-1] for number in numbers}


def read(listed, known=()):
    """Reads a list as torch does, to ``{"80": False, "90a": True}``: the number, and if PTX is made of it too.

    Entries are separated by blanks, semicolons or commas. Upper and lower case are the same.
    """
    found = {}
    for entry in re.findall(r"[^\s;,]+", re.sub(r"\s*\+\s*", "+", listed)):
        name = entry.lower().removesuffix("+ptx")
        version = re.fullmatch(r"([0-9]{1,2})\.([0-9])([af]?)", name)
        if version:
            more = {"".join(version.groups()): False}
        elif name == "native":
            more = native(known)
        elif name in NAMES:
            more = read(NAMES[name])
        else:
            expected = "versions such as 8.0 or 9.0a+PTX, names such as Hopper, or native"
            raise SystemExit(f"{LIST}: expected {expected}; got {entry!r} in {listed!r}")
        if name != entry.lower():
            more[[*more][-1]] = True
        for number, ptx in more.items():
            found[number] = found.get(number, False) or ptx
    return found


def dotted(number):
    digits = number.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}{number[len(digits) :]}"


def choose(nvcc):
    """Returns ``(what was asked for, nvcc's options for what can be had)``; says what is left out."""
    asked = os.environ.get(LIST, "")
    asked = asked if re.search(r"[^\s;,]", asked) else ARCHITECTURES
    known = known_to(nvcc)
    options, old, unknown = [], [], []
    for number, ptx in read(asked, known).items():
        if int(number.rstrip("af")) < OLDEST:
            old.append(dotted(number))
        elif not knows(nvcc, number, known):
            unknown.append(dotted(number))
        else:
            codes = [f"sm_{number}", f"compute_{number}"][: 1 + ptx]
            options += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    if old:
        say(f"the CUDA kernels need {dotted(str(OLDEST))} or later; left out: {', '.join(old)}")
    if unknown:
        say(f"{nvcc} does not know every architecture; left out: {', '.join(unknown)}")
    return asked, options


def plan():
    """Returns ``(nvcc, torch, architectures, None)`` to build with, or ``(None, None, None, why not)``."""
    if os.environ.get("SFT_KERNELS_CUDA") == "0":
        return None, None, None, "SFT_KERNELS_CUDA=0"
    nvcc, reason = find_nvcc()
    torch = find_torch()
    if not reason and torch is None:
        reason = "the build sees no headers of torch 2.11 or later (pip install --no-build-isolation)"
    if not reason:
        asked, architectures = choose(nvcc)
        if architectures:
            return nvcc, torch, architectures, None
        reason = f"none of the architectures in {LIST}={asked!r} can be built"
    return None, None, None, reason


class BuildCuda(build_ext):
    """Each source to an object, as many at a time as there are processors, and all into one library."""

    def build_extension(self, ext):
        headers = max(path.stat().st_mtime for path in (*CSRC.glob("*.cuh"), Path(__file__)))
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
        reason = f"nvcc ended with status {error.returncode}"
    except OSError as error:
        reason = f"nvcc cannot be run: {error}"
    else:
        return
    raise SystemExit(f"{reason}; SFT_KERNELS_CUDA=0 builds without it")


nvcc, torch, architectures, reason = plan()
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
