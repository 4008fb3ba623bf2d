"""The package's names load when they are asked for, and ``--help`` loads nothing heavy."""

import ast
import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import sft_kernels

HEAVY = {"torch", "numpy", "triton", "transformers", "tokenizers", "matplotlib", "tqdm", "yaml"}
FILE = Path(sft_kernels.__file__)


def run(code, *args, **env):
    command = [sys.executable, "-c", code, *args]
    options = {"capture_output": True, "text": True, "env": {**os.environ, **env}}
    done = subprocess.run(command, cwd=FILE.parents[1], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def block_for_type_checkers():
    """Each name in the ``if TYPE_CHECKING`` block, with the module that it is imported from."""
    (block,) = (node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.If))
    assert block.test.id == "TYPE_CHECKING"
    for statement in block.body:
        assert statement.level == 1
        for alias in statement.names:
            assert alias.asname is None
            yield alias.name, f".{statement.module}"


def test_type_checkers_and_python_see_the_same_names():
    assert dict(block_for_type_checkers()) == sft_kernels._MODULES
    assert sorted(sft_kernels._MODULES) == sft_kernels.__all__
    for name, module in sft_kernels._MODULES.items():
        home = importlib.import_module(module, "sft_kernels")
        assert getattr(sft_kernels, name) is getattr(home, name)
    assert (FILE.parent / "py.typed").is_file()


def test_importing_the_package_loads_nothing_heavy_and_a_name_loads_its_module():
    code = """
import sys, sft_kernels
print(*{name.split(".")[0] for name in sys.modules}, sep=",")
assert not [name for name in sys.modules if name.startswith("sft_kernels.")]
assert not hasattr(sft_kernels, "nothing")
assert {*sft_kernels.__all__, "ops", "__version__"} <= {*dir(sft_kernels)}
assert "torch" not in sys.modules
print(sft_kernels.ops.adamw.api.AdamW is sft_kernels.AdamW, sft_kernels._backend.__name__)
"""
    loaded, rest = run(code).splitlines()
    assert not HEAVY & {*loaded.split(",")}
    assert rest == "True sft_kernels._backend"


def test_stars_pickles_and_assignments_work_as_before(monkeypatch):
    names = {}
    exec("from sft_kernels import *", names)
    assert {*sft_kernels.__all__} == {*names} - {"__builtins__"}
    assert pickle.loads(pickle.dumps(sft_kernels.AdamW)) is sft_kernels.AdamW
    monkeypatch.setattr(sft_kernels, "cross_entropy", "another")
    monkeypatch.delattr(sft_kernels, "AdamW")  # to be loaded again
    assert sft_kernels.AdamW.__name__ == "AdamW"
    assert sft_kernels.cross_entropy == "another"


@pytest.mark.parametrize("error", [ImportError("no libcudart.so"), AttributeError("half a torch")])
def test_a_name_that_cannot_be_loaded_is_an_import_error(error, monkeypatch):
    def fail(name, package=None):
        raise error

    monkeypatch.setattr(sft_kernels, "_import_module", fail)
    monkeypatch.delattr(sft_kernels, "AdamW")
    for ask in (lambda: sft_kernels.AdamW, lambda: hasattr(sft_kernels, "AdamW")):
        with pytest.raises(ImportError, match=str(error)):
            ask()


@pytest.mark.parametrize("argv", ["--help", "-h", "--version", "train --help", "inspect --help"])
def test_help_and_version_import_nothing_heavy(argv):
    code = """
import sys
from sft_kernels.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, *{name.split(".")[0] for name in sys.modules}, sep=",")
"""
    *said, last = run(code, *argv.split()).splitlines()
    status, *loaded = last.split(",")
    assert status == "0"
    assert not HEAVY & {*loaded}
    if argv == "--version":
        assert said == [f"sft-kernels {sft_kernels.__version__}"]
    else:
        assert said[0].startswith("usage: sft-kernels")
