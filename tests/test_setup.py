"""``setup.py``: the architectures it builds for, and the words in which it does without the kernels."""

import ctypes
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
setuptools = pytest.importorskip("setuptools")
VARIABLES = ("SFT_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def run(monkeypatch):
    """Returns the names of ``setup.py`` and what it would have given to ``setup()``."""
    monkeypatch.chdir(ROOT)

    def call(**variables):
        for name, value in {**dict.fromkeys(VARIABLES), **variables}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        given = {}
        monkeypatch.setattr(setuptools, "setup", given.update)
        return runpy.run_path("setup.py"), given

    return call


def fake_nvcc(folder, script=""):
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


# As CUDA 12.0 answers: architectures with a suffix are not in its lists.
LISTS = """case "$*" in
  *--list-gpu-arch*) printf 'compute_%s\\n' 75 80 86 90 ;;
  *--list-gpu-code*) printf 'sm_%s\\n' 75 80 86 90 ;;
  *compute_90f*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_90f'" >&2; exit 1 ;;
esac"""


def sm(*numbers):
    return [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]


def ptx(number):
    return [f"-gencode=arch=compute_{number},code=compute_{number}"]


DEFAULT = [*sm("80"), *ptx("80"), *sm("90a")]


def test_with_nvcc_and_torch_the_kernels_are_built(run, tmp_path):
    names, given = run(CUDA_HOME=fake_nvcc(tmp_path))
    (extension,) = given["ext_modules"]
    assert extension.sources == ["csrc/adamw.cu", "csrc/softmax_grad.cu"]
    assert extension.py_limited_api
    assert names["architectures"] == DEFAULT


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, "there is no nvcc on the path"),
        ({"CUDA_HOME": "/nowhere"}, "there is no nvcc in CUDA_HOME=/nowhere, nor on the path"),
        ({"CUDA_PATH": "/nowhere"}, "there is no nvcc in CUDA_PATH=/nowhere, nor on the path"),
        ({"SFT_KERNELS_CUDA": "0"}, "SFT_KERNELS_CUDA=0"),
    ],
)
def test_without_the_package_is_pure_and_says_so(run, variables, reason, capsys):
    _, given = run(**variables, PATH="/nowhere")
    assert given == {}
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_a_home_without_nvcc_falls_back_to_the_path_and_says_so(run, name, tmp_path, capsys):
    (tmp_path / "home" / "bin" / "nvcc").mkdir(parents=True)  # a folder is no nvcc
    found = fake_nvcc(tmp_path)
    names, given = run(**{name: str(tmp_path / "home")}, PATH=f"{found}/bin")
    assert given["ext_modules"]
    assert names["nvcc"] == f"{found}/bin/nvcc"
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}={tmp_path / 'home'}" in line
    assert f"{found}/bin/nvcc is used" in line


def test_a_home_with_nvcc_goes_before_the_path(run, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other, home = fake_nvcc(tmp_path / "other"), fake_nvcc(tmp_path)
    assert run(CUDA_HOME=home, PATH=f"{other}/bin")[0]["nvcc"] == f"{home}/bin/nvcc"
    assert not capsys.readouterr().err


def test_an_isolated_build_is_pure_and_says_so(run, tmp_path, monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, given = run(CUDA_HOME=fake_nvcc(tmp_path), TORCH_CUDA_ARCH_LIST="junk")
    assert given == {}
    assert "--no-build-isolation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": "/nowhere"}, "there is no nvcc on the path"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, "none of the architectures in TORCH_CUDA_ARCH_LIST='7.5'"),
        ({"TORCH_CUDA_ARCH_LIST": "12.0+PTX"}, "none of the architectures in TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_kernels_that_cannot_be_had_are_an_error_if_they_are_demanded(run, tmp_path, variables, reason, capsys):
    home = None if "PATH" in variables else fake_nvcc(tmp_path, LISTS)
    with pytest.raises(SystemExit, match=f"SFT_KERNELS_CUDA=1, but {reason}"):
        run(CUDA_HOME=home, SFT_KERNELS_CUDA="1", **variables)
    if home:  # without the demand the package is pure
        assert run(CUDA_HOME=home, **variables)[1] == {}
        assert "sft_kernels without its CUDA kernels: none of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", DEFAULT),
        (" ; , ", DEFAULT),
        ("8.0;9.0a", sm("80", "90a")),
        ("8.0, 8.6,9.0", sm("80", "86", "90")),
        ("\t8.0  8.6 ;\n 9.0 + ptx;", [*sm("80", "86", "90"), *ptx("90")]),
        ("8.0 8.0+PTX 8.0", [*sm("80"), *ptx("80")]),
        ("Hopper", [*sm("90"), *ptx("90")]),
        ("hopper+PTX", [*sm("90"), *ptx("90")]),
        ("Ampere;Ampere+Tegra", [*sm("80", "86"), *ptx("86"), *sm("87")]),
        ("Ampere+Tegra+PTX", [*sm("87"), *ptx("87")]),
        ("Ada", [*sm("89"), *ptx("89")]),
        ("Blackwell", [*sm("100", "103", "120", "121"), *ptx("121")]),
        ("Blackwell+Tegra", sm("110")),
        ("9.0A+PTX 10.0f 12.1a", [*sm("90a"), *ptx("90a"), *sm("100f", "121a")]),
    ],
)
def test_the_list_is_read_as_torch_reads_it(run, tmp_path, listed, expected):
    """The fake nvcc answers nothing, and is used as it is."""
    names, _ = run(CUDA_HOME=fake_nvcc(tmp_path), TORCH_CUDA_ARCH_LIST=listed)
    assert names["architectures"] == expected


