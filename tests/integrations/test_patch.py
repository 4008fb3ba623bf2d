"""``patch(model)``: a patched model trains, evaluates, generates, copies and saves as it does unpatched."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sft_kernels.integrations import head_counts, patch, unpatch
from sft_kernels.integrations.lazy import LazyLogits

from .models import (
    BATCH,
    IDS,
    LABELS,
    V,
    assert_alike,
    llama,
    of_the_model,
    outside,
    same_training,
    train,
    transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# ---- the loss, in the model and outside


SPELLINGS = {
    "in the model": of_the_model,
    "outside": outside,
    "as a tuple": lambda m: m(**BATCH, return_dict=False)[0],
    "divided by num_items": lambda m: m(**BATCH, num_items_in_batch=torch.tensor(20)).loss,
    "labels already shifted": lambda m: m(**BATCH, shift_labels=LABELS.roll(-1, 1)).loss,
    "a few logits kept": lambda m: m(input_ids=IDS, labels=LABELS[:, 4:], logits_to_keep=5).loss,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_loss(name):
    same_training(llama(), SPELLINGS[name], expect=(3, 3, 0))


def test_a_loss_that_needs_real_logits():
    same_training(llama(), lambda m: m(input_ids=IDS).logits.softmax(-1).square().sum(), expect=(3, 0, 3))


def test_direct_preferences():
    """Two forwards of the policy a step; the reference is a copy of it in evaluation, without gradients."""

    def preference(reference):
        def logprob(model, ids):
            logits = model(input_ids=ids).logits[:, :-1]
            return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))

        def loss(model):
            chosen, rejected = IDS, IDS.flip(0, 1)
            with torch.no_grad():
                margin = logprob(reference, chosen) - logprob(reference, rejected)
            return -F.logsigmoid(0.1 * (logprob(model, chosen) - logprob(model, rejected) - margin)).mean()

        return loss

    model, stock = patch(llama()), llama()
    reference = copy.deepcopy(model).eval()
    assert_alike(train(model, preference(reference)), train(stock, preference(llama().eval())))
    assert head_counts(model) == (6, 6, 0)
    assert head_counts(reference) == (0, 0, 0)


@pytest.mark.parametrize("both", [False, True])
def test_a_student_and_its_teacher(both):
    def loss(teacher):
        def loss(model):
            output = model(**BATCH)
            with torch.no_grad():
                goal = F.log_softmax(teacher(input_ids=IDS).logits, -1)
            return output.loss + F.kl_div(
                F.log_softmax(output.logits, -1), goal, log_target=True, reduction="batchmean"
            )

        return loss

    teacher = drawn(llama())
    stock = train(llama(), loss(teacher))
    student = patch(llama())
    teacher = patch(drawn(llama())) if both else teacher
    assert_alike(train(student, loss(teacher)), stock)
    assert head_counts(student) == (3, 3, 3)


def drawn(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1)
    return model


# ---- heads


class OwnProduct(torch.nn.Linear):
    """A head that multiplies by its weight itself, and once by its weight and another bias."""

    def forward(self, input):
        other = F.linear(input.detach(), self.weight.detach(), torch.ones(self.out_features)).mean()
        return F.linear(input, self.weight, bias=self.bias) + 0 * other


@pytest.mark.parametrize("bias", [True, False])
def test_a_subclass_of_linear_that_multiplies_by_itself(bias):
    def model():
        model = llama()
        model.lm_head = OwnProduct(16, V, bias=bias)
        with torch.no_grad():
            for parameter in model.lm_head.parameters():
                parameter.fill_(0.1).add_(torch.linspace(0, 1, parameter.numel()).view_as(parameter))
        return model

    patched = patch(model())
    assert_alike(train(patched), train(model()))
    assert head_counts(patched).calls == 3


class Scaled(torch.nn.Linear):
    """Has a forward of its own around that of ``torch.nn.Linear``."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.scale = torch.nn.Parameter(torch.tensor(1.7))

    def forward(self, hidden):
        return super().forward(hidden).float() * self.scale


class Mixed(Scaled):
    """Adds something that depends on the row."""

    def forward(self, hidden):
        return super().forward(hidden) - self.scale * hidden.sum(-1, keepdim=True)


class Alone(Scaled):
    """Multiplies by something that is not its weight."""

    def forward(self, hidden):
        return F.linear(hidden, self.weight * self.scale)


def with_head(kind, **options):
    model = llama(**options)
    model.lm_head = kind(model.lm_head)
    return model


def with_bias(**options):
    model = llama(**options)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(V))
    return model


