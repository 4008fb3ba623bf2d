"""``KeptTokens`` of a batch, by torch's own collation and in a data loader with workers; and shifts of any length."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from sft_kernels import KeptTokens, LinearCrossEntropyLoss, linear_cross_entropy
from sft_kernels.verify import gradients, loss_oracle, plain_linear_cross_entropy

from .helpers import LINEAR, D, N, V, labels, run, same_bits

B, S = 6, 11


class Examples(Dataset):
    """Labels of ``B`` sequences, and which of them are kept."""

    def __init__(self, shift=1, capacity=None):
        self.labels = labels(B * S, masked=0.5).reshape(B, S)
        self.labels[2] = -100  # nothing is kept of one of them
        self.shift, self.capacity = shift, capacity

    def __len__(self):
        return B

    def __getitem__(self, i):
        y = self.labels[i]
        return {"labels": y, "kept": KeptTokens.from_labels(y, shift=self.shift, capacity=self.capacity)}


def same(found, expected):
    assert isinstance(found, KeptTokens)
    assert found[2:] == expected[2:]
    return torch.equal(found.rows, expected.rows) and torch.equal(found.targets, expected.targets)


@pytest.mark.parametrize(
    ("shift", "capacity", "workers"), [(0, None, 0), (1, None, 2), (1, S, 2), (3, None, 0), (3, S, 0)]
)
def test_a_data_loader_makes_those_of_the_batch(shift, capacity, workers):
    examples = Examples(shift, capacity)
    seen = 0
    for batch in DataLoader(examples, batch_size=4, num_workers=workers):
        y = batch["labels"]
        room = None if capacity is None else capacity * len(y)
        assert same(batch["kept"], KeptTokens.from_labels(y, shift=shift, capacity=room))
        seen += len(y)
    assert seen == B


def test_one_example_and_batches_of_batches():
    examples = [Examples()[i]["kept"] for i in range(B)]
    assert same(default_collate(examples[:1]), examples[0])
    whole = default_collate([default_collate(examples[:2]), default_collate(examples[2:])])
    assert same(whole, default_collate(examples))


def test_examples_that_do_not_go_together_are_refused_by_name():
    y = labels(S)
    with pytest.raises(ValueError, match=r"^shift: expected the same of all examples, got \[0, 2\]"):
        default_collate([KeptTokens.from_labels(y), KeptTokens.from_labels(y, shift=2)])
    with pytest.raises(ValueError, match=r"^capacity: expected one of all examples or of none"):
        default_collate([KeptTokens.from_labels(y), KeptTokens.from_labels(y, capacity=S)])


def test_what_torch_does_to_a_batch_leaves_them_what_they_are(monkeypatch):
    kept = Examples()[0]["kept"]
    (unbatched,) = [item["kept"] for item in DataLoader([{"kept": kept}], batch_size=None)]
    assert same(default_convert(kept), kept)
    assert same(unbatched, kept)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
    pinned = pin_memory({"kept": kept})["kept"]
    assert same(pinned, kept)
    assert pinned.rows is not kept.rows


# ---- shifts of any length


def moved(y, shift):
    return F.pad(y, (0, shift), value=-100)[..., shift:]


@pytest.mark.parametrize("loss", [each for each in LINEAR if each.impl == "torch"], ids=lambda loss: loss.name)
@pytest.mark.parametrize("shift", [2, 5, 22, 23, 40])
def test_a_shift_predicts_the_label_that_many_tokens_ahead(loss, shift):
    y, token_weight = labels(3 * 23, masked=0.4).reshape(3, 23), torch.rand(3, 23)
    tensors = loss.tensors(n=3 * 23)

    def ours(y, token_weight, **options):
        def call(hidden, *head):
            options.setdefault("token_weight", token_weight)
            return loss.ours(hidden.reshape(3, 23, D), *head, y, num_items=11, **options)

        return run(call, tensors)

    found = ours(y, token_weight, shift=shift)
    expected = ours(moved(y, shift), F.pad(token_weight, (0, shift))[..., shift:])
    assert same_bits(found, expected)
    kept = KeptTokens.from_labels(y, shift=shift)
    assert same_bits(ours(None, token_weight, shift=shift, kept=kept), expected)
    padded = KeptTokens.from_labels(y, shift=shift, capacity=70)
    value = loss.ours(tensors[0].reshape(3, 23, D), *tensors[1:], None, num_items=11, token_weight=token_weight,
                      shift=shift, kept=padded)  # fmt: skip
    torch.testing.assert_close(value, expected[0])
    if shift >= 23:
        assert kept.count == 0
        assert (found[0] == 0).all()


@pytest.mark.parametrize("shift", [0, 2, 9])
def test_the_oracle_and_the_plain_code_shift_alike(shift):
    tensors, y, token_weight = [t.double() for t in LINEAR[0].tensors(n=7)], labels(7, masked=0.3), torch.rand(7)
    options = {"shift": shift, "token_weight": token_weight, "reduction": "sum"}
    ref = loss_oracle(tensors, y, **options)
    found = gradients(lambda h, w: plain_linear_cross_entropy(h, w, None, y, **options), tensors)
    for x, r in zip(found, ref, strict=True):
        torch.testing.assert_close(x, torch.as_tensor(r), rtol=1e-10, atol=1e-12)


def test_true_is_one_and_false_is_none():
    y = labels()
    for flag, number in ((False, 0), (True, 1)):
        kept = KeptTokens.from_labels(y, shift=flag)
        assert type(kept.shift) is int
        assert same(kept, KeptTokens.from_labels(y, shift=number))
        assert torch.equal(
            linear_cross_entropy(*LINEAR[0].tensors(), kept=kept, shift=flag).isfinite(), torch.tensor(True)
        )


def test_the_module_shifts_too():
    module, hidden, y = LinearCrossEntropyLoss(D, V, shift=2), torch.randn(3, 5, D), labels(15).reshape(3, 5)
    assert torch.equal(module(hidden, y), linear_cross_entropy(hidden, module.linear.weight, y, shift=2))
    assert "shift=2" in repr(module)


@pytest.mark.parametrize(
    ("shift", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (None, TypeError)], ids=repr
)
def test_what_is_no_number_of_tokens_is_refused_by_name(shift, error):
    for call in (
        lambda: linear_cross_entropy(*LINEAR[0].tensors(), labels(), shift=shift),
        lambda: KeptTokens.from_labels(labels(), shift=shift),
        lambda: LinearCrossEntropyLoss(D, V, shift=shift),
    ):
        with pytest.raises(error, match=r"^shift: expected"):
            call()


def test_kept_tokens_of_another_shift_are_refused_with_both():
    kept = KeptTokens.from_labels(labels(), shift=3)
    with pytest.raises(ValueError, match=r"^kept was built with shift=3, the call says shift=2"):
        linear_cross_entropy(torch.randn(N, D), torch.randn(V, D), kept=kept, shift=2)
