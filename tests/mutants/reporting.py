"""Breaks of cges_kernels/reporting: reports, their history, and tables."""

from .mutant import Mutant

REPORT = "cges_kernels/reporting/report.py"

MUTANTS = (
    Mutant(
        "compacted FLOPs take all blocks together",
        REPORT,
        old="int((outputs.sum(1) * inputs.sum(1)).sum())",
        new="int(outputs.sum() * inputs.sum())",
        seen_by=("test_report", "test_flops"),
    ),
    Mutant(
        "a copy of a weight is nobody's",
        REPORT,
        old="if is_copy and index < len(self.flops) - 1:",
        new="if is_copy and index < 0:",
        seen_by=("test_report", "test_flops"),
    ),
    Mutant(
        "the total leaves out other FLOPs",
        REPORT,
        old="counts[key] = sum(getattr(r, key) for r in self.layers) + self.other_flops",
        new="counts[key] = sum(getattr(r, key) for r in self.layers)",
        seen_by=("test_report", "test_flops"),
    ),
    Mutant(
        "a report leaves the model in eval mode",
        REPORT,
        old="            module.training = mode\n",
        new="            module.training = False\n",
        seen_by=("test_report", "test_flops"),
    ),
    Mutant(
        "a report draws random numbers",
        REPORT,
        old="        torch.random.fork_rng(devices=list(devices)),\n",
        new="",
        seen_by=("test_report", "test_flops"),
    ),
    Mutant(
        "a history holds a step twice",
        "cges_kernels/reporting/history.py",
        old='if row["step"] < step]',
        new='if row["step"] <= step]',
        seen_by=("test_history",),
    ),
    Mutant(
        "explain tells no l1 of a bias",
        "cges_kernels/reporting/explain.py",
        old='if grouped or key == "l1" else "-"',
        new='if grouped else "-"',
        seen_by=("test_explain",),
    ),
)
