"""The architecture as import arrows: they point down, and nothing heavy is imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sft_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
STANDS_ON = {"cross_entropy": {"softmax_grad"}, "linear_cross_entropy": {"softmax_grad"}}
TRAINING_ONLY = {"transformers", "tokenizers", "safetensors", "tyro", "tqdm", "yaml", "matplotlib"}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path) for path in FILES}


def height(module):
    """How high a module stands; arrows go from higher to lower. The same rows as in DESIGN.md, section 2."""
    match module[1:]:
        case ("cli",) | ("__main__",):
            return 6
        case ("sft", *_) | ("verify",):
            return 5
        case ("integrations", *_):
            return 4
        case ():
            return 3
        case ("ops", _, "api"):
            return 2
        case ("ops", *_):
            return 1
        case ("_interpreter",):  # below _triton, which corrects it
            return -1
        case (name,) if name.startswith("_"):
            return 0
    raise AssertionError(f"{'.'.join(module)} has no place in DESIGN.md, section 2")


def imports(path):
    """Every module that a file imports, anywhere in it, as a tuple of names."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:  # a name is a module where there is such a file
                yield (*base, alias.name) if (*base, alias.name) in MODULES else base


def own(path):
    return [target for target in imports(path) if target[0] == PACKAGE.name]


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@each_file
def test_imports_point_down(path):
    module = module_of(path)
    for target in own(path):
        neighbours = height(target) == height(module) and target[:2] == module[:2]
        assert height(target) < height(module) or neighbours, f"{'.'.join(module)} imports {'.'.join(target)}"


@each_file
def test_ops_do_not_import_each_other(path):
    module = module_of(path)
    if module[1:2] != ("ops",):
        return
    allowed = {*module[2:3], *STANDS_ON.get(module[2] if module[2:] else "", ())}
    assert {target[2] for target in own(path) if target[1:2] == ("ops",) and target[2:]} <= allowed


@each_file
def test_the_reference_is_imported_by_verify_and_other_references_alone(path):
    if module_of(path)[-1] not in ("verify", "reference"):
        assert not [target for target in own(path) if target[-1] in ("reference", "_budget")]


@each_file
def test_ops_need_nothing_that_only_training_needs(path):
    if height(module_of(path)) <= 3:
        assert not {target[0] for target in imports(path)} & TRAINING_ONLY


def loaded_by(statement):
    code = f"{statement}\nimport sys; print(*sorted(sys.modules), sep='\\n')"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, cwd=PACKAGE.parent, check=True, capture_output=True, text=True).stdout.split())


def test_loading_the_public_names_loads_no_implementation_and_nothing_heavy():
    loaded = loaded_by("from sft_kernels import *") - loaded_by("import torch")
    heavy = {"triton", "flash_attn", *TRAINING_ONLY}
    assert not {name for name in loaded if name.split(".")[0] in heavy}
    ours = {name for name in loaded if name.startswith("sft_kernels")}
    assert not {name for name in ours if name.endswith(("_impl", "._csrc", "._triton", ".sft", ".integrations"))}
