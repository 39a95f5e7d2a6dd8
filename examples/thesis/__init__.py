"""The experiments of the CGES thesis: ``python -m examples.thesis fig3``.

experiments.py says what each compares and measures, figures.py draws the results, and files.py writes and
reads them. sections.py puts each experiment's results into words, page.py makes the page of them, and cli.py
is the command. The results on docs/claims.md are in ``examples/thesis/results``.
"""
