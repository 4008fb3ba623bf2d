"""The page of the examples: every example has a row, its diff as it is, and a test."""

import re
from pathlib import Path

import pytest

from .harness import FOLDER, assert_small_diff, diff, source

HELPERS = {"diff", "small"}
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_row_a_small_diff_and_a_test(name):
    assert f"| [{name}.py]({name}.py) |" in README
    assert_small_diff(name)
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert f'"{name}"' in tests or (Path(__file__).parent / f"test_{name}.py").exists()


def test_the_diffs_are_those_of_the_files():
    shown = dict(re.findall(r"### \[(.*?)\.py\].*?\n\n```diff\n(.*?)\n```", README, flags=re.DOTALL))
    assert shown == {name: diff(source(name)) for name in EXAMPLES if diff(source(name))}, (
        "write them again: python examples/diff.py --write"
    )
