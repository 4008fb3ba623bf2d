"""The suites' peers as a folder of wheels, for a GPU machine that has no network.

    python -m bench.wheels FOLDER                  fetches the set for Python 3.12 on Linux and packs it into FOLDER
    python -m bench.wheels FOLDER --into TARGET    unpacks it, on the GPU machine, as bench.on_gpu --peers FOLDER does

:func:`paths` says what to put on ``PYTHONPATH`` there. A folder may hold plain wheels as well as the packed set.

The machine brings torch, triton and transformers, and what several peers import: accelerate, cuda-bindings, einops,
pandas, protobuf, psutil, pyarrow, requests and xxhash. flash-attn 2 and 3, apex, bitsandbytes and torchao are left out.
"""

import argparse
import importlib.metadata
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PYTHON = "3.12"
PINNED = {
    "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
    "trl": "1.16.0",
    "datasets": "5.2.0",  # TRL imports it and the next two
    "dill": "0.4.1",
    "multiprocess": "0.70.19",
    "quack-kernels": "0.6.5",
    "flash-attn-4": "4.0.0b36",
    "apache-tvm-ffi": "0.1.15.post2",  # QuACK and flash-attn 4 launch through it
    # They compile by this. 4.8 brings CUDA 13.4 and is larger; the pure wheel of this name names only the CUDA 12 part.
    "nvidia-cutlass-dsl-libs-base": "4.7.1",
    "nvidia-cutlass-dsl-libs-core": "4.7.1",
    "nvidia-cutlass-dsl-libs-cu13": "4.7.1",
}
PLATFORMS = "manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux2014_x86_64 any".split()
LEFT_OUT = re.compile(r"/iket/.*\.so$|/3rdparty/|/cu13/(include|lib/stubs)/|\.a$")  # of the set
PACKED = "wheels.tar.xz"
_OURS = ".unpacked-by-bench-wheels"
# Both large libraries hold one LLVM: a window over the whole set finds the second copy. lc and pb suit machine code.
FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 << 20, "lc": 4, "pb": 0},
]


def fetch(folder):
    """Download :data:`PINNED` and pack it into ``folder``. Takes some minutes and 3 GB of memory."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    tags += ["--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}"]
    with tempfile.TemporaryDirectory() as temporary:
        command = ["download", "--no-deps", "--only-binary=:all:", *tags, "--abi", "abi3", "--abi", "none"]
        _pip(folder, *command, "-d", temporary, *(f"{name}=={version}" for name, version in PINNED.items()))
        wheels = sorted(Path(temporary).glob("*.whl"))
        for wheel in wheels:
            print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
        pack(wheels, folder / PACKED)
    print(f"{(folder / PACKED).stat().st_size / 2**20:8.2f} MiB  {folder / PACKED}, of all these")


def pack(wheels, archive):
    """Write wheels into one archive, uncompressed within, so that they are compressed as one."""
    with lzma.open(archive, "wb", filters=FILTERS) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        for wheel in wheels:
            stored = io.BytesIO()
            with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(stored, "w") as target:
                for member in source.infolist():
                    if not LEFT_OUT.search(member.filename):
                        target.writestr(member, source.read(member), zipfile.ZIP_STORED)
            entry = tarfile.TarInfo(wheel.name)
            entry.size = stored.tell()
            stored.seek(0)
            tar.addfile(entry, stored)


def install(folder, target):
    """Unpack every wheel of ``folder`` under ``target``. Returns ``{distribution: version}``.

    Does nothing if ``target`` already holds exactly these, and replaces what an earlier call put there. Raises an error
    that names ``folder`` if it is missing or empty, holds two versions of one distribution, or does not suit this
    Python, and one that names ``target`` if somebody else's packages lie there.
    """
    folder, site = Path(folder), _site(target)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; python -m bench.wheels {folder} fetches the peers into it")
    with tempfile.TemporaryDirectory() as temporary:
        for archive in sorted(folder.glob("*.tar.xz")):
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        wheels = sorted([*folder.glob("*.whl"), *Path(temporary).glob("*.whl")])
        wanted = {}
        for wheel in wheels:
            name, version = wheel.name.split("-")[:2]
            name = _normal(name)
            if name in wanted:
                raise ValueError(f"{folder}: two wheels of {name}, {wanted[name]} and {version}; keep one")
            wanted[name] = version
        if not wanted:
            raise FileNotFoundError(f"{folder}: no wheels here; python -m bench.wheels {folder} fetches the peers")
        if installed(target) != wanted:
            if site.is_dir() and any(site.iterdir()) and not (site / _OURS).exists():
                raise FileExistsError(f"{site}: holds packages that were not unpacked here; name an empty target")
            partial = site.with_name("partial")  # a call that is cut off leaves no half of a set
            shutil.rmtree(partial, ignore_errors=True)
            options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(partial)]
            _pip(folder, "install", *options, *map(str, wheels))
            (partial / _OURS).touch()
            shutil.rmtree(site, ignore_errors=True)
            partial.rename(site)
    return installed(target)


def installed(target):
    """``{distribution: version}`` of what :func:`install` put under ``target``."""
    found = importlib.metadata.distributions(path=[str(_site(target))])
    return {_normal(each.metadata["Name"]): each.version for each in found}


def paths(target):
    """Returns what to put on ``PYTHONPATH``. It runs no ``.pth`` file, by which the CuTe DSL would add the second."""
    return [str(_site(target)), str(_site(target) / "nvidia_cutlass_dsl" / "dsl_packages")]


def _site(target):
    return Path(target) / "site-packages"  # QuACK tells installed code from its own by this name


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _pip(folder, *arguments):
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise RuntimeError(f"{folder}: pip {arguments[0]} failed: {(errors or done.stderr.splitlines() or ['?'])[-1]}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m bench.wheels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, metavar="TARGET", help="unpack the folder's wheels there; fetch nothing")
    args = parser.parse_args(argv)
    if args.into is None:
        fetch(args.folder)
        return 0
    try:
        found = install(args.folder, args.into)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"python -m bench.wheels: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{name} {version}" for name, version in sorted(found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
