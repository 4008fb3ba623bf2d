from sft_kernels.integrations import head_counts

from .harness import assert_small_diff, assert_trains_as_stock


def test_it_trains_as_stock():
    assert_small_diff("bare_loop")
    model = assert_trains_as_stock("bare_loop")
    assert tuple(head_counts(model)) == (10, 10, 0)
