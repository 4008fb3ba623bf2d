import re
from pathlib import Path

import torch
import torch.nn.functional as F

from . import example_weights, plain_loop


def test_the_swap_trains():
    losses = plain_loop.main()
    assert losses[-1] < 0.5 * losses[0]


def test_the_swap_computes_the_loss_it_replaces():
    torch.manual_seed(0)
    model = plain_loop.Model(100, 32)
    ids = torch.randint(0, 100, (8, 24))
    labels = ids.clone()
    labels[:, :12] = -100
    was = F.cross_entropy(model.head(model(ids))[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    ours = plain_loop.linear_cross_entropy(model(ids), model.head.weight, labels, shift=True)
    torch.testing.assert_close(ours, was)


def test_examples_weigh_the_same():
    torch.testing.assert_close(*example_weights.main())


def test_the_lines_of_the_readme_are_those_of_the_recipe():
    """The README's swap is code that runs: every line of its "ours" block stands in plain_loop.py."""
    here = Path(__file__).parent
    readme = (here.parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- plain_loop\.py -->\n```python\n(.*?)```", readme, re.DOTALL).group(1)
    recipe = {line.strip() for line in (here / "plain_loop.py").read_text(encoding="utf-8").splitlines()}
    code = [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]
    assert [line for line in code if line not in recipe] == []
