"""Benchmarks: ``python -m bench.run`` measures, ``python -m bench.readme`` writes the README's table."""
