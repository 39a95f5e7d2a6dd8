"""Mutants: small deliberate breaks of the project, by area. run.py tells whether the tests see them."""

from . import adamw, compaction, cpu, cuda, distributed, formulas, plan, python, reporting, training, triton

AREAS = (formulas, adamw, cpu, cuda, plan, triton, python, training, compaction, reporting, distributed)
MUTANTS = tuple(mutant for area in AREAS for mutant in area.MUTANTS)
