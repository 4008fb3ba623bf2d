"""Each example holds its own diff: ``python examples/diff.py [FILE …]`` prints it.

A line that ends in ``# +`` is ours. A comment ``# - code`` is the line of the stock program that it replaces.
"""

import re
import sys
from pathlib import Path

ADDED = re.compile(r"\s*# \+$")
REMOVED = re.compile(r"^(\s*)# - (.*)$")


def stock(source):
    """Returns the program as it was: without the added lines, with the removed ones."""
    lines = [line for line in source.splitlines() if not ADDED.search(line)]
    return "\n".join(REMOVED.sub(r"\1\2", line) for line in lines) + "\n"


def diff(source):
    """Returns the changed lines, each after a ``-`` or a ``+``, without their indentation."""
    changed = []
    for line in source.splitlines():
        if match := REMOVED.match(line):
            changed.append(f"-{match[2]}")
        elif ADDED.search(line):
            changed.append(f"+{ADDED.sub('', line).strip()}")
    return "\n".join(changed)


def main(names):
    paths = [Path(name) for name in names] or sorted(Path(__file__).parent.glob("*.py"))
    for path in paths:
        if changed := diff(path.read_text(encoding="utf-8")):
            print(f"{path.name}\n{changed}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
