"""Starts the ranks of a run on one machine (gloo), each a process of a script beside the tests."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

NUM_RANKS = 2
TIMEOUT_S = 240

# What a script imports takes seconds, often longer than what it does: one process imports it, and forks for every rank.
# It ends with the first that fails, as the others would wait for that one. PEFT would import bitsandbytes where it is,
# and with it torch's inductor, which no rank uses.
FORKING = """
import contextlib, os, runpy, sys

sys.modules["bitsandbytes"] = None
with contextlib.suppress(ImportError):
    import peft
script, folder = sys.argv[1:]
sys.argv = [script, folder]
runpy.run_path(script)
for rank in range(int(os.environ["WORLD_SIZE"])):
    if os.fork() == 0:
        output = os.open(os.path.join(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        runpy.run_path(script, run_name="__main__")
        sys.exit()
for _ in range(int(os.environ["WORLD_SIZE"])):
    if code := os.waitstatus_to_exitcode(os.wait()[1]):
        sys.exit(f"a rank ended with {code}")
"""


@contextmanager
def started(script: str, folder: Path) -> Iterator[None]:
    """Run `python tests/script folder` as every rank, beside the block's body; at its end wait for them.

    Errors: AssertionError with the output of the ranks where one failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(tests / script), str(folder)]
    log = folder / "ranks.log"  # no pipes, which may fill while another is read
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
        code = process.wait(TIMEOUT_S)
        assert code == 0, "".join(path.read_text()[-4000:] for path in sorted(folder.glob("rank*.log")))
    finally:
        with suppress(ProcessLookupError):  # where all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results_in(folder: Path) -> list[Any]:
    """What each rank left in folder/rank<R>.pt."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(NUM_RANKS)]
