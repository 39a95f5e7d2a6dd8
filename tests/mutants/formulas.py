"""Breaks of the formulas that all C++ executors share, csrc/common."""

from .mutant import Mutant

SHRINKAGE = "csrc/common/shrinkage.h"
SGD = "csrc/common/sgd.h"
PHASE = "csrc/common/phase.h"

MUTANTS = (
    Mutant(
        "soft drops NaN",
        SHRINKAGE,
        old="return T(0) > x ? T(0) : x;",
        new="return x > T(0) ? x : T(0);",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "sums of a group drop NaN",
        SHRINKAGE,
        old="const bool left = !(u <= T(0));  // so that NaN counts",
        new="const bool left = u > T(0);",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "the threshold of exclusive lasso forgets lr",
        SHRINKAGE,
        old="return {lr * x.group_lasso, lr * x.exclusive_lasso, lr * x.l1};",
        new="return {lr * x.group_lasso, x.exclusive_lasso, lr * x.l1};",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "exact mode of a group of one forgets group lasso",
        SHRINKAGE,
        old="const T rise = h.b / (T(1) + h.b) * (u - h.a);",
        new="const T rise = h.b / (T(1) + h.b) * u;",
        seen_by=("test_tiny_tensors", "test_cuda_rows_bits"),
    ),
    Mutant(
        "sequential t forgets l1",
        SHRINKAGE,
        old="if (h.b != T(0)) at.t = h.c + h.b * sums.l1;",
        new="if (h.b != T(0)) at.t = h.b * sums.l1;",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "the search ends after two sweeps",
        SHRINKAGE,
        old="done = done || ++sweeps == kMaxSweeps;",
        new="done = done || ++sweeps == 2;",
        seen_by=("test_cpu_cuts",),
    ),
    Mutant(
        "sorted groups count one too few",
        SHRINKAGE,
        old="return h.b * sum / (T(1) + h.b * T(k));",
        new="return h.b * sum / (T(1) + h.b * T(k - 1));",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "zeros keep their sign",
        SHRINKAGE,
        old="return w == T(0) ? T(0) : w;",
        new="return w;",
        seen_by=("test_cpu_short_groups",),
    ),
    Mutant(
        "dampening in the first step",
        SGD,
        old="buf = phase == Phase::running ? running : g;",
        new="buf = phase == Phase::running ? running : h.one_minus_dampening * g;",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "nesterov looks ahead without weight decay",
        SGD,
        old="const T ahead = multiply_add(h.momentum, buf, g);",
        new="const T ahead = multiply_add(h.momentum, buf, signed_grad);",
        seen_by=("test_cpu_cuts", "test_cuda_rows*"),
    ),
    Mutant(
        "maximize turns weight decay around",
        SGD,
        old="decayed = multiply_add(h.weight_decay, w, signed_grad);",
        new="decayed = h.grad_sign * multiply_add(h.weight_decay, w, grad);",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "the first step keeps no buffer",
        PHASE,
        old="bool writes_state(Phase phase) { return phase >= Phase::first; }",
        new="bool writes_state(Phase phase) { return phase == Phase::running; }",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "the first step reads an empty buffer",
        PHASE,
        old="bool reads_state(Phase phase) { return phase == Phase::running; }",
        new="bool reads_state(Phase phase) { return phase >= Phase::first; }",
        seen_by=("test_cuda_rows*",),
    ),
)