def test_the_names_are_those_of_torch(run, tmp_path, monkeypatch):
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if torch.version.hip:
        pytest.skip("torch knows no names of NVIDIA's here")
    names, _ = run(CUDA_HOME=fake_nvcc(tmp_path))
    for name in names["NAMES"]:
        words = "+".join(word.capitalize() for word in name.split("+"))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", words)
        try:
            torchs = _get_cuda_arch_flags()
        except ValueError:  # a torch that does not know the name yet
            continue
        read = names["read"](words)
        assert torchs == sorted(flag for n, more in read.items() for flag in sm(n) + (ptx(n) if more else []))


@pytest.mark.parametrize("junk", ["Hoper", "80", "sm_80", "9", "8.0.1", "8.0+PTX+PTX", "+PTX", "All", "8.0b", "-8.0"])
def test_anything_else_in_the_list_is_an_error(run, tmp_path, junk):
    home = fake_nvcc(tmp_path)
    expected = rf"TORCH_CUDA_ARCH_LIST: expected versions such as 8\.0 .*; got {re.escape(repr(junk))} in "
    with pytest.raises(SystemExit, match=expected):
        run(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=f"{junk};8.0")
    assert run(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST=junk, SFT_KERNELS_CUDA="0")[1] == {}


def test_architectures_that_cannot_be_had_are_left_out(run, tmp_path, capsys):
    home = fake_nvcc(tmp_path, LISTS)
    names, _ = run(CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="5.2 Turing 8.0 8.6 9.0 9.0a 9.0f 10.0a 12.0+PTX")
    assert names["architectures"] == sm("80", "86", "90", "90a")
    old, unknown = capsys.readouterr().err.splitlines()
    assert old == "sft_kernels: the CUDA kernels need 8.0 or later; left out: 5.2, 7.5"
    assert unknown.endswith("bin/nvcc does not know every architecture; left out: 9.0f, 10.0a, 12.0")


@pytest.mark.parametrize("script", ["exit 1", "echo compute_80; echo sm_80; exit 1", "echo nonsense", "\0"])
def test_an_nvcc_that_does_not_list_is_believed(run, tmp_path, script):
    names, _ = run(CUDA_HOME=fake_nvcc(tmp_path, script), TORCH_CUDA_ARCH_LIST="8.0 13.0")
    assert names["architectures"] == sm("80", "130")


class Driver:
    """CUDA's driver as ``native`` asks it, on a machine with GPUs of these compute capabilities."""

    def __init__(self, *gpus):
        self.gpus = gpus

    def cuInit(self, flags):
        return 0 if self.gpus else 100

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.gpus[device.value - 40][attribute - 75]
        return 0


@pytest.mark.parametrize(
    ("listed", "gpus", "expected"),
    [
        ("native", [(9, 0)], [*sm("90"), *ptx("90")]),
        ("Native", [(9, 0), (8, 0), (9, 0)], [*sm("80", "90"), *ptx("90")]),
        ("native", [(12, 0)], [*sm("90"), *ptx("90")]),  # nvcc is older: the driver compiles its PTX
        ("8.6;native", [(8, 0)], [*sm("86", "80"), *ptx("80")]),
        ("native", [], DEFAULT),
        ("native", None, DEFAULT),
    ],
)
def test_native_is_the_visible_gpus(run, tmp_path, monkeypatch, listed, gpus, expected, capsys):
    def load(name):
        if gpus is None:
            raise OSError(name)
        return Driver(*gpus)

    monkeypatch.setattr(ctypes, "CDLL", load)
    names, _ = run(CUDA_HOME=fake_nvcc(tmp_path, LISTS), TORCH_CUDA_ARCH_LIST=listed)
    assert names["architectures"] == expected
    assert ("no GPU is visible: the default 8.0+PTX 9.0a is used" in capsys.readouterr().err) == (not gpus)


def test_the_build_compiles_and_links_for_what_is_left(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "sft_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "sft_kernels/__init__.py"):
        shutil.copy(ROOT / name, tree / name)
    calls = tmp_path / "calls"
    script = f"{LISTS}\n{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\" >> {calls}\n"
    script += 'while [ $# -gt 1 ]; do [ "$1" = -o ] && [ "$2" != /dev/null ] && touch "$2"; shift; done; exit 0'
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"CUDA_HOME": fake_nvcc(tmp_path, script), "TORCH_CUDA_ARCH_LIST": "7.5 9.0+PTX"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tree / "sft_kernels" / "_C.abi3.so").exists()
    given = [json.loads(line) for line in calls.read_text().splitlines()]
    built = [[option for option in call if "gencode" in option] for call in given if "-o" in call]
    assert built == 3 * [[*sm("90"), *ptx("90")]]


def test_the_source_package_carries_the_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "SFT_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {name.partition("/")[2] for name in files.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} <= found
