"""``LinearCrossEntropyLoss.linear`` and the trainer's head: the module's own function, or a refusal."""

import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from sft_kernels import LinearCrossEntropyLoss
from sft_kernels.integrations import patch
from sft_kernels.ops.linear_cross_entropy.head import weight_and_bias
from sft_kernels.sft import model as models

D, V = 8, 11


def linear():
    return nn.Linear(D, V)


def changed(change):
    head = linear()
    change(head)
    return head


class Adapter(nn.Module):
    """A low-rank adapter with its base's weight as its own, as PEFT's layers have; at first it adds nothing."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, V, bias=False)
        nn.init.zeros_(self.up.weight)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledCall(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Renamed(nn.Linear):
    pass


class Squared(nn.Module):
    def forward(self, tensor):
        return tensor.square()


class Wrapper(torch.Tensor):
    """A tensor with rules of its own, as quantised weights are."""


def peft_lora():
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"lm_head": linear()})
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"]), model)["lm_head"]


def squared(*names):
    head = linear()
    for name in names:
        parametrize.register_parametrization(head, name, Squared())
    return head


def replaced_forward(head):
    head.forward = lambda x: 2 * F.linear(x, head.weight, head.bias)


def quantised(head):
    head.weight = nn.Parameter(torch.ones(V, D, dtype=torch.int8), requires_grad=False)


def wrapped_weight(head):
    head.weight = nn.Parameter(torch.randn(V, D).as_subclass(Wrapper))


def dynamically_quantised():
    return torch.ao.quantization.quantize_dynamic(nn.ModuleDict({"head": linear()}), {nn.Linear})["head"]


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(linear())


def old_spectral_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(linear())


def masked_in_place(head):
    mask = torch.rand(V, D) > 0.5
    head.register_forward_pre_hook(lambda module, args: module.weight.data.mul_(mask) and None)


def compiled(change=lambda compiled: None):
    head = torch.compile(linear(), backend="eager")
    change(head)
    return head


class Kept(nn.Module):
    """A module of a user's own, with a name for its layer that the compiler uses too."""

    def __init__(self):
        super().__init__()
        self._orig_mod = linear()

    def forward(self, x):
        return 2 * self._orig_mod(x)


class ScaledImplementation(nn.Linear):
    def _call_impl(self, x):
        return 2 * super()._call_impl(x)


def wrapped_bias(head):
    head.bias = nn.Parameter(torch.randn(V).as_subclass(Wrapper))


def patched():
    return patch(Model(linear())).head


COMPUTED = {
    "linear": linear,
    "without bias": lambda: nn.Linear(D, V, bias=False),
    "subclass": lambda: Renamed(D, V),
    "parametrized": lambda: squared("weight", "bias"),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()).eval(),
    "compiled": compiled,
    "compiled in place": lambda: changed(lambda head: head.compile(backend="eager")),
    "forward put back": lambda: changed(
        lambda head: setattr(head, "forward", types.MethodType(nn.Linear.forward, head))
    ),
    "patched": patched,
}
REFUSED = {
    "adapter": (lambda: Adapter(linear()), r"got a .*\.Adapter\. Call the head"),
    "peft": (peft_lora, r"got a peft\."),
    "own forward": (lambda: Scaled(D, V), "a forward of its own"),
    "own call": (lambda: ScaledCall(D, V), "a forward of its own"),
    "replaced forward": (lambda: changed(replaced_forward), "was replaced"),
    "hook": (lambda: changed(lambda h: h.register_forward_hook(lambda m, x, y: 2 * y)), "has a hook, .*lambda"),
    "pre-hook": (lambda: changed(lambda h: h.register_forward_pre_hook(lambda m, x: (2 * x[0],))), "has a hook"),
    "backward hook": (lambda: changed(lambda h: h.register_full_backward_hook(lambda m, x, y: None)), "has a hook"),
    "pruned": (lambda: prune.l1_unstructured(linear(), "weight", 0.5), "has a hook, L1Unstructured"),
    "old weight norm": (old_weight_norm, "has a hook, WeightNorm"),
    "old spectral norm": (old_spectral_norm, "has a hook, SpectralNorm"),
    "masked in place": (lambda: changed(masked_in_place), "has a hook, masked_in_place"),
    "own implementation of the call": (lambda: ScaledImplementation(D, V), "a forward of its own"),
    "replaced implementation of the call": (
        lambda: changed(lambda head: setattr(head, "_call_impl", lambda x: 2 * head.forward(x))),
        "was replaced",
    ),
    "hook on what is compiled": (
        lambda: compiled(lambda h: h.register_forward_hook(lambda m, x, y: 2 * y)),
        "this OptimizedModule has a hook, .*lambda",
    ),
    "replaced forward of what is compiled": (
        lambda: compiled(lambda head: setattr(head, "forward", lambda x: 2 * head._orig_mod(x))),
        "compiled module was replaced",
    ),
    "a name that the compiler uses": (Kept, r"got a .*\.Kept\."),
    "bias of a subclass": (lambda: changed(wrapped_bias), "plain bias, .* bias of Wrapper.* dequantise it"),
    "embedding": (lambda: nn.Embedding(V, D), "Embedding, which looks up rows"),
    "wrapper": (lambda: nn.Sequential(linear()), "Sequential"),
    "int8": (lambda: changed(quantised), "torch.int8; dequantise it"),
    "tensor subclass": (lambda: changed(wrapped_weight), "weight of Wrapper.* dequantise it"),
    "dynamically quantised": (dynamically_quantised, "quantized.dynamic"),
    "nothing": (lambda: None, "got None"),
}


