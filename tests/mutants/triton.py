"""Breaks of the Triton executor: formulas, masks, counters, tables on the device, how tensors are cut."""

from .mutant import Mutant

FOLDER = "cges_kernels/backends/triton"

MUTANTS = (
    Mutant(
        "Triton's kernels update by SGD whatever the rule",
        f"{FOLDER}/executor.py",
        old='"UPDATE": RULES[self.rule.name].update',
        new='"UPDATE": RULES["sgd"].update',
        seen_by=("test_triton_third_rule", "test_adamw"),
    ),
    Mutant(
        "dampening in Triton's first step",
        f"{FOLDER}/updates.py",
        old="new = tl.where(phase == RUNNING, momentum * states[0] + one_minus_dampening * g, g)",
        new="new = tl.where(phase == RUNNING, momentum * states[0], 0.0) + one_minus_dampening * g",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "Triton multiplies gradients by the loss scale",
        f"{FOLDER}/updates.py",
        old="return divide(sign, tl.load(grad_scale).to(sign.dtype))",
        new="return sign * tl.load(grad_scale).to(sign.dtype)",
        seen_by=("test_amp",),
    ),
    Mutant(
        "coefficients on Triton's device forget lr",
        f"{FOLDER}/kernels.py",
        old="lr = tl.where(tl.load(row + HYPER_ON_DEVICE) != 0, load_number(row, HYPER_LR, ADDRESS_LR), 1.0)",
        new="lr = tl.where(tl.load(row + HYPER_ON_DEVICE) > 1, load_number(row, HYPER_LR, ADDRESS_LR), 1.0)",
        seen_by=("test_capture",),
    ),
    Mutant(
        "Triton's zeros keep their sign",
        f"{FOLDER}/kernels.py",
        old="return tl.where(w == 0, 0.0, w)",
        new="return w",
        seen_by=("test_executors",),
    ),
    Mutant(
        "Triton's first step keeps no buffer",
        f"{FOLDER}/kernels.py",
        old="writes = tl.load(tensor + TENSOR_PHASE) >= FIRST",
        new="writes = tl.load(tensor + TENSOR_PHASE) > FIRST",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "the last group of a panel is masked out",
        f"{FOLDER}/addressing.py",
        old="keep_left = tl.minimum((k1 + 1) * K2 - g0, KEEP).to(tl.int32)",
        new="keep_left = tl.minimum((k1 + 1) * K2 - g0 - 1, KEEP).to(tl.int32)",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "Triton's search in registers ends after two sweeps",
        f"{FOLDER}/whole.py",
        old="while (tl.min(done.to(tl.int32), axis=0) == 0) & (sweep < MAX_SWEEPS):",
        new="while (tl.min(done.to(tl.int32), axis=0) == 0) & (sweep < 2):",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "Triton's dead groups keep their momentum",
        f"{FOLDER}/whole.py",
        old="z, states = keep_zeros(dead, z, states)",
        new="z = tl.where(dead, 0.0, z)",
        seen_by=("test_state*", "test_frozen_zeros"),
    ),
    Mutant(
        "a panel's sweeps are not set back",
        f"{FOLDER}/split.py",
        old="                tl.store(swept, 0)\n",
        new="",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "the sums of a panel go on into the next one",
        f"{FOLDER}/split.py",
        old="start + block < chunks, other=0.0",
        new="start + block <= chunks, other=0.0",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "tensors share the scratch of their panels",
        f"{FOLDER}/items.py",
        old="items[..., ITEM_SCRATCH] = scratch + of_panel * panel",
        new="items[..., ITEM_SCRATCH] = of_panel * panel",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "accesses of 16 bytes wherever memory begins",
        f"{FOLDER}/tiles.py",
        old="vec = vec if aligned and pitch % vec == 0 else 1",
        new="vec = vec if pitch % vec == 0 else 1",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "an offset of 2**31 counts as small",
        f"{FOLDER}/tiles.py",
        old="span >= 2**31",
        new="span > 2**31",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
    Mutant(
        "changed hyperparameters stay on the host",
        f"{FOLDER}/executor.py",
        old="            self.hyper.clear()\n",
        new="",
        seen_by=("test_triton_bits", "test_triton_cuts", "test_triton_launches"),
    ),
)
