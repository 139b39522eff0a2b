"""The stages of gpu_check.py: each a subprocess in the copied tree, within its own limit and the time that is left.

What a stage prints goes to log.txt while it runs, and summary.json is written after each, so that a check which is
itself stopped leaves what it knew. Imports nothing but the standard library, as gpu_check.py does.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# In the order of what a first run wants to know.
PARTS = ("build", "boundary", "tests", "benchmarks", "step", "sanitizer", "cpu")
PICTURES_S = 25.0  # kept for them, whatever the stages before took
# What a stage that is over its limit is told, and how long it may take over it: pytest says what has failed so far, and
# Python's fault handler (PYTHONFAULTHANDLER) where every thread stands, which tells a kernel that never ends.
FAREWELLS = ((signal.SIGINT, 15.0), (signal.SIGABRT, 3.0))
MAX_LOGGED_BYTES = 1 << 20  # of one stage; what is beyond is left out of the middle


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

    def stage(
        self,
        name: str,
        command: list[str],
        limit_s: float,
        *,
        codes: tuple[int, ...] = (0,),
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Run one stage in the copied tree, within its limit and the time left; return what it printed."""
        limit_s = min(limit_s, self.left_s() - (0 if name == "pictures" else PICTURES_S))
        if limit_s < 2:
            self.stages.append(Stage(name, False, 0.0, "no time left"))
            return ""
        started = time.monotonic()
        with (self.out / "log.txt").open("a+b") as log:
            log.write(f"\n===== {name}: {' '.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            # Into the file and not through a pipe, which whatever outlives the stage would hold open.
            process = subprocess.Popen(
                command,
                cwd=self.tree,
                env={**self._environment(), **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
                ok, note = code in codes, "" if code in codes else f"exit {code}"
            except subprocess.TimeoutExpired:
                _end(process)
                ok, note = False, f"stopped after {limit_s:.0f} s"
            log.seek(begin)
            output = log.read()
            if len(output) > MAX_LOGGED_BYTES:
                log.truncate(begin)
                half = MAX_LOGGED_BYTES // 2
                log.write(output[:half] + b"\n[...]\n" + output[-half:])
        text = output.decode(errors="replace")
        stage = Stage(name, ok, round(time.monotonic() - started, 1), note or pytest_result(text))
        self.stages.append(stage)
        summary = {"stages": [asdict(stage) for stage in self.stages]}
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{'ok    ' if ok else 'FAILED'} {stage.seconds:6.1f} s  {name}  {stage.note}", flush=True)
        if not ok:
            print("\n".join(f"       | {line}" for line in text.strip().splitlines()[-12:]), flush=True)
        return text

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        # In front of what the caller has there: packages that this machine's Python lacks.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.tree), os.environ.get("PYTHONPATH"))))
        environment["DROPBP_KERNELS_CUDA"] = "0" if self.is_dry else "1"
        if capability := self.machine.get("capability"):
            environment["TORCH_CUDA_ARCH_LIST"] = capability  # code for this GPU alone: a shorter build
        return environment

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self.stages[-1].note = "; ".join(filter(None, (self.stages[-1].note, text)))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that had its time, and its children too: compilers and workers."""
    for number, seconds in FAREWELLS:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pytest_result(output: str) -> str:
    """Pytest's last line, such as "12 passed, 3 skipped in 4.56s"; "" for any other output."""
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines and re.search(r"\d (passed|failed|deselected|skipped)", lines[-1]) else ""
