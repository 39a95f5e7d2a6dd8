"""shrinkage.shrink at its edges: zeros, dead groups, NaN and infinity, 16-bit dtypes."""

import pytest
import torch
from helpers.right import SPECS
from helpers.shrinkage import EPS, normal

from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.shrinkage import Thresholds, shrink

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_without_coefficients_every_bit_of_z_stays(prox_mode):
    """a = b = c = 0 returns z's bits, -0.0 and NaN included; so does a bias without l1."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        z = normal(6, 5).to(dtype)
        z[0] = torch.tensor([-0.0, 0.0, NAN, INF, -INF])
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        got = shrink(z, Thresholds(0.0, 0.0, 0.0), prox_mode=prox_mode)
        assert torch.equal(got.view(bits), z.view(bits))
        bias = z[0]  # a named spec makes no groups of one dimension, so only l1 would apply
        assert torch.equal(
            shrink(bias, Thresholds(1.0, 1.0, 0.0), prox_mode=prox_mode).view(bits), bias.view(bits)
        )


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_zeros_are_exact_and_positive(group_by, prox_mode):
    """Coefficients that are far too large give exactly +0.0 everywhere."""
    for thresholds in ((1e9, 0, 0), (1e9, 0.1, 0), (1e9, 0.1, 0.1), (0, 0, 1e9), (0, 1e-3, 9)):
        got = shrink(normal(5, 4, 3), Thresholds(*thresholds), group_by, prox_mode=prox_mode)
        assert not got.any() and not torch.signbit(got).any()


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_zero_groups_stay_zero(prox_mode):
    """A zero group stays +0.0 under each penalty; 0/0 in its scale would give NaN."""
    for thresholds in ((0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3), (0.3, 0.3, 0.3)):
        z = normal(6, 5)
        z[:, 2], z[::2, 2] = 0.0, -0.0
        got = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
        assert not got[:, 2].any() and not torch.signbit(got[got == 0]).any()
        assert got.isfinite().all() and got.any()


def test_a_group_whose_norm_is_exactly_a_dies():
    """The comparison is n <= a: at equality the group is 0, a rounding below it is not."""
    z = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    for mode in PROX_MODES:
        assert not shrink(z, Thresholds(5.0, 0.1, 0.0), prox_mode=mode).any()
        assert shrink(z, Thresholds(5.0 * (1 - EPS), 0.0, 0.0), prox_mode=mode).all()


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize(
    ("thresholds", "of_group"),
    [((1, 0, 0), NAN), ((0, 0.1, 0), NAN), ((1, 0.1, 0.1), NAN), ((0, 0, 0.1), None)],
)
def test_nan_takes_its_group_and_nothing_else(prox_mode, thresholds, of_group):
    """A NaN spreads over its group if a norm is taken, and stays alone under l1."""
    z = normal(6, 5)
    clean = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
    z[3, 2] = NAN
    got = shrink(z, Thresholds(*thresholds), prox_mode=prox_mode)
    clean[:, 2] = clean[:, 2] if of_group is None else of_group
    clean[3, 2] = NAN
    torch.testing.assert_close(got, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("infinity", [INF, -INF])
def test_infinity_survives_group_lasso_and_l1_and_is_nan_under_exclusive_lasso(prox_mode, infinity):
    """An infinite element stays infinite or becomes NaN, never 0, and other groups stay finite."""
    z = normal(6, 5)
    z[3, 2] = infinity
    got = shrink(z, Thresholds(0.5, 0.0, 0.1), prox_mode=prox_mode)
    assert got[3, 2] == infinity and got.isfinite().sum() == 29
    # the norm is infinite, so s = 1
    assert torch.equal(got[:3, 2], shrink(z[:3, 2], Thresholds(0.0, 0.0, 0.1)))
    got = shrink(z, Thresholds(0.0, 0.1, 0.0), prox_mode=prox_mode)
    assert got[3, 2].isnan() and got.isfinite().sum() == 29
    assert got[:, 2].nan_to_num().eq(0).all()  # the rest of the group is soft(z, inf) = 0


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_16_bit_types_compute_in_float32(group_by, prox_mode):
    """The result is the float32 result, rounded once; sums of squares do not overflow."""
    for dtype in (torch.float16, torch.bfloat16):
        z = (100 * normal(40, 30)).to(dtype)  # in float16, sums of squares overflow
        thresholds = Thresholds(60.0, 1e-3, 5.0)
        got = shrink(z, thresholds, group_by, prox_mode=prox_mode)
        expected = shrink(z.float(), thresholds, group_by, prox_mode=prox_mode)
        assert got.dtype == dtype and torch.equal(got, expected.to(dtype))
        assert got.any() and (got == 0).any()
