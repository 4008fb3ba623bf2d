"""Numbers that answers are judged by: exact match, or any function of the user's."""

import importlib
import inspect
import keyword
import math
import sys
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

from .._terminal import reason_of
from .endings import is_failure

_FORMS = "exact_match, package.module.function or package.module:function"


class Metric(NamedTuple):
    """A function of prompts, answers and references that returns a number; larger is better."""

    name: str
    function: Any


def exact_match(prompts, answers, references):
    """Returns the share of answers that equal their reference but for white space around them.

    None stands for an answer that did not stop; it equals no reference.
    """
    hits = sum(
        answer is not None and answer.strip() == reference.strip()
        for answer, reference in zip(answers, references, strict=True)
    )
    return hits / len(references)


EXACT_MATCH = Metric("exact_match", exact_match)


def load_metric(name):
    """Returns the :class:`Metric` of a name.

    ``"exact_match"`` is the one here. Every other name is that of a Python function, as
    ``package.module.function`` or ``package.module:function``. It is called with three lists of
    strings, prompts, answers and references, and returns a number. Modules of the working directory
    are found, as under ``python -m``. Raises ``ValueError`` if there is no such function.
    """
    if name == EXACT_MATCH.name:
        return EXACT_MATCH
    module_name, attribute = _parts(name)
    module = _module(module_name)
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"metric: the module {module_name} has no {attribute!r}") from error
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"metric: {name} is no function, it is of the type {kind}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some of those that are written in C tell nothing
        return Metric(name, function)
    try:
        signature.bind("prompts", "answers", "references")
    except TypeError as error:
        takes = f"it takes {signature}"
        expected = "a function of three lists: prompts, answers, references"
        raise ValueError(f"metric: {name} is not {expected}; {takes}") from error
    return Metric(name, function)


def score(metric, answers):
    """Returns what ``metric`` says of some :class:`~.answers.Answers`, as a float.

    A user's function is given every answer, also one that ran into the limit. For
    :func:`exact_match` such an answer is wrong, whatever its text. Raises ``ValueError`` if there
    is no answer, if the function raises, or if it returns something else than a finite number.
    """
    if not answers.texts:
        raise ValueError(f"metric: there is no answer that {metric.name} could judge")
    texts = answers.texts
    if metric.function is exact_match:
        pairs = zip(texts, answers.stopped, strict=True)
        texts = [text if stopped else None for text, stopped in pairs]
    try:
        # Lists of its own, which it may sort or change.
        lists = list(answers.prompts), list(texts), list(answers.references)
        with _working_directory_importable():
            value = metric.function(*lists)
        if getattr(value, "ndim", None) == 0:  # a scalar of NumPy, a tensor
            value = value.item()
    except BaseException as error:
        if not is_failure(error) and not isinstance(error, SystemExit):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ValueError(f"metric: {metric.name} raised {reason}") from error
    return _finite(value, metric.name)


def _finite(value, name):
    if not isinstance(value, Real) or isinstance(value, bool):
        kind = type(value).__name__
        raise ValueError(f"metric: {name} returned a value of the type {kind}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"metric: {name} returned {number}, expected a finite number")
    return number


def _parts(name):
    """Returns ``(module, function)`` of a dotted name."""
    text = name if isinstance(name, str) else ""
    module, _, function = text.partition(":") if ":" in text else text.rpartition(".")
    words = [*module.split("."), function]
    if not all(word.isidentifier() and not keyword.iskeyword(word) for word in words):
        raise ValueError(f"metric: expected {_FORMS}, got {name!r}")
    return module, function


def _module(name):
    try:
        with _working_directory_importable():
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ValueError(f"metric: there is no module {missing}") from error
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ValueError(f"metric: the module {name} raised {reason}") from error


@contextmanager
def _working_directory_importable():
    before = list(sys.path)
    sys.path.insert(0, "")
    importlib.invalidate_caches()  # a module may be newer than what is known of its folder
    try:
        yield
    finally:
        sys.path[:] = before
