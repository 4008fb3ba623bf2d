"""``decay_groups``: what decays and what does not."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

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


class Squared(nn.Module):
    def forward(self, tensor):
        return tensor.square()


class LowRank(nn.Module):
    """A parametrisation with a matrix of its own."""

    def __init__(self, rows, columns):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(1, columns)), nn.Parameter(torch.ones(rows, 1))

    def forward(self, tensor):
        return tensor + self.up @ self.down


class Vocabulary(nn.Module):
    """An embedding that is no ``torch.nn.Embedding``: a slice of the vocabulary, say."""

    def __init__(self):
        super().__init__()
        self.num_embeddings, self.table = 12, nn.Parameter(torch.ones(6, 4))


class TokenEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.project = nn.Parameter(torch.ones(6, 4)), nn.Linear(4, 4)


class Adapted(nn.Module):
    """An adapter around a layer, as PEFT lays it out."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.adapter = base_layer, nn.ParameterDict({"default": torch.ones(2, 4)})


class Empty(nn.Linear):
    """A layer with a property that has no value yet."""

    @property
    def num_embeddings(self):
        raise RuntimeError("not yet")


ADAPTERS = ("lora_A", "lora_E", "boft_s")


class AsPeft(nn.ParameterDict):
    """The parameters that PEFT keeps of an adapter under one name."""

    def __init__(self):
        super().__init__({"default": torch.ones(4, 1)})


def adapted_by_peft(name, layer):
    """PEFT's adapter of ``layer``; what it adapts is frozen."""

    def make():
        peft = pytest.importorskip("peft")
        kinds = {
            "DoRA": lambda: peft.LoraConfig(r=1, use_dora=True, target_modules=["0"]),
            "IA3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        }
        return peft.inject_adapter_in_model(kinds[name](), nn.Sequential(layer()))

    return make


def parametrized(module, parametrization=None, name="weight"):
    parametrize.register_parametrization(module, name, parametrization or Squared())
    return module


def _old(function, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(module)


MODULES = {
    "bag": (lambda: nn.EmbeddingBag(6, 4), []),
    "subclass": (lambda: type("Positions", (nn.Embedding,), {})(6, 4), []),
    "by num_embeddings": (Vocabulary, []),
    "by name": (TokenEmbedding, ["project.weight"]),
    "adapted": (lambda: Adapted(nn.Embedding(6, 4)), []),
    "adapted linear": (lambda: Adapted(nn.Linear(4, 4)), ["base_layer.weight", "adapter.default"]),
    "parametrized": (lambda: parametrized(nn.Embedding(6, 4)), []),
    "parametrized bag": (lambda: parametrized(nn.EmbeddingBag(6, 4)), []),
    "of low rank": (lambda: parametrized(nn.Embedding(6, 4), LowRank(6, 4)), []),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Embedding(6, 4)), []),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Embedding(6, 4)), []),
    "norm": (lambda: parametrized(RootMeanSquareNorm()), []),
    "bias": (lambda: parametrized(nn.Bilinear(4, 4, 4), name="bias"), ["weight"]),
    "linear": (lambda: parametrized(nn.Linear(4, 4)), ["parametrizations.weight.original"]),
    "linear, of low rank": (
        lambda: parametrized(nn.Linear(4, 4), LowRank(4, 4)),
        ["parametrizations.weight.original", "parametrizations.weight.0.down", "parametrizations.weight.0.up"],
    ),
    "scale": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), ["parametrizations.weight.original1"]),
    "old scale": (lambda: _old(nn.utils.weight_norm, nn.Linear(4, 4)), ["weight_v"]),
    "spectral": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), ["parametrizations.weight.original"]),
    "biases of two dimensions": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        ["in_proj_weight", "out_proj.weight"],
    ),
    "convolution of patches": (lambda: type("PatchEmbedding", (nn.Conv2d,), {})(3, 4, 2), ["weight"]),
    "linear of steps": (lambda: type("TimestepEmbedding", (nn.Linear,), {})(4, 4), ["weight"]),
    "property that raises": (lambda: Empty(4, 4), ["weight"]),
    "DoRA": (
        adapted_by_peft("DoRA", lambda: nn.Conv2d(4, 3, 2)),
        ["0.lora_A.default.weight", "0.lora_B.default.weight"],
    ),
    "IA3": (adapted_by_peft("IA3", lambda: nn.Linear(4, 4)), []),
    "BOFT and AdaLoRA": (lambda: nn.ModuleDict({name: AsPeft() for name in ADAPTERS}), ["lora_A.default"]),
}


@pytest.mark.parametrize("name", [*MODULES])
def test_decay_groups_knows_a_layer_by_its_kind(name):
    make, expected = MODULES[name]
    model = nn.ModuleDict({"layer": make()})
    decayed, _ = decay_groups(model)
    names = {id(p): name.removeprefix("layer.") for name, p in model.named_parameters()}
    assert sorted(names[id(p)] for p in decayed["params"]) == sorted(expected)


def test_a_head_tied_to_a_parametrized_embedding_is_not_decayed():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    parametrized(model["embedding"])
    decayed, exempt = decay_groups(model)
    assert decayed["params"] == []
    assert [id(p) for p in exempt["params"]] == [id(model["head"].weight)]


@pytest.mark.parametrize(
    ("model", "weight_decay", "match"),
    [
        (nn.Linear(2, 2), -0.1, "weight_decay"),
        (nn.Linear(2, 2), float("nan"), "weight_decay"),
        (nn.Linear(2, 2).requires_grad_(False), 0.1, "model"),
        (nn.ReLU(), 0.1, "model"),
    ],
    ids=["negative", "not a number", "frozen", "nothing"],
)
def test_decay_groups_names_what_is_wrong(model, weight_decay, match):
    with pytest.raises(ValueError, match=match):
        decay_groups(model, weight_decay)


@pytest.mark.parametrize("weight_decay", [None, "a", torch.ones(2)], ids=str)
def test_decay_groups_names_a_weight_decay_that_is_no_number(weight_decay):
    with pytest.raises(TypeError, match="weight_decay: expected a number"):
        decay_groups(nn.Linear(2, 2), weight_decay)


def test_decay_groups_is_imported_from_where_it_was_as_well():
    from sft_kernels.ops.adamw import api

    assert api.decay_groups is decay_groups
