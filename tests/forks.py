"""Programs in processes of their own that find torch imported and nothing else: that import takes seconds.

So one process does it, and forks for every program.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

# For every line a fork: it runs the program and ends as an interpreter does, with its traceback and exit code.
SERVER = """
import json, os, sys
import torch
for line in sys.stdin:
    code, environment, cwd, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(
    code: str, *, environment: Mapping[str, str] | None = None, cwd: Path | None = None, flags: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """What `python *flags -c code` prints and returns; the environment is this process's unless given."""
    process = server(flags)
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory(prefix="dropbp-fork-") as folder:
        job = code, dict(os.environ if environment is None else environment), str(cwd or Path.cwd()), folder
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        returncode = int(process.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, returncode, out, err)


@functools.cache
def server(flags: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process with torch, for interpreter flags; it ends with this one, which closes its input."""
    command = [sys.executable, *flags, "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process
