"""The stages of gpu_check.py: each a subprocess in the copied tree, within its own limit and the time that is left.

Imports nothing but the standard library, as gpu_check.py does.
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In the order of what a first run wants to know.
PARTS = ("build", "boundary", "tests", "benchmarks", "step", "sanitizer", "cpu")
PICTURES_S = 25.0  # kept for them, whatever the stages before took


@dataclass
class Stage:
    """One subprocess and how it went."""

    name: str
    ok: bool
    seconds: float
    note: str = ""


@dataclass
class Check:
    """The state of one run."""

    out: Path
    tree: Path
    is_dry: bool
    deadline: float
    commit: str
    parts: tuple[str, ...] = PARTS
    stages: list[Stage] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cpu" if self.is_dry else "cuda"

    def stage(self, name: str, command: list[str], limit_s: float, *, codes: tuple[int, ...] = (0,)) -> str:
        """Run one stage in the copied tree, within its limit and the time left; return what it printed."""
        limit_s = min(limit_s, self.left_s() - (0 if name == "pictures" else PICTURES_S))
        if limit_s < 2:
            self.stages.append(Stage(name, False, 0.0, "no time left"))
            return ""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONUNBUFFERED": "1"}
        environment["DROPBP_KERNELS_CUDA"] = "0" if self.is_dry else "1"
        if capability := self.machine.get("capability"):
            environment["TORCH_CUDA_ARCH_LIST"] = capability  # code for this GPU alone: a shorter build
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
            ok, note = process.returncode in codes, "" if process.returncode in codes else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its children too, compilers and workers
            output, _ = process.communicate()
            ok, note = False, f"stopped after {limit_s:.0f} s"
        stage = Stage(name, ok, round(time.monotonic() - started, 1), note or pytest_result(output))
        self.stages.append(stage)
        with (self.out / "log.txt").open("a") as log:
            log.write(f"\n===== {name}: {' '.join(command)}\n{output}\n")
        print(f"{'ok    ' if ok else 'FAILED'} {stage.seconds:6.1f} s  {name}  {stage.note}", flush=True)
        if not ok:
            print("\n".join(f"       | {line}" for line in output.strip().splitlines()[-12:]), flush=True)
        return output

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self.stages[-1].note = "; ".join(filter(None, (self.stages[-1].note, text)))


def pytest_result(output: str) -> str:
    """Pytest's last line, such as "12 passed, 3 skipped in 4.56s"; "" for any other output."""
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines and re.search(r"\d (passed|failed|deselected|skipped)", lines[-1]) else ""
