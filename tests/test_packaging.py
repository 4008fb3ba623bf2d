"""The package's metadata and the words of its documents about installing it hold what they say."""

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sft_kernels

from .recipes import plain_loop

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sft_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (ROOT, ROOT / "bench", ROOT / "csrc", ROOT / "examples", ROOT / "sft_kernels")
PAGES = sorted({page for folder in FOLDERS for page in folder.glob("*.md" if folder == ROOT else "**/*.md")})


def distributions(requirements):
    names = (re.match(r"[\w.-]+", requirement).group().lower() for requirement in requirements)
    return {re.sub(r"[-_.]+", "-", name) for name in names}


def third_party(path):
    """The distributions that a file imports, in ``import`` or by ``import_module`` and ``find_spec``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            names = [node.args[0].value] if called in ("import_module", "find_spec") else []
        for name in names:
            name = name.partition(".")[0]
            if name not in sys.stdlib_module_names and name != "sft_kernels":
                yield {"yaml": "pyyaml"}.get(name, name.replace("_", "-"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_that_the_package_imports_is_declared(path):
    allowed = distributions([*PROJECT["dependencies"], *EXTRAS["train"]])
    part = path.relative_to(PACKAGE).parts[0]
    if part == "integrations":  # of the trainers' own modules
        allowed |= distributions(EXTRAS["integration"])
    elif part == "ops":
        allowed = distributions([*PROJECT["dependencies"], *EXTRAS["flash"]])
    assert set(third_party(path)) <= allowed


def test_the_extras_bring_what_they_say():
    from sft_kernels.ops.packed_attention.flash_impl import LIBRARIES

    assert set(EXTRAS) == {"train", "tensorboard", "flash", "dev", "integration"}
    assert {"jinja2", "pyarrow"} <= distributions(EXTRAS["train"])
    assert "flash-attn" not in distributions([*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["integration"]])
    assert [requirement.replace('"', "'") for requirement in EXTRAS["flash"]] == [
        "flash-attn>=2.6 ; sys_platform == 'linux'"
    ]
    assert distributions(EXTRAS["tensorboard"]) == {"tensorboard"} <= distributions(EXTRAS["dev"])
    assert any("flash_attn" in library.modules for library in LIBRARIES)
    for extra in EXTRAS:
        assert f"| `{extra}` |" in README


def test_the_version_is_read_from_the_package_without_importing_it():
    """An isolated build has no torch."""
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version'];"
    code += "import os; os.environ['SFT_KERNELS_CUDA'] = '0'; runpy.run_path('setup.py')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == sft_kernels.__version__, done.stderr


def test_no_page_installs_the_package_from_an_index():
    assert len(PAGES) > 10
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            install = re.search(r"(?:pip3?|uv|pipx|poetry|conda)\s+(?:install|add|pip install)\b(.*)", line)
            assert not (install and re.search(r"sft[-_]kernels", install.group(1))), f"{page}: {line}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "Makefile"])
def test_the_extras_that_are_installed_exist(page):
    named = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / page).read_text(encoding="utf-8"))
    assert {name for names in named for name in names.split(",")} <= set(EXTRAS)
    assert named or page == "CONTRIBUTING.md"


def blocks():
    """The README's Python above its set-up, after the PyTorch that ours replaces."""
    first, *rest = re.findall(r"```python\n(.*?)```", README.partition("\n## Two commands")[0], re.DOTALL)
    assert first.startswith("# PyTorch")
    return rest


@pytest.mark.parametrize("code", blocks())
def test_the_first_code_of_the_readme_has_its_imports(code):
    """Its reader brings a model, hidden states, labels or a folder, and nothing else."""
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    free = {node.id for node in names} - bound - set(vars(builtins))
    assert free <= {"model", "hidden", "labels", "folder"}


def test_the_first_code_of_the_readme_runs():
    model = plain_loop.Model(vocab=50, width=16)
    ids = torch.randint(0, 50, (2, 8))
    given = {"model": model, "hidden": model(ids), "labels": ids}
    exec(blocks()[0].replace("optimizer.step()", "loss.backward(); optimizer.step()"), given)
    assert given["loss"].isfinite()
    assert given["optimizer"].last_grad_norm > 0


def test_the_names_that_the_readme_replaces_are_torchs(monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.AdamW)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", torch.nn.functional.cross_entropy)
    exec(blocks()[2], {})
    assert torch.optim.AdamW is sft_kernels.AdamW
    assert torch.nn.functional.cross_entropy is sft_kernels.cross_entropy


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_relies_on_what_python_oo_leaves_out(path):
    """``python -OO`` has no docstrings and no ``assert``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error instead of assert"
        names = getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None)
        assert not {"__doc__", "__debug__", "getdoc"} & {name for name in names if isinstance(name, str)}, (
            f"line {node.lineno}"
        )
