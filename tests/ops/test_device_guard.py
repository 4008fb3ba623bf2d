"""Kernels are launched where their tensors lie, whichever device is current."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sft_kernels
from sft_kernels.ops.softmax_grad import triton_impl
from sft_kernels.ops.softmax_grad.options import LossOptions

LAUNCHERS = [
    path
    for path in Path(sft_kernels.__file__).parent.rglob("*.py")
    if "_kernel[" in path.read_text(encoding="utf-8")
    and path.parent.name != "adamw"  # whose step enters the guard once
]


def launches(tree, guarded=False):
    """Each ``kernel[grid](…)`` of ``tree``: its line, and whether it stands under ``with on(…)``."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            inside |= any(isinstance(call.func, ast.Name) and call.func.id == "on" for call in calls)
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "").endswith("_kernel"):
            yield node.lineno, guarded
        yield from launches(node, inside)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_launch_of_the_losses_and_attention_stands_under_the_guard(path):
    found = list(launches(ast.parse(path.read_text(encoding="utf-8"))))
    assert found
    assert all(guarded for _, guarded in found), found


def test_the_losses_launch_on_the_tensors_device(monkeypatch):
    current, found = [torch.device("cuda:0")], []

    @contextlib.contextmanager
    def device(d):
        before, current[0] = current[0], torch.device(d)
        yield
        current[0] = before

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self

        def __call__(self, first, *args, **kwargs):
            found.append((self.name, first.device, current[0]))

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("_softmax_grad_kernel", "_scale_kernel"):
        monkeypatch.setattr(triton_impl, name, Recorder(name))
    with FakeTensorMode():
        x, y = torch.empty(4, 64, device="cuda:1"), torch.empty(4, dtype=torch.int64, device="cuda:1")
        triton_impl.launch(x, x, y, torch.empty(4, device="cuda:1"), None, None, LossOptions(64), False)
        triton_impl._scale(x, torch.empty((), device="cuda:1"))
    there = torch.device("cuda:1")
    assert found == [("_softmax_grad_kernel", there, there), ("_scale_kernel", there, there)]
