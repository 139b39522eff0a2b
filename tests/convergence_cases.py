"""A tiny model and a few rows of noise, on which `benchmarks.convergence` runs."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
pytest.importorskip("peft")
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    convergence_data,
    coreset_data,
)
from benchmarks.convergence_methods import TINY  # noqa: E402
from dropbp_kernels.cli import builtin  # noqa: E402
from dropbp_kernels.cli.data import IGNORED, Data, Row  # noqa: E402


def tiny_data(name, seq_len, seed):
    """Rows of random bytes, of unequal lengths, the last half of each with a loss."""
    if name == "mixture":
        return convergence_data.MixtureData(seq_len, seed)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (seq_len, seq_len - 8) * 10:
        ids = torch.randint(256, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: length // 2] = IGNORED
        rows.append(Row(ids, labels))
    return Data(rows, 258, seed, name)


@contextmanager
def tiny_task(folder, monkeypatch):
    """The tiny model lies in `folder`, untrained; data are a few rows of noise."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(builtin.config(TINY)).save_pretrained(folder / "model")
    monkeypatch.setattr(builtin, "ensure_pretrained", lambda recipe, device: folder / "model")
    monkeypatch.setattr(convergence_data, "load", tiny_data)
    monkeypatch.setattr(coreset_data, "_text", lambda source: bytes(range(256)) * 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
