"""Tiny models for the tests of ``patch``, and how a patched one is held to itself unpatched."""

import copy

import pytest
import torch

from sft_kernels.integrations import head_counts, patch

transformers = pytest.importorskip("transformers")

V = 37
IDS = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
LABELS = IDS.clone()
LABELS[:, :3] = LABELS[1, 6] = -100
BATCH = {"input_ids": IDS, "labels": LABELS}


def llama(**options):
    """A causal LM of one layer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=64,
        **{"attn_implementation": "eager", **options},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def of_the_model(model):
    return model(**BATCH).loss


def outside(model):
    logits = model(input_ids=IDS).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V).float(), LABELS[:, 1:].reshape(-1))


def train(model, loss=of_the_model, steps=3, lr=0.05):
    """Losses and the first gradients of a few steps of SGD, and the parameters after."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr)
    losses, grads = [], None
    for _ in range(steps):
        torch.manual_seed(1)  # of dropout
        out = loss(model)
        out.backward()
        losses.append(out.detach())
        if grads is None:
            grads = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads, {name: p.detach().clone() for name, p in parameters.items()}


def assert_alike(ours, stock, rtol=1e-4, atol=1e-5):
    """Compare what :func:`train` returned."""
    torch.testing.assert_close(ours[0], stock[0], rtol=rtol, atol=atol)
    for mine, theirs in zip(ours[1:], stock[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if value is None:
                assert mine[name] is None, f"{name} has a gradient"
                continue
            assert mine[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(
                mine[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def same_training(model, loss=of_the_model, steps=3, expect=None, patched=patch, rtol=1e-4, atol=1e-5):
    """Train a copy of ``model`` as it is, then itself patched. ``expect`` is ``(calls, fused, materialised)``."""
    stock = train(copy.deepcopy(model), loss, steps)
    patched(model)
    ours = train(model, loss, steps)
    assert_alike(ours, stock, rtol, atol)
    if expect is not None:
        assert tuple(head_counts(model)) == expect
    return model
