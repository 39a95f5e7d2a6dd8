"""The experiments of the CGES thesis: ``python -m examples.thesis fig3``.

experiments.py defines what each experiment compares and measures. figures.py draws the results, page.py
writes them into docs/claims.md, and cli.py is the command. The results for the digits are in
``examples/thesis/results``.
"""
