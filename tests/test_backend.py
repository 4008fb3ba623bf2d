"""Which implementation an op gets, and the words in which another is refused."""

import pytest
import torch

from sft_kernels import AdamW, _backend, _csrc, cross_entropy, packed_attention

OPS = ["softmax_grad", "adamw", "packed_attention"]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv("SFT_KERNELS_IMPL", raising=False)
    monkeypatch.delenv("SFT_KERNELS_CHECK", raising=False)


@pytest.mark.parametrize("op", OPS)
def test_auto_and_torch_run_everywhere(op):
    assert callable(_backend.resolve(op))
    assert _backend.resolve(op, "auto") is _backend.resolve(op, "torch")


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_name_raises_with_the_names_there_are(op):
    with pytest.raises(ValueError, match=r"impl: expected one of .*'auto'.*'torch'.*got 'fast'"):
        _backend.resolve(op, "fast")


@pytest.mark.parametrize("op", OPS)
def test_an_implementation_that_cannot_run_raises_with_the_reason(op, monkeypatch):
    monkeypatch.setitem(_backend._IMPLEMENTATIONS, op, {"torch": _backend._IMPLEMENTATIONS[op]["torch"]})
    with pytest.raises(RuntimeError, match=f"impl='cuda': {op} .*torch"):
        _backend.resolve(op, "cuda")


@pytest.mark.parametrize(("value", "error"), [("fast", ValueError), ("cuda", RuntimeError)])
def test_the_variable_is_the_default_and_is_blamed(value, error, monkeypatch):
    monkeypatch.setenv("SFT_KERNELS_IMPL", value)
    for op in OPS:
        monkeypatch.setitem(_backend._IMPLEMENTATIONS, op, {"torch": _backend._IMPLEMENTATIONS[op]["torch"]})
        with pytest.raises(error, match="SFT_KERNELS_IMPL"):
            _backend.resolve(op)
        assert callable(_backend.resolve(op, "torch"))  # a named implementation goes before the variable


def test_the_variable_reaches_every_public_op(monkeypatch):
    monkeypatch.setenv("SFT_KERNELS_IMPL", "fast")
    x = torch.randn(2, 1, 4)
    for call in (
        lambda: cross_entropy(x[:, 0], torch.tensor([0, 1])),
        lambda: packed_attention(x, x, x, torch.tensor([0, 2])),
        lambda: AdamW([torch.nn.Parameter(x)]),
    ):
        with pytest.raises(ValueError, match="SFT_KERNELS_IMPL"):
            call()


def test_device_data_is_read_for_checks_only_where_that_costs_nothing_or_is_asked_for(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert _backend.checks_enabled(cpu)
    assert not _backend.checks_enabled(gpu)
    monkeypatch.setenv("SFT_KERNELS_CHECK", "1")
    assert _backend.checks_enabled(gpu)


@pytest.mark.parametrize("op", OPS)
def test_auto_never_means_cuda(op, monkeypatch):
    """No results file shows it ahead."""
    monkeypatch.setattr(_backend, "_why_no_cuda", lambda device: None)
    for device in ("cpu", "cuda"):
        assert "cuda" not in _backend.resolve(op, "auto", torch.device(device)).__module__


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"z_loss": 0.1}, "the CUDA kernels have no z_loss; Triton's have"),
        ({"logit_scale": 2.0, "z_loss": 0.1}, "have no logit_scale and no z_loss"),
        ({"weight": torch.ones(4), "label_smoothing": 0.1}, "torch's own code"),
        ({}, "needs a CUDA device, got cpu"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_the_cuda_kernels_cannot_do_is_named(options, reason):
    with pytest.raises(_backend.Unavailable, match=f"impl='cuda': .*{reason}"):
        cross_entropy(torch.randn(2, 4), torch.tensor([0, 1]), impl="cuda", **options)
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(3))], impl="cuda")  # whose parameters may yet be moved
    with pytest.raises(_backend.Unavailable, match="impl='cuda': needs a CUDA device, got cpu"):
        optimizer.step()


@pytest.fixture
def loaded(monkeypatch):
    """The compiled library as on first use."""
    monkeypatch.setattr(_csrc, "_load", _csrc._load.__wrapped__)
    return _csrc._load


def test_a_library_that_is_not_built_says_how(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr(_csrc, "__file__", str(tmp_path / "_csrc.py"))
    assert "make cuda" in _csrc.why_not.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize(("cuda", "reason"), [(None, "is built without CUDA"), ("13.0", "_C.abi3.so does not load")])
def test_a_library_that_does_not_load_says_why(cuda, reason, loaded, monkeypatch, tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    monkeypatch.setattr(_csrc, "__file__", str(tmp_path / "_csrc.py"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert reason in _csrc.why_not.__wrapped__(torch.device("cuda"))
