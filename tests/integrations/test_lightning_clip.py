"""``AdamW`` inside Lightning, whose Trainer clips within the closure that it hands to ``step``."""

import warnings

import pytest
import torch

from sft_kernels import AdamW

lightning = pytest.importorskip("lightning", reason="clips by Lightning's gradient_clip_val")


class Module(lightning.LightningModule):
    def __init__(self, max_grad_norm):
        super().__init__()
        self.layer, self.max_grad_norm = torch.nn.Linear(16, 16), max_grad_norm

    def training_step(self, batch):
        return 10 * (self.layer(batch) - 1).square().mean()

    def configure_optimizers(self):
        return AdamW(self.parameters(), max_grad_norm=self.max_grad_norm)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"), [(1.0, 1.0, 1), (1.0, None, 0), (None, 1.0, 0)], ids=["both", "ours", "Lightning's"]
)
def test_only_two_clips_are_spoken_of(tmp_path, ours, theirs, told):
    trainer = lightning.Trainer(
        default_root_dir=tmp_path, max_steps=6, gradient_clip_val=theirs, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Module(ours), torch.utils.data.DataLoader(torch.randn(48, 16), batch_size=8))
    assert len([w for w in caught if "clipped to 1.0 already" in str(w.message)]) == told
