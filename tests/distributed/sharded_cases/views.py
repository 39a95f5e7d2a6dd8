"""Groups of views of a parameter, where each shard holds whole slices of the view."""

from sharded_cases.common import STRONG, R, S, case, check_steps, mesh_of, parameters, raised
from torch.distributed.tensor.placement_types import _StridedShard

from cges_kernels import ProxSGD
from cges_kernels.core.hyperparameters import PROX_MODES


@case(2)
def views():
    """Steps on heads, grouped convolutions and LSTM units are right; views that shards cut are refused."""
    mesh, zeros = mesh_of(2), 0
    for shape, view, spec, placements in (
        ((8, 6), (4, 2, 6), (1, 2), [S(0)]),  # each head on one rank
        ((8, 6), (4, 2, 6), (0,), [S(0)]),  # across the heads
        ((8, 6), (4, 2, 6), (0, 2), [S(1)]),
        ((6, 2, 3, 3), (3, 2, 2, 3, 3), (1,), [R]),
        ((5, 4, 3), (5, 12), (0,), [S(0)]),  # merged dims, uneven shards
        ((5, 4, 3), (5, 12), (1,), [S(0)]),
        ((5, 4, 3), (5, -1), (0,), [S(0)]),
        ((1, 6), (2, 3), (0,), [S(0)]),  # all on one rank
        ((4, 6), (8, 3), (0,), [S(0)]),
    ):
        for prox_mode in PROX_MODES:
            options = {**STRONG, "group_lasso": 3.0, "prox_mode": prox_mode, "group_by": spec, "view": view}
            zeros += check_steps(parameters(mesh, placements, shapes=[shape]), **options)
    assert zeros > 0
    for shape, view, placements in (
        ((6, 4), (3, 2, 4), [S(0)]),  # three slices for two ranks
        ((8, 6), (4, 12), [S(1)]),  # a shard would hold pieces of slices
        ((6, 4), (2, 12), [S(1)]),
        ((8, 6), (4, 2, 6), [_StridedShard(0, split_factor=4)]),  # a shard would hold every other row
    ):
        p = parameters(mesh, placements, shapes=[shape])[0]
        error = raised(
            ValueError, lambda p=p, view=view: ProxSGD([p], group_by=(0,), view=view, **STRONG).step()
        )
        assert "param_groups[0]['params'][0]: view=" in error and str(p.placements) in error, error


@case(4)
def views_on_two_mesh_dims():
    """The same on a mesh of two dims."""
    mesh = mesh_of(2, 2)
    strided = [_StridedShard(0, split_factor=2), S(0)]
    for view, spec, placements in (((4, 2, 6), (0,), strided), ((4, 2, 6), (0,), [S(0), S(1)])):
        options = {**STRONG, "group_lasso": 3.0, "group_by": spec, "view": view}
        assert check_steps(parameters(mesh, placements, shapes=[(8, 6)]), **options) > 0
    for placements in (strided, [S(0), S(0)]):  # two slices for four ranks
        p = parameters(mesh, placements, shapes=[(8, 6)])[0]
        raised(ValueError, ProxSGD([p], group_by=(0,), view=(2, 4, 6), **STRONG).step)
