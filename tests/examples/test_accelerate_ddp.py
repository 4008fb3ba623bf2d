"""The example on two gloo ranks, which the test starts instead of torchrun."""

import contextlib
import io
import os

import pytest
import torch
import torch.distributed as dist

from sft_kernels.integrations import head_counts

from ..ops.ranks import Ranks
from .harness import HARMLESS, assert_alike, assert_small_diff, parameters, run

pytest.importorskip("accelerate", reason="the example trains with accelerate")

from accelerate.state import AcceleratorState


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def example(**how):
    """Returns the model that the example trained, and the losses that it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        network = run("accelerate_ddp", **how)
    return network, [float(line.split()[-1]) for line in printed.getvalue().splitlines() if "masked loss" in line]


def trained(how):
    """Returns parameters, head counts and printed losses of the example on this rank."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    # As torchrun sets them; accelerate then uses the process group that is there.
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    network, losses = example(**how)
    return parameters(network), tuple(head_counts(network)) if how["ours"] else None, losses


def trained_alone():
    """Returns parameters and losses of the stock program in one process, on both ranks' batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        network, losses = example(ours=False, batch_size=8)
        return parameters(network), losses
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_it_trains_as_stock_and_as_one_process(ranks):
    assert_small_diff("accelerate_ddp")

    def both(**how):
        (first, counts, losses), (second, _, _) = ranks(trained, how)
        assert torch.equal(first, second), "the ranks end with different parameters"
        return first, counts, losses

    ours, counts, losses = both(ours=True)
    assert counts == (10, 10, 0)
    stock, *harmless = (both(ours=False, **change)[0] for change in ({}, *HARMLESS))
    assert_alike(ours, stock, harmless)
    alone, losses_alone = trained_alone()
    assert_alike(ours, alone, harmless)
    # AdamW with a clip hardly sees a constant factor of the loss: it shows here. Printed to three digits.
    assert len(losses) == 10
    assert losses == pytest.approx(losses_alone, abs=2e-3)
