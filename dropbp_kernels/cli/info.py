"""dropbp-kernels info: versions, devices, and which backend serves each op here and why the better ones do not."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, devices, and which backend serves each op here",
        description="Show versions, devices, and which backend serves each op on this machine, and why others do not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """All facts, as plain values."""
    from .. import _backend
    from ..ops.schema import SCHEMAS
    from . import hardware

    no_host = _backend.why_no_host()
    return {
        "versions": hardware.versions(),
        "hardware": hardware.hardware(),
        "host": "C++ (_host)" if no_host is None else f"plain Python: {no_host}",
        "ops": [_serving(stem, device) for stem in SCHEMAS for device in _backend.LADDER],
    }


def _serving(stem: str, device: str) -> dict[str, Any]:
    from .. import _backend

    backend = _backend.serving(stem, device)
    better = _backend.LADDER[device]
    better = better[: better.index(backend)] if backend in better else ()
    return {
        "op": stem,
        "device": device,
        "backend": backend,
        "not_served_by": {name: _backend.why_not(name, stem) for name in better},
    }


def as_text(facts: dict[str, Any]) -> str:
    devices = list(dict.fromkeys(entry["device"] for entry in facts["ops"]))
    lines = ["versions"]
    lines += [f"  {name:<26} {value or 'not there'}" for name, value in facts["versions"].items()]
    machine = facts["hardware"]
    lines += ["", "devices", f"  {'cpu':<26} {machine['cpu']}, threads of torch: {machine['torch_threads']}"]
    lines += [f"  {'cuda:' + str(index):<26} {gpu}" for index, gpu in enumerate(machine["gpus"])]
    if not machine["gpus"]:
        lines.append(f"  {'cuda':<26} no device")
    lines += ["", f"host algorithms: {facts['host']}", "", f"{'ops':<28} " + "".join(f"{d:<11}" for d in devices)]
    by_op: dict[str, dict[str, str]] = {}
    without: dict[str, list[str]] = {}  # why a backend does not serve -> the ops that it does not serve
    for entry in facts["ops"]:
        by_op.setdefault(entry["op"], {})[entry["device"]] = entry["backend"]
        for backend, reason in entry["not_served_by"].items():
            without.setdefault(f"{entry['device']}: not {backend}: {reason}", []).append(entry["op"])
    lines += [f"  {op:<26} " + "".join(f"{served[d]:<11}" for d in devices).rstrip() for op, served in by_op.items()]
    for reason, ops in without.items():
        lines.append(f"  {reason}" + ("" if len(ops) == len(by_op) else f" ({', '.join(ops)})"))
    return "\n".join(lines)
