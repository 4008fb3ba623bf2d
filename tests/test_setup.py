"""What ``setup.py`` builds, for which architectures, and in which words it does without."""

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def run(monkeypatch):
    """The names of ``setup.py``, and what it would have given to ``setup()``."""
    monkeypatch.chdir(ROOT)

    def call(**variables):
        for name, value in {"SFT_KERNELS_CUDA": None, **variables}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        given = {}
        monkeypatch.setattr(setuptools, "setup", given.update)
        return runpy.run_path("setup.py"), given

    return call


def fake_nvcc(folder):
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.touch(mode=0o755)
    return str(folder)


def test_with_nvcc_and_torch_the_kernels_are_built(run, tmp_path):
    _, given = run(CUDA_HOME=fake_nvcc(tmp_path))
    (extension,) = given["ext_modules"]
    assert extension.sources == ["csrc/adamw.cu", "csrc/softmax_grad.cu"]
    assert extension.py_limited_api


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CUDA_HOME": "/nowhere"}, "no nvcc in CUDA_HOME or on the path"),
        ({"SFT_KERNELS_CUDA": "0"}, "SFT_KERNELS_CUDA=0"),
    ],
)
def test_without_the_package_is_pure_and_says_so(run, variables, reason, capsys):
    _, given = run(**variables)
    assert given == {}
    assert reason in capsys.readouterr().err


def test_an_isolated_build_is_pure_and_says_so(run, tmp_path, monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, given = run(CUDA_HOME=fake_nvcc(tmp_path))
    assert given == {}
    assert "--no-build-isolation" in capsys.readouterr().err


def test_what_is_demanded_and_cannot_be_is_an_error():
    environment = {**os.environ, "SFT_KERNELS_CUDA": "1", "CUDA_HOME": "/nowhere"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode
    assert "SFT_KERNELS_CUDA=1, but there is no nvcc" in done.stderr


def test_architectures_are_read_as_torch_reads_them(run):
    names, _ = run(SFT_KERNELS_CUDA="0")
    sm_80, sm_90a = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"
    ptx = "-gencode=arch=compute_80,code=compute_80"
    assert names["gencode"](names["ARCHITECTURES"]) == [sm_80, ptx, sm_90a]
    assert names["gencode"]("8.0;9.0a") == [sm_80, sm_90a]
    assert names["gencode"]("12.0")[0].endswith("code=sm_120")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: .* got 'Hopper'"):
        names["gencode"]("Hopper")


def test_the_source_package_carries_the_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    environment = {**os.environ, "SFT_KERNELS_CUDA": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        found = {name.partition("/")[2] for name in files.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()} <= found
