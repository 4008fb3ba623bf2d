"""Every call of ``examples/migration.md`` runs: ours gives what the call beside it gives."""

import inspect
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from sft_kernels import linear_cross_entropy

from ..ops import flash_signatures
from . import stand_ins
from .harness import FOLDER

PAGE = (FOLDER / "migration.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.M)[1:]}
OPTIONS, REFUSED = "Options of the losses by name", "What is refused"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def rows(text):
    """Yields the cells of each row of the tables in ``text``, without the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for i, line in enumerate(lines):
        if not any(each.startswith("| ---") for each in lines[i : i + 2]):  # the rule, the heading
            yield [cell.strip() for cell in line[1:-1].split("|")]


def calls(cell):
    return re.findall(r"`([^`]+)`", cell)


def programs():
    """Yields ``(section, their calls, our call)`` of each row that begins with two calls."""
    for section, text in SECTIONS.items():
        if section in (OPTIONS, REFUSED):
            continue
        for theirs, ours, *_ in rows(text):
            if theirs.startswith("`") and ours.startswith("`") and "(" in theirs:
                yield section, calls(theirs), *calls(ours)


ROWS = [*programs()]
BLOCKS = [(section, block) for section, text in SECTIONS.items() for block in blocks(text)]
NAMES = blocks(PAGE.partition("## ")[0])[0]


@pytest.fixture(autouse=True)
def _exactly():
    """Computes in fp64, so that a tolerance of 1e-10 tells formulas apart."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


@pytest.fixture(scope="module")
def group():
    """One rank that holds the whole head."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def names(section, theirs=False, **more):
    """Returns the names of the page, the same each time; with ``theirs`` also the library's."""
    torch.manual_seed(0)
    names = dict(more)
    exec(NAMES, names)
    if section == "torch's attention":
        exec(blocks(SECTIONS[section])[0], names)
        exec("from torch.nn.attention.flex_attention import *", names)
        exec("from torch.nn.attention.varlen import AuxRequest", names)
    if theirs:
        names |= stand_ins.OF_SECTION.get(section, {})
    torch.manual_seed(1)
    return names


def needs_torch_213(code):
    new = "F.linear_cross_entropy" in code or "torch.nn.LinearCrossEntropy" in code
    if new and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch below 2.13 has no linear_cross_entropy")


def trained(optimizer, each_step, names):
    """Returns the parameters after four steps with gradients of different size.

    ``each_step`` holds what their program calls before each step.
    """
    parameters = names["params"] + names["half"]
    rng = torch.Generator().manual_seed(2)
    for size in (3.0, 0.1, 1.0, 0.3):
        for p in parameters:
            p.grad = (size * torch.randn(p.shape, generator=rng)).to(p.dtype)
        for call in each_step:
            eval(call, names)
        optimizer.step()
    return tuple(parameters)


def found(section, program, theirs, group):
    """Returns ``(values, gradients)`` of a call; the gradients are of a random combination."""
    leaves = ("hidden", "weight", "bias", "q", "k", "v")
    these = names(section, theirs, group=group)
    if "flex_attention" in program[0]:  # on a CPU it takes no tensor that wants a gradient
        for name in "qkv":
            these[name].requires_grad_(False)
    value = eval(program[0], these)
    if hasattr(value, "step"):
        return trained(value, program[1:], these), ()
    values = value if isinstance(value, tuple) else (value,)
    rng = torch.Generator().manual_seed(2)
    upstream = [torch.randn(v.shape, generator=rng) for v in values]
    loss = sum((v * u).sum() for v, u in zip(values, upstream, strict=True) if v.requires_grad)
    if not isinstance(loss, torch.Tensor):
        return values, ()
    gradients = torch.autograd.grad(loss, [these[name] for name in leaves], allow_unused=True)
    return values, {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


@pytest.mark.parametrize(("section", "theirs", "ours"), ROWS, ids=[f"{r[0]}: {r[2]}" for r in ROWS])
def test_both_calls_of_a_row_agree(section, theirs, ours, group):
    needs_torch_213(theirs[0])
    values, gradients = found(section, theirs, True, group)
    our_values, our_gradients = found(section, [ours], False, group)
    for value, expected in zip(our_values, values, strict=True):
        rtol = 2**-10 if value.dtype == torch.float16 else 1e-10  # fp16: its last place
        torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    if gradients:
        assert gradients.keys() == our_gradients.keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(our_gradients[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("section", "code"), BLOCKS, ids=[f"{s}: {c[:40]!r}" for s, c in BLOCKS])
def test_every_block_runs(section, code):
    needs_torch_213(code)
    exec(code, names(section))


def test_no_section_is_empty():
    for section in set(SECTIONS) - {OPTIONS, REFUSED, "A whole Hugging Face model"}:
        assert sum(row[0] == section for row in ROWS) >= 3, section
    assert len(ROWS) > 50


@pytest.mark.parametrize("row", [*rows(SECTIONS[REFUSED])], ids=lambda row: calls(row[0])[0])
def test_what_is_refused(row):
    (call,), (error,) = calls(row[0]), calls(row[1])
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[error]):
        eval(call, names(REFUSED))


def test_torchs_chunked_loss_takes_rows_and_one_backward():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch below 2.13 has no linear_cross_entropy")
    these = names("torch's losses")
    options = torch.nn.LinearCrossEntropyOptions()
    with pytest.raises(RuntimeError, match="dimensionality"):
        F.linear_cross_entropy(these["hidden"], these["weight"], these["labels"], options=options)
    loss = F.linear_cross_entropy(these["x"], these["weight"], these["y"], options=options)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        loss.backward()


def test_options_have_these_names_and_defaults():
    libraries = [
        [linear_cross_entropy],
        [F.linear_cross_entropy] if hasattr(F, "linear_cross_entropy") else None,
        [stand_ins.liger_fused_linear_cross_entropy, stand_ins.LigerForCausalLMLoss],
        [stand_ins.cce_linear_cross_entropy],
        [stand_ins.unsloth_fused_ce_loss],
    ]
    for row in rows(SECTIONS[OPTIONS]):
        for cell, functions in zip(row, libraries, strict=True):
            if functions is None or not calls(cell):
                continue
            name, given, default = calls(cell)[0].partition("=")
            known = {}
            for function in reversed(functions):
                known |= inspect.signature(function).parameters
            more = stand_ins.UNSLOTH_KWARGS if functions is libraries[-1] else set()
            assert name in known.keys() | more, name
            if given:
                assert known[name].default == eval(default), name


def test_the_order_of_arguments_is_what_the_page_says():
    def order(function):
        return list(inspect.signature(function).parameters)

    two, three, four = (getattr(flash_signatures, f"flash_attn_{n}") for n in (2, 3, 4))
    assert order(two)[:7] == order(three)[:7]
    assert (order(two)[7], order(three)[7], order(four)[3]) == ("dropout_p", "seqused_q", "qv")
    assert order(stand_ins.cce_25_1_1)[3] == "ignore_index"
    assert order(stand_ins.cce_linear_cross_entropy)[3] == "bias"
    assert order(stand_ins.FusedAdam)[2] == "bias_correction"
    liger = stand_ins.LigerFusedLinearCrossEntropyLoss.forward
    assert order(liger)[1:3] == ["lin_weight", "_input"]
