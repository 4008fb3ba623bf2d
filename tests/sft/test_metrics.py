"""Metrics: exact match, and functions of the user's, which are found by name and whose numbers are checked."""

import builtins
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from sft_kernels.sft.answers import Answers
from sft_kernels.sft.metrics import EXACT_MATCH, Metric, exact_match, load_metric, score

ANSWERS = Answers(["a?", "b?", "c?"], ["red", " blue\n", "green"], ["red", "blue", "tan"], [True, True, False])


def test_exact_match():
    assert load_metric("exact_match") is EXACT_MATCH
    assert exact_match([""] * 4, ["red", " blue\n", "", "Red"], ["red ", "blue", " ", "red"]) == 0.75
    assert score(EXACT_MATCH, ANSWERS) == 2 / 3
    assert score(EXACT_MATCH, ANSWERS._replace(stopped=[True, False, True])) == 1 / 3
    assert exact_match(*ANSWERS[:3]) == 2 / 3
    with pytest.raises(ValueError, match=r"shorter|longer"):
        exact_match([], ["red"], ["red", "blue"])
    with pytest.raises(ValueError, match=r"^metric: there is no answer that exact_match could judge"):
        score(EXACT_MATCH, Answers([], [], [], []))


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A package in the working directory."""

    def write(name, text):
        folder = tmp_path / "judges_of_test"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    write(
        "words.py",
        "import sys\n"
        "sys.path.append('of the module')\n"
        "limit = 3\n"
        "def count(prompts, answers, references):\n    return sum(map(len, answers)) / len(references)\n"
        "def two(prompts, answers):\n    return 0\n"
        "def four(prompts, answers, references, more):\n    return 0\n"
        "def by_name(*, prompts, answers, references):\n    return 0\n"
        "def spare(prompts, answers, references, weight=2.0, **more):\n    return weight\n"
        "def late(prompts, answers, references):\n    from judges_of_test import limits\n    return limits.most\n"
        "def sorts(prompts, answers, references):\n    answers.sort(), prompts.clear(), references.clear()\n"
        "    return 1\n",
    )
    write("limits.py", "most = 7\n")
    write("broken.py", "raise RuntimeError('no model\\nthere')\n")
    write("exits.py", "raise SystemExit(2)\n")
    write("needs.py", "import package_that_nobody_has\n")
    write("interrupted.py", "raise KeyboardInterrupt\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("judges_of_test")]:
        del sys.modules[name]


def test_a_function_of_the_working_directory(judges):
    before = list(sys.path)
    for name in ("judges_of_test.words.count", "judges_of_test.words:count"):
        metric = load_metric(name)
        assert metric.name == name
        assert score(metric, ANSWERS) == (3 + 6 + 5) / 3
    assert sys.path == before
    assert score(load_metric("judges_of_test.words.spare"), ANSWERS) == 2.0
    assert load_metric("builtins.max").function is builtins.max  # tells no signature


def test_a_function_that_imports_when_it_is_called(judges):
    metric, before = load_metric("judges_of_test.words.late"), list(sys.path)
    del sys.modules["judges_of_test"]  # as if nothing of the working directory were known
    assert score(metric, ANSWERS) == 7.0
    assert sys.path == before


def test_a_function_cannot_change_the_answers(judges):
    before = [list(part) for part in ANSWERS]
    assert score(load_metric("judges_of_test.words.sorts"), ANSWERS) == 1
    assert [list(part) for part in ANSWERS] == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing_of_that_name.f", "there is no module nothing_of_that_name"),
        ("nothing_of_that_name.words:f", "there is no module nothing_of_that_name"),
        ("judges_of_test.nothing.f", "there is no module judges_of_test.nothing"),
        ("judges_of_test.words.Judge.f", "there is no module judges_of_test.words.Judge"),
        ("judges_of_test.broken.f", "the module judges_of_test.broken raised RuntimeError: no model there"),
        ("judges_of_test.exits.f", "the module judges_of_test.exits raised SystemExit: 2"),
        (
            "judges_of_test.needs.f",
            "the module judges_of_test.needs raised ModuleNotFoundError: No module named 'package_that_nobody_has'",
        ),
        ("judges_of_test.words.nothing", "the module judges_of_test.words has no 'nothing'"),
        ("judges_of_test.words.limit", "judges_of_test.words.limit is no function, it is of the type int"),
        *(
            (
                f"judges_of_test.words:{function}",
                f"judges_of_test.words:{function} is not a function of three lists: prompts, answers, references; "
                f"it takes {takes}",
            )
            for function, takes in [
                ("two", "(prompts, answers)"),
                ("four", "(prompts, answers, references, more)"),
                ("by_name", "(*, prompts, answers, references)"),
            ]
        ),
        *(
            (name, f"expected exact_match, package.module.function or package.module:function, got {name!r}")
            for name in ["", "f1", "exact-match.f", ".f", "a..f", "a.", ":f", "a:", "a:b:c", "a:b.c", "a b.f",
                         "/tmp/f.py", "a.b\n.f", "a.class", "class.f", "a.1", None, 3]
        ),
    ],
)  # fmt: skip
def test_a_name_that_leads_to_no_metric_is_refused_in_one_line(name, message, judges):
    before = list(sys.path)
    with pytest.raises(ValueError, match=r"^metric: ") as caught:
        load_metric(name)
    assert str(caught.value) == f"metric: {message}"
    assert sys.path == before


def test_an_interrupt_passes(judges):
    before = list(sys.path)
    with pytest.raises(KeyboardInterrupt):
        load_metric("judges_of_test.interrupted.f")
    assert sys.path == before

    def interrupt(*lists):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Metric("a.f", interrupt), ANSWERS)


def test_a_panic_of_a_tokenizer_is_a_failure():
    """It is no ``Exception``, and would end a run without saving anything."""

    class PanicException(BaseException):
        pass

    def panic(*lists):
        raise PanicException("index out of bounds")

    with pytest.raises(ValueError, match=r"^metric: a\.f raised PanicException: index out of bounds$"):
        score(Metric("a.f", panic), ANSWERS)


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert load_metric("operator.setitem").name == "operator.setitem"
    with pytest.raises(ValueError, match=r"^metric: there is no module nothing_of_that_name$"):
        load_metric("nothing_of_that_name.f")


@pytest.mark.parametrize(
    "value",
    [1, 0.5, -2, Fraction(1, 2), np.float32(0.25), np.int64(3), np.array(0.5), torch.tensor(0.5), torch.tensor(2),
     torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True)],
    ids=str,
)  # fmt: skip
def test_a_number(value):
    found = score(Metric("a.f", lambda *lists: value), ANSWERS)
    assert type(found) is float
    assert found == (value.item() if isinstance(value, torch.Tensor) else float(value))


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "NoneType"), (True, "bool"), ("1", "str"), (1j, "complex"), ([0.5], "list"), (np.bool_(True), "bool"),
     (torch.tensor(True), "bool"), (torch.tensor([0.5]), "Tensor"), (np.array([1.0]), "ndarray"),
     (float("nan"), "nan"), (np.float32("inf"), "inf"), (torch.tensor(-torch.inf), "-inf"), (10**400, "inf")],
    ids=[f"{i}" for i in range(13)],
)  # fmt: skip
def test_anything_else_is_refused(value, said):
    kind = f"a value of the type {said}, expected a number"
    expected = kind if said[-3:] not in ("nan", "inf") else f"{said}, expected a finite number"
    with pytest.raises(ValueError, match=r"^metric: ") as caught:
        score(Metric("a.f", lambda *lists: value), ANSWERS)
    assert str(caught.value) == f"metric: a.f returned {expected}"


@pytest.mark.parametrize(
    ("error", "said"),
    [(ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero"), (SystemExit(1), "SystemExit: 1"),
     (AssertionError(), "AssertionError: AssertionError"), (OSError(2, "No such file"), "OSError: No such file")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_an_error_of_the_function_is_named(error, said):
    def judge(*lists):
        raise error

    said = said.replace("OSError", type(error).__name__) if isinstance(error, OSError) else said
    with pytest.raises(ValueError, match=r"^metric: ") as caught:
        score(Metric("a.f", judge), ANSWERS)
    assert str(caught.value) == f"metric: a.f raised {said}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        ("Two words.", 1),
        ("  Two words.\n", 1),
        ("Two words. And more", 0),
        ("So: Two words.", 0),
        ("two words.", 0),
        ("", 0),
    ],
)
def test_exact_match_is_the_whole_answer_but_for_white_space_around(answer, hit):
    assert exact_match(["How many?"], [answer], ["Two words. "]) == hit
