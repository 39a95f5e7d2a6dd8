"""Breaks of cges_kernels/training: schedules, control of the density, pruning, and recipes."""

from .mutant import Mutant

SCHEDULES = "cges_kernels/training/schedules.py"
DENSITY = "cges_kernels/training/target_density.py"
PRUNE = "cges_kernels/training/prune.py"
LAYERS = "cges_kernels/training/layers.py"
RECIPES = "cges_kernels/training/recipes.py"

MUTANTS = (
    Mutant(
        "a ramp is negative before it begins",
        SCHEDULES,
        old="return 1 - (1 - min(max(t, 0.0), 1.0)) ** 3",
        new="return 1 - (1 - min(t, 1.0)) ** 3",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "a warmup goes on beyond full strength",
        SCHEDULES,
        old="return min(self.last_epoch / self.steps, 1.0) if self.steps else 1.0",
        new="return self.last_epoch / self.steps if self.steps else 1.0",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "the full value is the tensor that is scaled",
        SCHEDULES,
        old="        return now.clone()\n",
        new="        return now\n",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "a schedule that is loaded sets nothing",
        SCHEDULES,
        old="else key, value)\n        self._apply()\n",
        new="else key, value)\n",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "a control that is loaded forgets its last error",
        DENSITY,
        old='*("_error", "_warned", "_scales"),',
        new='*("_warned", "_scales"),',
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "weights without a penalty count in the density",
        DENSITY,
        old="return [(p, group) for group in self._groups() for",
        new="return [(p, group) for group in self.optimizer.param_groups for",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "a rank counts its own shards as all",
        "cges_kernels/core/tensors.py",
        old="return int(count.full_tensor() if is_sharded(count) else count)",
        new="return int(count.to_local() if is_sharded(count) else count)",
        seen_by=("test_sharded",),
    ),
    Mutant(
        "the prox has a first derivative only",
        "cges_kernels/core/shrinkage.py",
        old="        for _ in range(2):\n            t = _newton",
        new="        for _ in range(1):\n            t = _newton",
        seen_by=("test_reference_gradients",),
    ),
    Mutant(
        "the penalty may shrink weights as fast as it likes",
        DENSITY,
        old="FASTEST = 0.05",
        new="FASTEST = 1e9",
        seen_by=("test_target_density",),
    ),
    Mutant(
        "the factor rises while weights lose their scale",
        DENSITY,
        old="            change = -self.LARGEST\n",
        new="            pass\n",
        seen_by=("test_target_density",),
    ),
    Mutant(
        "all of a large weight is measured each time",
        "cges_kernels/training/removal.py",
        old="if step > 1 and not is_sharded(p):",
        new="if step < 1 and not is_sharded(p):",
        seen_by=("test_target_density",),
    ),
    Mutant(
        "the cut takes all from the first weights",
        "cges_kernels/training/removal.py",
        old="wanted = now * max(count / total, share / 2)",
        new="wanted = max(count, 0)",
        seen_by=("test_target_density",),
    ),
    Mutant(
        "an older schedule goes on beside a newer one",
        SCHEDULES,
        old="if newest is not None and newest is not self:",
        new="if newest is None:",
        seen_by=("test_schedules",),
    ),
    Mutant(
        "the landing keeps the coefficients as they are",
        DENSITY,
        old="return 0.0 if self.frozen else self.factor",
        new="return self.factor",
        seen_by=("test_schedules", "test_target_density"),
    ),
    Mutant(
        "pruned weights keep their momentum",
        PRUNE,
        old="value.masked_fill_(layer.param == 0, 0)",
        new="value.masked_fill_(layer.param.isnan(), 0)",
        seen_by=("test_prune",),
    ),
    Mutant(
        "biases are frozen with the weights beside them",
        PRUNE,
        old="if freeze_zeros is not None and others:",
        new="if freeze_zeros is not None and len(others) > 2:",
        seen_by=("test_prune",),
    ),
    Mutant(
        "mu of the last layer is not 1 - m",
        RECIPES,
        old="l / max(num_layers - 1, 1) for l in range(num_layers)]",
        new="l / num_layers for l in range(num_layers)]",
        seen_by=("test_recipe*",),
    ),
    Mutant(
        "a Linear tied to an embedding is regularised",
        LAYERS,
        old="chosen = set(axes) - {p for m in embeddings for p in m.parameters(recurse=False)}",
        new="chosen = set(axes)",
        seen_by=("test_recipe*",),
    ),
    Mutant(
        "weight decay of the layers reaches biases",
        RECIPES,
        old="for key in given if key in COEFFICIENTS or key in values}",
        new="for key in given if key in COEFFICIENTS}",
        seen_by=("test_recipe*",),
    ),
)
