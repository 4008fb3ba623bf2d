"""TRL around a patched model: its functions of logits are fused, and a trainer that reads past the head is named."""

import copy
import warnings

import pytest
import torch

from sft_kernels.integrations import head_counts, patch

from ..ops.helpers import Watch
from .models import BATCH, IDS, LABELS, V, llama, same_training, transformers

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from trl.trainer.utils import (  # noqa: E402
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

INDEX = IDS[:, 1:]


def shifted(model):
    return model(input_ids=IDS).logits[:, :-1]


FUNCTIONS = {  # and how often the fused op runs, in fp32 and in bf16
    "entropy": (lambda m: entropy_from_logits(shifted(m)), 1, 1),
    "entropy in chunks": (lambda m: entropy_from_logits(shifted(m), chunk_size=5), 1, 1),
    "log-probability": (lambda m: selective_log_softmax(shifted(m), INDEX), 1, 2),
    "temperature": (lambda m: selective_log_softmax(shifted(m), INDEX, temperature=0.7), 1, 2),
    "rows masked": (lambda m: selective_log_softmax(shifted(m), INDEX, row_mask=INDEX % 3), 1, 2),
    "both": (lambda m: torch.stack(selective_log_softmax_and_entropy(shifted(m), INDEX, temperature=0.7)), 1, 3),
    "both, entropy without gradient": (
        lambda m: torch.stack(selective_log_softmax_and_entropy(shifted(m), INDEX, entropy_requires_grad=False)),
        1,
        3,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_logits_is_fused(name, dtype):
    function, *fused = FUNCTIONS[name]
    model, half = llama().to(dtype), dtype == torch.bfloat16
    stock = function(model).detach()
    tolerance = {"rtol": 0.05, "atol": 0.03} if half else {"rtol": 1e-4, "atol": 1e-5}
    same_training(model, lambda m: function(m).float().square().mean(), 1, (1, fused[half], 0), **tolerance)
    torch.testing.assert_close(function(patch(llama().to(dtype))).detach(), stock, **tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_logits_without_gradient(name):
    function, *_ = FUNCTIONS[name]
    model = llama()
    stock = function(model).detach()
    logits = patch(model)(input_ids=IDS).logits
    with torch.no_grad():
        found = function(lambda input_ids: type("Output", (), {"logits": logits}))
    torch.testing.assert_close(found, stock)
    assert head_counts(model).materialised == 0


def metrics(logits):
    """Token accuracy and entropy, as TRL has them from logits."""
    with torch.no_grad():
        predictions, labels = logits[..., :-1, :].argmax(-1), LABELS[..., 1:]
        return predictions, (predictions == labels)[labels != -100].float().mean(), entropy_from_logits(logits)


def test_metrics_use_what_the_loss_has_computed():
    model = llama()
    stock, model = copy.deepcopy(model), patch(model)
    product = 2 * IDS.numel() * model.config.hidden_size * V
    masked = 2 * int((LABELS[:, 1:] == -100).sum()) * model.config.hidden_size * V
    last = 2 * len(IDS) * model.config.hidden_size * V  # the rows that predict nothing
    costs = []
    for _ in range(3):
        output, expected = model(**BATCH), stock(**BATCH)
        with Watch() as watch:
            found = metrics(output.logits)
        costs.append(watch.flops)
        for mine, theirs in zip(found, metrics(expected.logits), strict=True):
            torch.testing.assert_close(mine, theirs)
        for each, loss in ((model, output.loss), (stock, expected.loss)):
            loss.backward()
            for p in each.parameters():
                p.data -= 0.05 * p.grad
            each.zero_grad()
    assert costs == [product, masked + last, masked + last]


def supervised(model, folder, **options):
    """TRL's SFTTrainer as it is by default, over three steps: what it logs, and the parameters after."""
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="t1", pad_token="t2", unk_token="t0"
    )
    ids = torch.randint(0, V, (8, 10), generator=torch.Generator().manual_seed(2)).tolist()
    data = datasets.Dataset.from_list([{"input_ids": x, "labels": [-100] * 3 + x[3:]} for x in ids])
    arguments = trl.SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss", "entropy", "mean_token_accuracy")
    logs = [{name: log[name] for name in names if name in log} for log in trainer.state.log_history]
    return logs, {name: p.detach() for name, p in model.named_parameters()}


def test_the_trainer_reads_past_the_head_and_is_told(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stock = supervised(llama(), tmp_path, eval_strategy="steps", eval_steps=1)
        ours = supervised(patch(llama()), tmp_path, eval_strategy="steps", eval_steps=1)
    told = [str(w.message) for w in caught if "patch:" in str(w.message)]
    assert len(told) == 1
    assert "LlamaForCausalLM.lm_head was not called in a training forward" in told[0]
    torch.testing.assert_close(ours, stock)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_with_label_smoothing_takes_logits(tmp_path):
    stock = supervised(llama(), tmp_path, label_smoothing_factor=0.1)
    model = patch(llama())
    ours = supervised(model, tmp_path, label_smoothing_factor=0.1)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert head_counts(model).calls == 3
