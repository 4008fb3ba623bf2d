"""The error budget itself."""

import pytest
import torch

from sft_kernels._budget import check, compare

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("shape", "c"), [((), 8), ((5,), 4)])
def test_the_budget_is_the_formula(shape, c):
    ref = torch.full(shape, 3.0, dtype=torch.float64)
    eager = ref + 0.25
    found = compare(ref + 0.5, ref, eager, compute_dtype=torch.float32, output_dtype=torch.bfloat16)
    assert found.error == 0.5
    assert found.eager_error == 0.25
    assert found.allowed == pytest.approx(2 * 0.25 + c * EPS * 3 + 2**-8 * 3, rel=1e-12)


def test_what_is_just_inside_passes_and_what_is_just_outside_does_not():
    ref = torch.linspace(-1, 1, 9, dtype=torch.float64)
    allowed = compare(ref.float(), ref, ref).allowed
    inside, outside = (ref.clone() for _ in range(2))
    inside[4] += allowed * 0.999
    outside[4] += allowed * 1.001
    options = {"compute_dtype": torch.float32, "output_dtype": torch.float32}
    check("x", inside, ref, ref, **options)
    with pytest.raises(AssertionError, match=r"x: error .* at flat index 4"):
        check("x", outside, ref, ref, **options)


@pytest.mark.parametrize(
    ("x", "ref", "ok"),
    [
        (float("nan"), 1.0, False),
        (1.0, float("nan"), False),
        (float("inf"), float("-inf"), False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), True),
    ],
)
def test_nan_and_infinities_stand_where_the_reference_has_them(x, ref, ok):
    x, ref = torch.tensor([x, 2.0]), torch.tensor([ref, 2.0])
    assert compare(x, ref, ref).ok == ok
    if not ok:
        with pytest.raises(AssertionError, match=r"NaN or infinite.* 1 of 2"):
            check("x", x, ref, ref)


def test_an_overflow_of_the_plain_code_excuses_nothing():
    ref = torch.ones(3)
    assert not compare(ref + 0.1, ref, torch.tensor([1.0, float("inf"), 1.0])).ok


def test_another_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        compare(torch.ones(2), torch.ones(3), torch.ones(3))


def test_nothing_is_within_the_budget():
    assert compare(torch.ones(0), torch.ones(0), torch.ones(0)).ok
