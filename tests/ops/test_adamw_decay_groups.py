"""``decay_groups``: what decays and what does not."""

import pytest
import torch
from torch import nn

from sft_kernels import AdamW, decay_groups


class RootMeanSquareNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))  # two dimensions, and still a norm's


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm, self.custom = nn.LayerNorm(4), RootMeanSquareNorm()
        self.convolution = nn.Conv1d(4, 4, 3)
        self.scalar = nn.Parameter(torch.ones(()))
        self.untied, self.head = nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
        self.head.weight = self.embedding.weight


def test_decay_groups_decays_matrices_that_are_neither_norms_nor_embeddings():
    model = Model()
    decayed, exempt = decay_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = ["layers.0.weight", "layers.1.weight", "convolution.weight", "untied.weight"]
    assert [names[id(p)] for p in decayed["params"]] == matrices
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.3, 0.0)
    everything = [names[id(p)] for p in decayed["params"] + exempt["params"]]
    assert sorted(everything) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_decay_groups_makes_an_optimiser_even_where_nothing_is_decayed():
    for model in (Model(), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)):
        optimizer = AdamW(decay_groups(model))
        assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
            p.requires_grad for p in model.parameters()
        )


@pytest.mark.parametrize(
    ("model", "weight_decay", "match"),
    [
        (nn.Linear(2, 2), -0.1, "weight_decay"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, "model"),
        (nn.ReLU(), 0.1, "model"),
    ],
    ids=["negative", "frozen", "nothing"],
)
def test_decay_groups_names_what_is_wrong(model, weight_decay, match):
    with pytest.raises(ValueError, match=match):
        decay_groups(model, weight_decay)
