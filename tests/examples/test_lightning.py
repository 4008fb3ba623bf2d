"""The two examples for Lightning, and what their docstrings say about it."""

import pytest
import torch

from sft_kernels.integrations import head_counts

from .harness import assert_small_diff, assert_trains_as_stock, load, parameters, run

lightning = pytest.importorskip("lightning", reason="the examples train with Lightning")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),  # Lightning's own, as are the next two
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*in eval mode"),
]


@pytest.mark.parametrize(
    ("name", "options", "calls"),
    [
        ("lightning_module", {}, 10),
        ("lightning_module", {"steps": 6, "accumulate_grad_batches": 2}, 12),
        ("lightning_manual", {}, 20),
    ],
    ids=str,
)
def test_it_trains_as_stock(name, options, calls):
    assert_small_diff(name)
    module = assert_trains_as_stock(name, **options)
    assert tuple(head_counts(module.network)) == (calls, calls, 0)
    assert module.optimizers().last_grad_norm > 1  # so there was something to clip


def test_micro_batches_share_one_denominator():
    whole, pieces = (run("lightning_manual", micro_batch=size) for size in (4, 2))
    reordered = run("lightning_manual", micro_batch=4, reorder=lambda indices: indices[::-1])
    whole, pieces, reordered = map(parameters, (whole, pieces, reordered))
    assert (pieces - whole).norm() <= 3 * (reordered - whole).norm()


class Gradient(lightning.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.of_the_head = module.network.lm_head.weight.grad.clone()


def test_lightning_accumulates_means_of_means():
    from small import examples, model, padded  # the harness put the folder on the path

    seen = Gradient()
    run("lightning_module", steps=1, accumulate_grad_batches=2, callbacks=[seen])

    def gradient(batch):
        network = model()
        return torch.autograd.grad(network(**batch).loss, network.lm_head.weight)[0]

    rows = examples()
    one, other = gradient(padded(rows[:4])), gradient(padded(rows[4:8]))
    torch.testing.assert_close(seen.of_the_head, (one + other) / 2)
    assert (seen.of_the_head - gradient(padded(rows[:8]))).norm() > 1e-3 * one.norm()


def test_beside_a_grad_scaler_only_our_clip_works():
    def trained(**options):
        return run("lightning_module", plugins=[MixedPrecision("16-mixed", "cpu")], **options)

    module = trained()
    assert tuple(head_counts(module.network)) == (10, 10, 0)
    exact = parameters(run("lightning_module", ours=False))
    stock, ours = (float((parameters(found) - exact).norm()) for found in (trained(ours=False), module))
    assert ours <= 2 * stock, f"off by {ours:.2e} from fp32, the stock program by {stock:.2e}"
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trained(gradient_clip_val=1.0)


def test_a_model_in_evaluation_mode_stays_stock_and_is_told():
    example = load("lightning_module")
    made = example.model
    example.model = lambda: made().eval()
    assert head_counts(example.main(steps=2).network).fused == 2  # the example calls train()

    class AsLoaded(example.FineTuning):
        def __init__(self):
            super().__init__()
            self.network.eval()

    example.FineTuning = AsLoaded
    with pytest.warns(UserWarning, match="got a gradient without having been called in training"):
        module = example.main(steps=2)
    assert head_counts(module.network).calls == 0
