"""Sweep every causal LM of the installed transformers, and write docs/models.md from what was seen.

python -m benchmarks.models_sweep            # about two minutes: benchmarks/results/models.csv and docs/models.md
python -m benchmarks.models_sweep llama phi  # prints these rows, writes nothing
"""

import argparse
import csv
import datetime
import sys
import warnings
from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from dropbp_kernels.integrations.families import FAMILIES

from .models_check import check_fused, check_gradients
from .tiny_models import tiny_causal_lm, tiny_inputs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"
PAGE = ROOT / "docs" / "models.md"


@dataclass(frozen=True)
class Row:
    """What was seen of one model type.

    status: checked (gradients equal detach-after, bit for bit), refused (by apply_dropbp), wrong, or not built (no tiny
    model could be made or run here). family: the entry of the table, or "discovered". way: fused or generic.
    fused_adds: with fused=True, of how many adds so many ran in one kernel with the norm behind them. branches: their
    names and how many of each, in a model of two layers (not called ones in brackets). note: reason.
    """

    model_type: str
    status: str
    family: str = ""
    way: str = ""
    fused_adds: str = ""
    branches: str = ""
    flops: str = ""
    note: str = ""
    date: str = ""
    transformers: str = ""
    torch: str = ""


def sweep(model_type: str) -> Row:
    """Build, patch and check one model type."""
    import torch
    import transformers

    seen = {
        "date": datetime.date.today().isoformat(),
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    try:
        model = tiny_causal_lm(model_type)
        inputs = tiny_inputs()
        model(**inputs).loss.backward()
    except Exception as error:  # whatever a model of somebody else's raises: the reason goes into the row
        return Row(model_type, "not built", note=_first_line(error), **seen)
    family = next((name for name, entry in FAMILIES.items() if any(map(entry.fits, model.modules()))), None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            problems, (missed, gates) = check_gradients(model, inputs)
            fused_problems, num_fused = check_fused(model, inputs)
        except ValueError as error:
            return Row(model_type, "refused", family or "", note=_first_line(error), **seen)
    problems += fused_problems
    return Row(
        model_type,
        "checked" if all(problem.startswith("rounding") for problem in problems) else "wrong",
        family or "discovered",
        "fused" if family and FAMILIES[family].forward is not None else "generic",
        f"{num_fused} of {len(gates) - len(missed)}" if num_fused else "",
        _branches(gates, missed),
        "unknown" if any("FLOPs unknown" in str(warning.message) for warning in caught) else "known",
        "; ".join(problems),
        **seen,
    )


def _branches(gates: dict[str, nn.Module], missed: list[str]) -> str:
    counts = Counter(name.rpartition("gate_")[2] for name in gates)
    idle = {name.rpartition("gate_")[2] for name in missed}
    return ", ".join(f"{count} ({name}, idle)" if name in idle else f"{count} {name}" for name, count in counts.items())


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split("If you know its branches")[0].split())
    return text if len(text) < 200 else text[:200] + " ..."


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    count = Counter(row.status for row in rows)
    last = rows[-1]
    lines = [
        "# Models",
        "",
        "Which models of transformers `apply_dropbp` supports. Written by `python -m benchmarks.models_sweep` from",
        "[models.csv](../benchmarks/results/models.csv); do not edit.",
        "",
        f"Of every causal LM of transformers {last.transformers}, with two small layers (torch {last.torch}, CPU,",
        f"float32, {last.date}): **{count['checked']} of {len(rows)} model types are supported and checked**,",
        f"{count['refused']} are refused with a reason, {count['not built']} could not be built or run here,",
        f"{count['wrong']} are wrong.",
        "",
        "*Checked* means, for seven plans (all kept, all dropped, even ones, odd ones, three drawn): logits and",
        "gradients of all parameters are, bit for bit, those of the unpatched model with dropped branches detached by",
        "hooks; with all dropped, no branch parameter has a gradient; removing restores every class and key.",
        "",
        "- **family**: the table entry that serves the model type. *Discovered*: no entry was needed, the branches",
        "  were found by tracing, and proved.",
        "- **way**: *generic* gates the modules of a branch, *fused* rewrites the block's forward",
        "  ([architecture.md](architecture.md#gating-a-model-that-is-not-ours)).",
        "- **adds**: how many residual adds, of how many, run in one kernel with the norm behind them, under",
        "  `fused=True`. That was checked too: logits and gradients are then those of `fused=False` to rounding.",
        "- **FLOPs** *unknown*: all branches count as equally expensive, with a warning.",
        "- **equal** *rounding*: to rounding only, since a kernel is chosen by whether a gradient is needed.",
        "",
        "| model type | family | way | adds | branches | FLOPs | equal |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r.model_type} | {r.family} | {r.way} | {r.fused_adds} | {r.branches} | {r.flops} | "
            f"{'rounding' if r.note else 'bits'} |"
            for r in rows
            if r.status == "checked"
        ),
        "",
        "Not causal LMs, checked in the same way by `tests/test_families.py`: T5 and Whisper (encoder, decoder,",
        "cross-attention), ViT, RoBERTa.",
        "",
        "## Not supported",
        "",
        "| model type | status | reason |",
        "|---|---|---|",
        *(f"| {r.model_type} | {r.status} | {_cell(r.note)} |" for r in rows if r.status != "checked"),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def read_rows() -> list[Row]:
    """The committed rows."""
    with RESULTS.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def model_types() -> list[str]:
    """Every model type with a causal LM in the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def main() -> int:
    """Sweep; return 1 when a model is wrong."""
    import transformers

    parser = argparse.ArgumentParser(prog="python -m benchmarks.models_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types to print; default: all, to the page")
    names = parser.parse_args().names

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    rows: list[Any] = []
    for name in names or model_types():
        rows.append(sweep(name))
        print(*astuple(rows[-1])[:8], flush=True)
    if not names:
        with RESULTS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            writer.writerows(map(astuple, rows))
        PAGE.write_text(page(rows))
    return int(any(row.status == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
