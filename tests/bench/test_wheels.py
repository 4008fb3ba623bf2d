"""The folder of peers: what is packed is what is installed, and a folder that is wrong is named."""

import re
import subprocess
import sys
import zipfile

import pytest

from bench import wheels


def wheel(folder, version="1.0", name="tiny", **files):
    """A wheel of one module that says its version; further ``files`` are ``{path: text}``."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = {version!r}\n" * 100,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **files,
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in (contents | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return path


def said(target, code):
    command = f"import sys; sys.path[:0] = {wheels.paths(target)}; {code}"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "wheels"


def test_plain_and_packed_wheels_are_installed_side_by_side(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(wheels, "FILTERS", [wheels.FILTERS[0], {"id": wheels.lzma.FILTER_LZMA2, "preset": 0}])  # small
    wheel(folder)
    left_out = {"other/iket/probe.so": "x", "other/kept.so": "y"}
    packed = wheel(tmp_path / "other", "2.1", "Other_Name", **left_out)
    wheels.pack([packed], folder / wheels.PACKED)
    target = tmp_path / "target"
    assert wheels.install(folder, target) == {"tiny": "1.0", "other-name": "2.1"} == wheels.installed(target)
    assert said(target, "import tiny, Other_Name; print(tiny.VERSION, Other_Name.VERSION)") == "1.0 2.1"
    assert [path.name for path in (target / "site-packages" / "other").rglob("*.so")] == ["kept.so"]


def test_the_folder_is_called_site_packages_for_quack_and_the_dsl_is_found(folder, tmp_path):
    wheel(folder, **{"nvidia_cutlass_dsl/dsl_packages/cutlass.py": "VERSION = 'dsl'\n"})
    wheels.install(folder, tmp_path)
    assert [path.removeprefix(str(tmp_path)) for path in wheels.paths(tmp_path)] == [
        "/site-packages",
        "/site-packages/nvidia_cutlass_dsl/dsl_packages",
    ]
    assert said(tmp_path, "import cutlass; print(cutlass.VERSION)") == "dsl"


def test_installing_again_does_nothing_and_replaces_its_own_set_alone(folder, tmp_path, monkeypatch):
    wheel(folder)
    target = tmp_path / "target"
    wheels.install(folder, target)
    with monkeypatch.context() as patch:
        patch.setattr(wheels.subprocess, "run", None)
        assert wheels.install(folder, target) == {"tiny": "1.0"}
    wheel(folder, name="another")
    assert wheels.install(folder, target) == {"tiny": "1.0", "another": "1.0"}
    assert not (target / "partial").exists()
    (foreign := tmp_path / "foreign" / "site-packages").mkdir(parents=True)
    (foreign / "mine.py").touch()
    with pytest.raises(FileExistsError, match="holds packages that were not unpacked here"):
        wheels.install(folder, foreign.parent)
    assert [path.name for path in foreign.iterdir()] == ["mine.py"]


def test_the_command_unpacks_or_says_why_not(folder, tmp_path, capsys):
    assert wheels.main([str(folder), "--into", str(tmp_path / "target")]) == 1
    assert "no such folder" in capsys.readouterr().err
    wheel(folder)
    assert wheels.main([str(folder), "--into", str(tmp_path / "target")]) == 0
    assert capsys.readouterr().out == "tiny 1.0\n"


@pytest.mark.parametrize("kind", ["missing", "empty", "twice", "torn", "not for this python"])
def test_a_folder_that_is_wrong_is_named(kind, folder, tmp_path):
    error, why = FileNotFoundError, "no such folder; python -m bench.wheels"
    if kind == "empty":
        folder.mkdir()
        why = "no wheels here; python -m bench.wheels"
    elif kind == "twice":
        wheel(folder)
        wheel(folder, "1.1")
        error, why = ValueError, "two wheels of tiny, 1.0 and 1.1; keep one"
    elif kind == "torn":
        wheel(folder).write_bytes(b"PK torn")
        error, why = RuntimeError, "pip install failed: ERROR: .*tiny"
    elif kind == "not for this python":
        wheel(folder).rename(folder / "tiny-1.0-cp27-cp27m-win32.whl")
        error, why = RuntimeError, "pip install failed: ERROR: .*not a supported wheel"
    with pytest.raises(error, match=f"^{re.escape(str(folder))}: {why}"):
        wheels.install(folder, tmp_path / "target")
    assert wheels.installed(tmp_path / "target") == {}


def test_fetching_asks_for_the_gpu_machines_python_and_pins_every_version(folder, monkeypatch):
    asked = []

    def pip(named, *arguments):
        asked.extend(arguments)
        wheel(wheels.Path(arguments[arguments.index("-d") + 1]))

    monkeypatch.setattr(wheels, "_pip", pip)
    monkeypatch.setattr(wheels, "FILTERS", [{"id": wheels.lzma.FILTER_LZMA2, "preset": 0}])
    wheels.fetch(folder)
    assert [path.name for path in folder.iterdir()] == [wheels.PACKED]
    assert asked[asked.index("--python-version") + 1] == "3.12"
    assert {f"{name}=={version}" for name, version in wheels.PINNED.items()} <= set(asked)
