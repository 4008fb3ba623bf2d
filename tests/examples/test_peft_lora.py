import pytest
import torch

from sft_kernels.integrations import head_counts

from .harness import assert_small_diff, assert_trains_as_stock

peft = pytest.importorskip("peft", reason="the example trains with PEFT")

THE_HEAD_ITSELF = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's own
# Twice as many calls where the adapter's two products are joined with the frozen head's.
@pytest.mark.parametrize(("options", "calls"), [({}, 20), (THE_HEAD_ITSELF, 10)], ids=["adapter", "modules_to_save"])
def test_it_trains_as_stock(options, calls, tmp_path):
    from small import examples, model, padded  # the harness put the folder on the path

    assert_small_diff("peft_lora")
    network = assert_trains_as_stock("peft_lora", **options)
    assert tuple(head_counts(network)) == (calls, 10, 0)

    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
    before = peft.get_peft_model(model(), network.peft_config["default"]).state_dict()
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert any("lm_head" in name for name in frozen)

    network.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    batch = padded(examples()[:4])
    with torch.no_grad():
        logits = network.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits)
        assert not torch.equal(model().eval()(**batch).logits, logits)