class Model(nn.Module):
    """A causal LM as far as its head is concerned."""

    def __init__(self, head):
        super().__init__()
        self.head, self.config = head, self
        self.get_output_embeddings = lambda: head
        self.get_text_config = lambda: self


@pytest.mark.parametrize("name", [*COMPUTED])
def test_a_linear_head_is_computed_and_its_parameters_get_their_gradients(name):
    head, loss = COMPUTED[name](), LinearCrossEntropyLoss(D, V)
    loss.linear = head
    x, y = torch.randn(5, D), torch.randint(0, V, (5,))
    found, wanted = loss(x, y), F.cross_entropy(head(x) + 0, y)
    torch.testing.assert_close(found, wanted)
    parameters = list(head.parameters())
    assert parameters
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*REFUSED])
def test_any_other_head_is_refused(name):
    make, match = REFUSED[name]
    loss = LinearCrossEntropyLoss(D, V)
    loss.linear = make()
    with pytest.raises(TypeError, match=f"^linear: expected a .*{match}"):
        loss(torch.randn(5, D), torch.zeros(5, dtype=torch.int64))


def test_a_head_that_is_changed_between_two_calls_is_refused():
    loss, batch = LinearCrossEntropyLoss(D, V), (torch.randn(5, D), torch.zeros(5, dtype=torch.int64))
    loss(*batch)
    hook = loss.linear.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TypeError, match=r"^linear: "):
        loss(*batch)
    hook.remove()
    loss(*batch)


@pytest.mark.parametrize("kind", ["forward", "__call__", "_call_impl"])
def test_functions_that_are_replaced_for_all_modules_are_refused(kind, monkeypatch):
    loss, owner = LinearCrossEntropyLoss(D, V), nn.Linear if kind == "forward" else nn.Module
    own = getattr(owner, kind)

    def doubled(self, *args):
        out = own(self, *args)
        return 2 * out if isinstance(self, nn.Linear) else out

    monkeypatch.setattr(owner, kind, doubled)
    with pytest.raises(TypeError, match=r"^linear: expected a .* was replaced"):
        loss(torch.randn(5, D), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("name", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_on_every_module_are_refused_except_torchs_own(name):
    loss, batch = LinearCrossEntropyLoss(D, V), (torch.randn(5, D), torch.zeros(5, dtype=torch.int64))
    with FlopCounterMode(display=False) as counted:  # which follows modules by such hooks
        loss(*batch)
    assert counted.get_total_flops() == 2 * 2 * 5 * D * V  # logits and dW
    handle = getattr(nn.modules.module, f"register_module_{name}_hook")(lambda *args: None)
    try:
        with pytest.raises(TypeError, match=r"^linear: expected a .* every module has a hook, .*lambda"):
            loss.forward(*batch)
    finally:
        handle.remove()
    loss(*batch)


IN_FRONT = ["pruned", "old weight norm", "old spectral norm", "pre-hook", "masked in place"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["adapter", "own forward", "int8", "embedding", *IN_FRONT])
def test_the_trainer_refuses_such_a_head(name):
    head = REFUSED[name][0]()
    with pytest.raises(ValueError, match=r"^model: the head of Model: expected a .*(nn\.Linear|plain weight)"):
        models.head(Model(head))
    assert models.head(Model(linear()))["linear_weight"].shape == (V, D)


@pytest.mark.parametrize(("outputs", "places"), [(9, ()), (22, (11,)), (8, (11,))])
def test_a_head_with_another_number_of_classes_is_refused(outputs, places):
    loss = LinearCrossEntropyLoss(4, 8, out_features=places)
    loss.linear = nn.Linear(4, outputs, bias=False)
    with pytest.raises(ValueError, match=rf"^linear: expected \d+ outputs for num_classes=8 .* got {outputs}"):
        loss(torch.randn(3, 4), torch.zeros(3, *places, dtype=torch.int64))


def test_a_parametrized_weight_is_computed_once_a_call():
    class Counted(nn.Module):
        calls = 0

        def forward(self, tensor):
            Counted.calls += 1
            return tensor

    head = linear()
    parametrize.register_parametrization(head, "weight", Counted())
    Counted.calls = 0
    weight, bias = weight_and_bias(head, "linear")
    assert (Counted.calls, weight.shape, bias is head.bias) == (1, (V, D), True)
