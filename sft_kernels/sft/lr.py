"""Warm-up that starts above zero, then cosine down to a floor."""

import math


def cosine_factor(step, total, warmup, floor=0.1):
    """The factor on the peak learning rate at ``step``, 0 ≤ step < total, of optimiser steps.

    ::

        (t + 1) / W                                              t < W
        floor + (1 − floor) · ½ (1 + cos π (t − W) / (T − W))    t ≥ W
    """
    if not 0 <= warmup <= total:
        raise ValueError(f"warmup: expected 0 to {total} steps, got {warmup}")
    if step < warmup:
        return (step + 1) / warmup
    if step >= total:
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
