"""Answers that the layers of a model share, for as long as the tensor lives that they are about."""

import weakref

import torch


def once_a_forward(function):
    """``function(tensor, *rest)``, which is asked for again only where ``tensor`` is another object or was written to.

    The layers of a model are handed the same tensor. Only the last answer is kept, and no longer than its tensor lives.
    Nothing is kept or reused while a graph is traced or captured, wherever ``tensor`` lies: a replay must find its
    answer anew, in memory of its own. Nor is the answer for an inference tensor kept, which does not say whether it was
    written to.
    """
    last = None  # what was asked (the tensor as a weak reference), and the answer

    def wrapper(tensor, *rest):
        nonlocal last
        if torch.compiler.is_compiling() or tensor.is_inference() or _capturing():
            return function(tensor, *rest)
        known = last
        asked = (tensor._version, *rest)
        if known is None or known[0]() is not tensor or known[1] != asked:
            last = known = (weakref.ref(tensor, forget), asked, function(tensor, *rest))
        return known[2]

    def forget(reference):
        nonlocal last
        if last is not None and last[0] is reference:
            last = None

    return wrapper


def _capturing():
    """Returns True while the current stream is captured into a CUDA graph."""
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a torch without CUDA cannot be asked
        return False
