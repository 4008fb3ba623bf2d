"""The simulated schedule: its own arithmetic, and the bounds that the tiles' order must keep."""

import pytest

from bench import attention_schedule as simulation
from bench.bench_packed_attention import lengths_of

HEADS = [(32, 8), (8, 2)]


@pytest.mark.parametrize(
    ("costs", "sms", "makespan"),
    [([3.0], 2, 3.0), ([1.0, 1.0, 3.0], 2, 4.0), ([3.0, 1.0, 1.0], 2, 3.0), ([2.0] * 5, 2, 6.0)],
)
def test_programs_go_in_order_to_the_first_sm_that_is_free(costs, sms, makespan):
    found = simulation.schedule(costs, sms)
    assert found.makespan == makespan
    assert found.ideal == sum(costs) / sms


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("layout", ["mix", 512, 2048, 8192])
def test_there_are_as_many_programs_with_work_as_tiles(layout, heads):
    lengths, (Hq, Hkv) = lengths_of(layout, 16 << 10), heads
    tiles = sum(-(-l // 128) for l in lengths)
    costs = simulation.ours("forward", lengths, Hq, Hkv, 9)
    assert sum(cost > simulation.NOTHING for cost in costs) == tiles * Hq
    assert len(costs) == ((16 << 10) // 128 + len(lengths) + 1) * Hq
    theirs = simulation.flash_attention_2("forward", lengths, Hq)
    assert len(theirs) == -(-max(lengths) // 128) * len(lengths) * Hq


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("gpu", simulation.SMS)
@pytest.mark.parametrize("T", [16, 32, 64])
def test_from_16_k_tokens_on_nothing_outlasts_the_ideal_by_more_than_a_fourteenth(T, gpu, heads):
    """But for few heads over segments of equal length: 512 equal programs do not divide by 132."""
    sms, capability = simulation.SMS[gpu]
    for layout, seed in [*(("mix", seed) for seed in range(3)), (512, 0), (2048, 0), (8192, 0)]:
        lengths = lengths_of(layout, T << 10, seed)
        for kernel in simulation.KERNELS:
            found = simulation.schedule(simulation.ours(kernel, lengths, *heads, capability), sms)
            bound = 1.09 if layout != "mix" and heads == (8, 2) else 1.07
            assert found.makespan <= bound * found.ideal, (layout, seed, kernel, found)


def test_the_order_is_what_keeps_the_bound():
    """The same programs with the least work first."""
    costs = simulation.ours("forward", lengths_of("mix", 16 << 10), 8, 2, 9)
    assert simulation.schedule(costs, 132).over_ideal <= 1.07
    assert simulation.schedule(sorted(costs), 132).over_ideal > 1.15


def test_fewer_key_heads_than_four_need_half_tiles():
    """What ``config_of`` does for them: with whole tiles one program would outlast all others."""
    lengths, config = lengths_of("mix", 16 << 10), simulation.config_of("dkey", 9, simulation.D, 2)
    assert config.rows == 64
    whole = simulation.config_of("dkey", 9, simulation.D, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "config_of", lambda *arguments: whole)
        assert simulation.schedule(simulation.ours("dkey", lengths, 8, 2, 9), 132).over_ideal > 1.5


def test_the_command_prints_a_row_for_each_kernel_and_draws(capsys, tmp_path):
    assert simulation.main(["--plot", str(tmp_path / "schedule.png")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 2 * 7 * len(simulation.SMS) * 5
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
