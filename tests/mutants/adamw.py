"""Breaks of AdamW's update in every executor, of its states and of its count of steps."""

from .mutant import Mutant

ADAMW = "csrc/common/adamw.h"
RULES = "csrc/cuda/rule.cuh"
PLAN = "csrc/plan/step_plan.cpp"
GATHER = "csrc/plan/gather.cpp"
TRITON = "cges_kernels/backends/triton"
UPDATES = "cges_kernels/core/updates.py"
BACKENDS = "cges_kernels/backends"

MUTANTS = (
    Mutant(
        "eps is not corrected",
        ADAMW,
        old="return {lr * root / (1 - std::pow(h.beta1, count)), h.eps * root};",
        new="return {lr * root / (1 - std::pow(h.beta1, count)), h.eps};",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "corrections count one step less",
        ADAMW,
        old="const double root = std::sqrt(1 - std::pow(h.beta2, count));",
        new="const double root = std::sqrt(1 - std::pow(h.beta2, count - 1));",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "coupled decay decays weights as well",
        ADAMW,
        old="kept(T(h.decoupled ? 1 - lr * h.weight_decay : 1)),",
        new="kept(T(1 - lr * h.weight_decay)),",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "lerp goes from one end alone",
        ADAMW,
        old="return weight < T(0.5) ? multiply_add(weight, apart, start)",
        new="return weight < T(2) ? multiply_add(weight, apart, start)",
        seen_by=("test_adamw", "test_prox_adamw"),
    ),
    Mutant(
        "exp_avg_sq forgets that its gradient is squared",
        ADAMW,
        old="multiply_add(h.one_minus_beta2 * g, g,",
        new="multiply_add(h.one_minus_beta2, g,",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "lr is taken twice where the host counts and a neighbour's count lies on the device",
        RULES,
        old="if (lr_here) own.corrected.step_size *= h.lr();",
        new="own.corrected.step_size *= h.lr();",
        seen_by=("test_counts",),
    ),
    Mutant(
        "steps are counted on the device after they are read",
        RULES,
        old="const double count = *own.count() += by;",
        new="const double count = (*own.count())++;",
        seen_by=("test_counts",),
    ),
    Mutant(
        "a step whose first launch fails has been counted on the device",
        "csrc/cuda/launch.cu",
        old="if (error != cudaSuccess && !stepped) count(-1);",
        new="",
        seen_by=("test_counts",),
    ),
    Mutant(
        "a step whose last launch fails is not counted on the device, though weights have moved",
        "csrc/cuda/launch.cu",
        old="if (error != cudaSuccess && !stepped) count(-1);",
        new="if (error != cudaSuccess) count(-1);",
        seen_by=("test_counts",),
    ),
    Mutant(
        "Triton's counts stay where they are when no kernel steps",
        "cges_kernels/backends/triton/executor.py",
        old="self._count(hyper, found_inf, -1.0)",
        new="pass",
        seen_by=("test_counts",),
    ),
    Mutant(
        "the reference computes with numbers where torch computes with tensors",
        "cges_kernels/core/hyperparameters.py",
        old="if for_reference and key in AS_TENSORS",
        new="if False",
        seen_by=("test_prox_adamw",),
    ),
    Mutant(
        "a moment of no dims takes the dtype of beta2",
        "cges_kernels/core/updates.py",
        old="exp_avg_sq.mul(beta2).to(w.dtype)",
        new="exp_avg_sq.mul(beta2)",
        seen_by=("test_prox_adamw",),
    ),
    Mutant(
        "decay does not follow an lr on the device",
        RULES,
        old="scalars.kept = A(1) - lr * decoupled_decay;",
        new="",
        seen_by=("test_counts",),
    ),
    Mutant(
        "an overflow counts on the device",
        "csrc/cuda/kernels.cuh",
        old="if (i >= tensors || table.overflowed() || !table.steps(i)) return;",
        new="if (i >= tensors || !table.steps(i)) return;",
        seen_by=("test_counts",),
    ),
    Mutant(
        "who has no gradient counts on the device",
        "csrc/cuda/kernels.cuh",
        old="if (i >= tensors || table.overflowed() || !table.steps(i)) return;",
        new="if (i >= tensors || table.overflowed()) return;",
        seen_by=("test_counts",),
    ),
    Mutant(
        "the second state keeps what was dead",
        "csrc/cuda/tiles.cuh",
        old="for (T* const state : mine.states)",
        new="for (T* const state : {mine.states[0]})",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "a plan counts no steps",
        PLAN,
        old="if (inputs.step.is_cpu()) write_step(inputs.step, at.count);",
        new="",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
    Mutant(
        "a count of steps keeps its version",
        PLAN,
        old="    bump_version(inputs.step);\n",
        new="",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
    Mutant(
        "one of two states may be missing",
        GATHER,
        old="if (there < kept_.n) refuse_states(slot);",
        new="if (there < kept_.n) begin_states(slot, inputs);",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
    Mutant(
        "any tensor counts steps",
        GATHER,
        old="    check_step(slot, inputs.step);\n",
        new="",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
    Mutant(
        "Python's plan counts no steps",
        f"{BACKENDS}/gathering.py",
        old="                step += 1\n",
        new="                step += 0\n",
        seen_by=("test_step_plan*",),
    ),
    Mutant(
        "Triton's eps is not corrected",
        f"{TRITON}/updates.py",
        old="eps = (tl.load(row + HYPER_EPS).to(tl.float64) * root).to(lr.dtype)",
        new="eps = tl.load(row + HYPER_EPS)",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "Triton's second moment is left unkept",
        f"{TRITON}/kernels.py",
        old="tl.store(at, states[s].to(STORED), tl.where(writes, mask, False))",
        new="tl.store(at, states[0].to(STORED), tl.where(writes, mask, False))",
        seen_by=("test_adamw",),
    ),
    Mutant(
        "an overflow counts in Triton",
        f"{TRITON}/updates.py",
        old="tl.where(tl.load(found_inf) != 0, 0.0, by)",
        new="by",
        seen_by=("test_counts",),
    ),
    Mutant(
        "Triton's host takes one group's betas for all",
        f"{TRITON}/executor.py",
        old="1 - betas[self.param_groups] ** count",
        new="1 - betas[self.param_groups * 0] ** count",
        seen_by=("test_counts", "test_prox_adamw"),
    ),
    Mutant(
        "the step size decays as well",
        UPDATES,
        old="w = w.mul(1 - lr * weight_decay)",
        new="w, lr = w.mul(1 - lr * weight_decay), lr * (1 - weight_decay)",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
    Mutant(
        "the reference counts no steps",
        f"{BACKENDS}/reference_plan.py",
        old="entry[STEP] = step.add_(1)",
        new="entry[STEP] = step",
        seen_by=("test_prox_adamw", "test_adamw_state", "test_adamw_refusals"),
    ),
)
