"""Each example holds its own diff: ``python examples/diff.py [FILE …]`` prints it.

``python examples/diff.py --write`` writes all of them into README.md. A line that ends in ``# +`` is
ours. A comment ``# - code`` is the line of the stock program that it replaces.
"""

import re
import sys
from pathlib import Path

ADDED = re.compile(r"\s*# \+$")
REMOVED = re.compile(r"^(\s*)# - (.*)$")
HEADING = "## The diffs\n"


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


def diffs(folder):
    """Returns ``{file name: diff}`` of all examples in ``folder`` that have one."""
    found = {path.name: diff(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))}
    return {name: changed for name, changed in found.items() if changed}


def section(folder):
    """Returns the part of README.md that shows the diffs."""
    blocks = [f"### [{name}]({name})\n\n```diff\n{changed}\n```\n" for name, changed in diffs(folder).items()]
    return "\n".join([HEADING, *blocks])


def main(names):
    folder = Path(__file__).parent
    if names == ["--write"]:
        readme = folder / "README.md"
        before, _, _ = readme.read_text(encoding="utf-8").partition(HEADING)
        readme.write_text(before + section(folder), encoding="utf-8")
        return
    shown = {Path(name).name: diff(Path(name).read_text(encoding="utf-8")) for name in names} or diffs(folder)
    for name, changed in shown.items():
        print(f"{name}\n{changed}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
