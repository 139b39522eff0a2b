"""A hook of pytest, for tests/conftest.py: what becomes of a process whose GPU met an error."""

import os

import torch


def pytest_runtest_logfinish(nodeid, location):
    """A process that met a CUDA error can run nothing more on the GPU, and would fail every test that it is given.

    A worker of xdist ends; another one takes its place and its tests.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