HEADS = {
    "tied": (lambda: llama(tie_word_embeddings=True), (3, 3, 0)),
    "biased": (with_bias, (3, 3, 0)),
    "tied, biased": (lambda: with_bias(tie_word_embeddings=True), (3, 3, 0)),
    "scaled": (lambda: with_head(Scaled), (3, 3, 0)),
    "tied, scaled": (lambda: with_head(Scaled, tie_word_embeddings=True), (3, 3, 0)),
    "mixed": (lambda: with_head(Mixed), (3, 0, 3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    make, expect = HEADS[name]
    model = same_training(make(), expect=expect)
    stock = type(make().lm_head)
    assert type(unpatch(model).lm_head) is stock


def test_a_head_that_multiplies_itself_is_named():
    with pytest.warns(UserWarning, match="lm_head was not called"):
        same_training(with_head(Alone), expect=(0, 0, 0))


def test_a_head_called_twice():
    class TwoTokens(torch.nn.Module):
        """Predicts the next token, and the one behind it through another layer."""

        def __init__(self):
            super().__init__()
            self.model = llama()
            self.between = torch.nn.Linear(16, 16)

        def get_output_embeddings(self):
            return self.model.lm_head

        def forward(self):
            hidden = self.model.model(IDS).last_hidden_state
            one, two = self.model.lm_head(hidden), self.model.lm_head(self.between(hidden))
            return F.cross_entropy(one[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) + 0.3 * F.cross_entropy(
                two[:, :-2].flatten(0, 1), IDS[:, 2:].flatten()
            )

    same_training(TwoTokens(), lambda m: m(), expect=(6, 6, 0))


def test_a_wrapper_around_a_language_model():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=llama().config, image_token_index=V - 1)
    pixels = torch.randn(2, 3, 8, 8)
    ids = IDS.where(IDS != V - 1, 0)
    ids[:, :4] = V - 1  # one for each patch
    model = transformers.LlavaForConditionalGeneration(config).train()
    same_training(model, lambda m: m(input_ids=ids, pixel_values=pixels, labels=LABELS).loss, expect=(3, 3, 0))


class Quantised(torch.nn.Linear):
    """As quantising libraries have them."""


class Packed(torch.nn.Parameter):
    """A parameter that stands for another matrix."""


def quantised(weight):
    def make(model):
        model.lm_head = Quantised(16, V, bias=False)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)

    return make


def packed(model):
    model.lm_head.weight = Packed(model.lm_head.weight.detach())


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


REFUSED = {
    "uint8": (quantised(torch.zeros(V, 16, dtype=torch.uint8)), "lm_head is a Quantised with a weight of .*uint8"),
    "four bits": (quantised(torch.zeros(V * 8, 1, dtype=torch.uint8)), "lm_head is a Quantised .*dequantise it"),
    "float8": (quantised(torch.zeros(V, 16).to(torch.float8_e4m3fn)), "lm_head is a Quantised .*float8"),
    "a parameter of its own": (packed, "lm_head is a Linear with a weight of Packed"),
    "torch.ao": (dynamic, r"torch\.ao\.nn\.quantized\.dynamic.*not a torch.nn.Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_quantised_head_is_refused_by_name(name):
    make, message = REFUSED[name]
    model = llama()
    make(model)
    kind = type(model.lm_head)
    with pytest.raises(TypeError, match=message):
        patch(model)
    assert type(model.lm_head) is kind


def test_no_head():
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        patch(llama().model)
    with pytest.raises(ValueError, match="Linear has no get_output_embeddings"):
        patch(torch.nn.Linear(2, 2))


def test_a_model_on_the_meta_device_is_patched_before_it_is_loaded():
    with torch.device("meta"):
        model = llama()
    patch(model)
    assert model(input_ids=IDS.to("meta")).logits.is_meta
    weights = llama().state_dict()
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    model.model.rotary_emb = llama().model.rotary_emb
    assert_alike(train(model), train(llama()))
    assert head_counts(model).fused == 3


# ---- training, evaluation, generation, copies


def test_evaluation_is_stock():
    stock, model = llama(), patch(llama())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            a, b = stock.eval()(**BATCH), model.eval()(**BATCH)
        assert type(b.logits) is torch.Tensor
        assert torch.equal(a.logits, b.logits)
        assert torch.equal(a.loss, b.loss)
    with torch.no_grad():
        assert type(model.train()(**BATCH).logits) is torch.Tensor
    assert head_counts(model) == (0, 0, 0)


def test_generation_after_training():
    stock, model = llama(), patch(llama())
    train(stock), train(model)
    for training in (False, True):
        texts = [
            m.train(training).generate(IDS[:1, :3], max_new_tokens=5, do_sample=False, pad_token_id=0)
            for m in (stock, model)
        ]
        assert torch.equal(*texts)


def test_saved_as_the_model_that_it_is(tmp_path):
    stock, model = llama(), patch(llama())
    train(stock), train(model)
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert type(loaded.lm_head) is torch.nn.Linear
    torch.testing.assert_close(loaded.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-5)
    assert loaded.config.architectures == ["LlamaForCausalLM"]


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_too(copied):
    model = patch(llama())
    twin = copied(model)
    assert_alike(train(twin), train(llama()))
    assert head_counts(twin) == (3, 3, 0)
    assert head_counts(model) == (0, 0, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_output_is_real(copied):
    output = patch(llama())(**BATCH)
    assert type(output.logits) is LazyLogits
    found = copied(type(output)(logits=output.logits))
    assert type(found.logits) is torch.Tensor
    torch.testing.assert_close(found.logits, llama()(**BATCH).logits.detach())


def test_twice_and_undone():
    model = patch(patch(llama()))
    assert len(model._forward_hooks) == 1
    assert_alike(train(model), train(llama()))
    assert head_counts(model) == (3, 3, 0)
    unpatch(unpatch(model))
    assert type(model.lm_head) is torch.nn.Linear
    assert not model._forward_hooks
    assert not model.lm_head.weight._post_accumulate_grad_hooks
    assert vars(model).keys() == vars(llama()).keys()
    assert type(model(**BATCH).logits) is torch.Tensor


def test_nothing_keeps_a_step_alive():
    model = patch(llama())
    output = model(**BATCH)
    output.logits.argmax(-1)
    output.loss.backward()
    source = weakref.ref(output.logits.source.head)
    gc.disable()
    try:
        del output
        assert source() is None
    finally:
        gc.enable()


# ---- activation checkpointing


def entropy(logits):
    logprob = F.log_softmax(logits, -1)
    return -(logprob.exp() * logprob).sum(-1).mean()


def loss_and_accuracy(logits):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == IDS).float().mean() + entropy(logits)
    return loss * (1 + accuracy)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("function", [entropy, loss_and_accuracy])
def test_within_a_checkpoint(function, reentrant):
    def of_logits(model):
        return checkpoint(function, model(input_ids=IDS).logits, use_reentrant=reentrant)

    def of_head(model):
        hidden = model.model(IDS).last_hidden_state
        return checkpoint(lambda x: function(model.lm_head(x)), hidden, use_reentrant=reentrant)

    def around(model):
        logits = model(input_ids=IDS).logits
        return entropy(logits) + checkpoint(function, logits, use_reentrant=reentrant) + entropy(logits)

    for loss in (of_logits, of_head, around):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "patch:")
            same_training(llama(), loss)


# ---- a trainer that reads past the head


def past_the_head(model):
    logits = F.linear(model.model(IDS).last_hidden_state, model.lm_head.weight)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=str)
def test_a_body_trained_past_the_head_is_told_once(options):
    model = patch(llama(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()(**BATCH)
        assert_alike(train(model.train(), past_the_head), train(llama(**options), past_the_head))
        model.eval()(**BATCH)
        train(model.train(), past_the_head)
    told = [str(w.message) for w in caught if "patch:" in str(w.message)]
    assert len(told) == 1
    assert "LlamaForCausalLM.lm_head got a gradient without having been called in training" in told[0]


def test_a_replaced_head_is_told():
    model = patch(llama())
    model.lm_head = torch.nn.Linear(16, V, bias=False)
    with pytest.warns(UserWarning, match="patched head, which is gone"):
        train(model)


def evaluated_between(model):
    model.eval()
    model(**BATCH)
    model.train()
    with torch.no_grad():
        model(**BATCH)
    model.generate(IDS[:1, :3], max_new_tokens=2, pad_token_id=0)
    return of_the_model(model)


def whole_model_checkpointed(model):
    anchor = torch.zeros(1, requires_grad=True)  # without one there is no gradient
    return checkpoint(lambda ids, anchor: outside(model) + anchor.sum(), IDS, anchor, use_reentrant=True)


def gradient_checkpointing(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return of_the_model(model)


def two_backwards(model):
    loss = of_the_model(model)
    loss.backward(retain_graph=True)
    return loss


@pytest.mark.parametrize(
    "loss", [evaluated_between, whole_model_checkpointed, gradient_checkpointing, two_backwards, outside]
)
def test_no_warning_without_a_cause(loss):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "patch:")
        train(patch(llama()), loss)
