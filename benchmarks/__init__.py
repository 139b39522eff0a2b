"""Benchmarks. `python -m benchmarks.run --help` runs them; results/README.md explains the rows; LOG.md what was tried.

run.py, bench_*.py              what to run; one file per op, host overhead, whole training steps
directions.py, steps.py,
boundary_norms.py               what several of these share
baselines.py                    what ops are compared with, and the check before a time counts
timing.py, settings.py          how a time is taken, and how many are
rows.py                         what is written
page.py, plots.py               docs/kernels.md from the rows, and pictures of the newest
compare.py                      two commits, in turn
gpu_*.py, boundary.py           all of it on a GPU machine with one command, and what a dropped boundary costs
convergence*.py                 final losses of all methods over seeds: docs/convergence.md
coreset_*.py                    a mixture of sources, and how well SPSA tells its examples apart
simulate_*.py                   the memory of large models, on fake tensors
models_*.py, tiny_models.py     every causal LM of transformers, patched: docs/models.md
transformers_*.py               transformers' own tests, on patched models
"""
