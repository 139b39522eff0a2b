"""A tiny model and a few rows of noise, on which `benchmarks.convergence` runs."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import (
    convergence_data,
    coreset_data,
)
from benchmarks.convergence_methods import TINY
from dropbp_kernels.cli import builtin
from dropbp_kernels.cli.data import IGNORED, Data, Row


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
