"""Starts the ranks of a run on one machine (gloo), each a process of a script beside the tests."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NUM_RANKS = 2
TIMEOUT_S = 240


@contextmanager
def started(script: str, folder: Path) -> Iterator[None]:
    """Run `python tests/script folder` as every rank, beside the block's body; at its end wait for them.

    Errors: AssertionError with the output of a rank that failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tests = Path(__file__).resolve().parent
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    logs = [folder / f"rank{rank}.log" for rank in range(NUM_RANKS)]  # no pipes, which may fill while another is read
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                command = [sys.executable, "-W", "ignore", str(tests / script), str(folder)]
                places = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(command, env={**shared, **places}, stdout=output, stderr=subprocess.STDOUT)
                )
        yield
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(TIMEOUT_S) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def results_in(folder: Path) -> list[Any]:
    """What each rank left in folder/rank<R>.pt."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(NUM_RANKS)]
