"""Benchmarks. `python -m benchmarks.run --help` runs them; results/README.md explains the rows; LOG.md what was tried.

timing.py      how a time is taken     baselines.py   what we compare with, and the check before a time counts
rows.py        what is written         bench_*.py     one file per op, host overhead, the whole training step
compare.py     two commits, in turn
page.py        docs/kernels.md, from the rows
"""
