"""The table of failures in the trainer's README: each row names a command of ours, and a test that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = r"`(sft-kernels (train|inspect|plan|demo)\b|train\b|inspect\b)"


def rows():
    text = (ROOT / "sft_kernels" / "sft" / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Failures that show no error")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_table_is_whole():
    assert len(rows()) == 11
    assert all(len(row) == 5 and all(row) for row in rows())


@pytest.mark.parametrize("number", range(11))
def test_a_row_has_a_command_and_a_test_that_is_there(number):
    _, _, shown, _, test = rows()[number]
    assert re.search(COMMANDS, shown)
    path, _, name = test.strip("`").partition("::")
    assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.M)
