"""The options of ``sft-kernels inspect``, which its ``--help`` can show without a library."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional

from .recipe import Recipe


@dataclass
class Inspect(Recipe):
    """A recipe, and how to look at its data.

    Options of the recipe that a look does not need are checked as ``train`` does, and change nothing.
    """

    files: Annotated[list[str], Positional] = field(default_factory=list)
    """The data; the same as --data."""
    show: int = 1
    """Examples to print token by token."""
    html: str | None = None
    """Write a page to look at into this file. It loads nothing else. With a model it has the model's loss."""
