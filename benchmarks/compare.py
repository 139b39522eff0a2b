"""Compare the speed of two commits: make bench-compare BASE=<commit>, or python -m benchmarks.compare BASE.

BASE is built in a git worktree of its own, which is removed afterwards; the other side is the tree at hand, with its
changes. Both run their own benchmarks, in turn, process by process, so that a noisy neighbour meets both. What counts
is the median over rounds of new / base for each point that both sides have. Only this package's variants are timed,
and eager as a control: where eager moved too, the machine did.

Exit code: 0, 1 when a point became slower by more than the threshold, 2 when nothing could be compared.
"""

import argparse
import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CONTROL = "eager"
THRESHOLD = 0.10
POINT = ("op", "direction", "case", "dtype", "rows", "width", "backend")
# Runs in either tree, also in a commit that is older than this file: keeps what is compared, compiles nothing.
WORKER = """
import dataclasses, sys
from benchmarks import run
PEERS = ("aten", "compile", "liger", "quack", "raw")
def keep_ours(measure):
    def measured(case, *arguments, **options):
        variants = {name: variant for name, variant in case.variants.items() if name not in PEERS}
        return measure(dataclasses.replace(case, variants=variants), *arguments, **options)
    return measured
wanted = sys.argv[1].split(",")
models = ("step", "sensitivity")
names = [name for name in run.SUITES if (name in wanted if sys.argv[1] else not name.endswith(models))]
for module in [module for name, module in sys.modules.items() if name.startswith("benchmarks.")]:
    if hasattr(module, "measure"):
        module.measure = keep_ours(module.measure)
    if hasattr(module, "compiled"):
        module.compiled = lambda function: function
sys.exit(run.main(["--only", *names, *sys.argv[2:]]) if names else 0)
"""


class CannotCompare(Exception):
    """Why there is nothing to compare, in a sentence."""


@dataclass(frozen=True)
class Change:
    """One point: medians over rounds, and the median of the rounds' ratios."""

    point: tuple[str, ...]
    base_ms: float
    new_ms: float
    ratio: float

    @property
    def percent(self) -> float:
        return 100 * (self.ratio - 1)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        changes = compare(options)
    except CannotCompare as reason:
        print(f"bench-compare: {reason}", file=sys.stderr)
        return 2
    return report(changes, options.threshold)


def compare(options: argparse.Namespace) -> list[Change]:
    """Build both sides, run them in turn, and join what they wrote."""
    with base_tree(options.base) as tree, tempfile.TemporaryDirectory(prefix="dropbp-rows-") as folder:
        trees = {"base": tree, "new": ROOT}
        if not options.no_build:
            for name, place in trees.items():
                print(f"building {name} in {place}", flush=True)
                cuda = "1" if options.device == "cuda" else "0"
                _run(place, ["setup.py", "-q", "build_ext", "--inplace"], f"the build of {name}", cuda)
        rounds = []
        for number in range(options.rounds):
            medians = {}
            # base, new, new, base, ...: neither is always the one that finds the machine warm.
            for name in ("base", "new") if number % 2 == 0 else ("new", "base"):
                print(f"round {number + 1} of {options.rounds}: {name}", flush=True)
                out = Path(folder, f"{name}{number}")
                flags = ["--scale", options.scale, "--out", str(out), "--budget-s", "0", "--device", options.device]
                _run(trees[name], ["-c", WORKER, ",".join(options.only), *flags], f"the benchmarks of {name}")
                medians[name] = read_medians(out)
            rounds.append(medians)
    return join(rounds)


@contextlib.contextmanager
def base_tree(base: str) -> Iterator[Path]:
    """A git worktree of `base`, removed at the end."""
    done = _git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}")
    if done.returncode:
        raise CannotCompare(f"BASE: expected a commit of this repository, got {base!r}")
    with tempfile.TemporaryDirectory(prefix="dropbp-base-") as folder:
        tree = Path(folder, "tree")
        done = _git("worktree", "add", "--detach", str(tree), done.stdout.strip())
        if done.returncode:
            raise CannotCompare(f"git worktree: {done.stderr.strip()}")
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def read_medians(folder: Path) -> dict[tuple[str, ...], float]:
    """Point -> median in milliseconds, of every file of op rows in `folder`."""
    medians = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if "backend" in row:
                    medians[tuple(row[name] for name in POINT)] = float(row["median_ms"])
    return medians


def join(rounds: list[dict[str, dict[tuple[str, ...], float]]]) -> list[Change]:
    """A change for each point that every round of both sides has, in the order of the newest."""
    points = [p for p in rounds[0]["new"] if all(p in medians for sides in rounds for medians in sides.values())]
    if not points:
        raise CannotCompare("the two commits have no benchmark in common")
    changes = []
    for point in points:
        pairs = [(sides["base"][point], sides["new"][point]) for sides in rounds]
        base_ms, new_ms = (statistics.median(side) for side in zip(*pairs, strict=True))
        changes.append(Change(point, base_ms, new_ms, statistics.median(new / base for base, new in pairs)))
    return changes


def report(changes: list[Change], threshold: float) -> int:
    """Print a line for each point, ours only, with eager's change beside it; the exit code."""
    control = {change.point[:-1]: change for change in changes if change.point[-1] == CONTROL}
    ours = [change for change in changes if change.point[-1] != CONTROL]
    head = f"{'op':<24} {'case':<34} {'dtype':<9} {'rows x width':>13} {'backend':<9}"
    print(f"\n{head} {'base':>11} {'new':>11} {'change':>8} {'eager':>8}")
    losses = 0
    for change in ours:
        op, direction, case, dtype, rows, width, backend = change.point
        is_loss = change.ratio > 1 + threshold
        losses += is_loss
        beside = control.get(change.point[:-1])
        moved = f"{beside.percent:>+7.1f}%" if beside else f"{'':>8}"
        print(
            f"{op:<24} {f'{direction} {case}':<34} {dtype:<9} {f'{rows} x {width}':>13} {backend:<9} "
            f"{change.base_ms:>8.4f} ms {change.new_ms:>8.4f} ms {change.percent:>+7.1f}% {moved}"
            f"{'  SLOWER' if is_loss else ''}"
        )
    wins = sum(change.ratio < 1 / (1 + threshold) for change in ours)
    print(f"\n{len(ours)} points: {wins} faster and {losses} slower by more than {threshold:.0%}")
    if any(abs(change.ratio - 1) > threshold for change in control.values()):
        print("Eager moved by more than that too, and it is the same code: something else ran on this machine.")
    return 1 if losses else 0


def _run(tree: Path, arguments: list[str], what: str, cuda: str = "") -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "DROPBP_KERNELS_CUDA": cuda}
    done = subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise CannotCompare(f"{what} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Compare the speed of a commit with the tree at hand; exit code 1 above 10 % loss.",
    )
    parser.add_argument("base", help="the commit to compare with: a hash, a branch, HEAD~1")
    parser.add_argument("--scale", choices=("full", "quick", "tiny"), default="full", help="as in benchmarks.run")
    parser.add_argument("--quick", dest="scale", action="store_const", const="quick", help="fewer sizes: two minutes")
    parser.add_argument("--only", nargs="+", default=[], help="suites, as in benchmarks.run; default: all of ops")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; default: 3")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="allowed loss; default: 0.1")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")
    parser.add_argument("--no-build", action="store_true", help="use what lies in both trees: a fresh BASE has nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if not options.threshold > 0:
        parser.error(f"--threshold: expected a positive number, got {options.threshold}")
    return options


if __name__ == "__main__":
    sys.exit(main())
