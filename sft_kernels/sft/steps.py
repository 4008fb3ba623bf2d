"""The order of the data: which examples each optimiser step gets."""

import random

import numpy as np

from .packing import PackedRows, groups_of, lengths_of, pack


class Steps:
    """The optimiser steps of a run: each a list of micro-batches, each a list of rows, each a list of examples.

    Every epoch packs the examples anew from another order; how many rows that makes depends on the lengths alone.
    The order depends on the seed, so that a run can go on after any step.
    """

    def __init__(self, examples, recipe):
        self.examples, self.recipe = examples, recipe
        self.rows_a_step = recipe.rows * recipe.accumulate
        self.per_epoch = -(-len(pack(lengths_of(examples), recipe.row_tokens)) // self.rows_a_step)
        self.total = recipe.steps if recipe.steps is not None else max(1, round(recipe.epochs * self.per_epoch))
        self.warmup = round(recipe.warmup * self.total)

    def after(self, done):
        """Yield ``(step, micro_batches)`` of every step after the first ``done``; steps count from 1."""
        rows = None
        for step in range(done, self.total):
            epoch, within = divmod(step, self.per_epoch)
            if rows is None or not within:
                rows = self._epoch(epoch)
            first = within * self.rows_a_step
            yield step + 1, [*groups_of(self.recipe.rows, rows[first : first + self.rows_a_step])]

    def _epoch(self, epoch):
        shuffle = random.Random(f"{self.recipe.seed}/{epoch}").shuffle
        order = np.arange(len(self.examples))
        shuffle(order)
        rows = PackedRows(self.examples, self.recipe.row_tokens, order)
        shuffle(rows.rows)
        return rows
