"""A mixture of three unequal sources of real text that stand on every machine with Python and torch, for coresets.

code            half of the modules of Python's standard library (those the built-in model was not pretrained on)
documentation   Python's language reference, English text
headers         C++ headers that come with torch

    mixture = Mixture(seq_len=128, seed=0)
    input_ids, labels, sources = mixture.batch(step, 64)
    for name in SOURCES:
        for input_ids, labels in mixture.validation_batches(name, 32): ...
"""

import functools
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dropbp_kernels.cli import corpus
from dropbp_kernels.cli.data import shuffled

# Share of the rows, by source: the mean is a third, so that the last is a small source and the others are large.
SOURCES = {"code": 0.5, "documentation": 0.4, "headers": 0.1}
NUM_ROWS = 2500  # fewer than any source has room for at 128 bytes a row
NUM_VALIDATION_ROWS = 32  # of each source


@functools.cache
def _text(source: str) -> bytes:
    if source == "code":
        return "\n".join(text for _, text in corpus.modules(corpus.FINETUNING)).encode()
    if source == "documentation":
        return corpus.documentation().encode()
    folder = Path(torch.__file__).parent / "include" / "c10"
    found = [path.read_text(errors="replace") for path in sorted(folder.rglob("*.h"))]
    if not found:
        raise FileNotFoundError(f"{folder}: expected the headers of torch, found none")
    return "\n".join(found).encode()


class Mixture:
    """Rows of seq_len bytes, the same at every seed; which ones validate too. The seed orders the others.

    train: by source, (rows, seq_len) uint8. batch: a pure function of (seed, step).
    """

    def __init__(self, seq_len: int, seed: int, num_rows: int = NUM_ROWS):
        self.seq_len, self.seed = seq_len, seed
        self.train: dict[str, Tensor] = {}
        self.validation: dict[str, Tensor] = {}
        for source, share in SOURCES.items():
            num_train = round(share * num_rows)
            rows = self._rows(source, num_train + NUM_VALIDATION_ROWS)
            self.train[source], self.validation[source] = rows[:num_train], rows[num_train:]
        self.sources = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(self.train.values())])
        self._all = torch.cat(list(self.train.values()))

    def _rows(self, source: str, count: int) -> Tensor:
        """count rows from all over the text, in random order."""
        text = torch.frombuffer(bytearray(_text(source)), dtype=torch.uint8)
        places = range(0, len(text) - self.seq_len, self.seq_len)
        if len(places) < count:
            raise ValueError(f"seq_len: expected {count} rows of {source}, got text for {len(places)}; lower seq_len")
        chosen = random.Random(source).sample(places, count)
        return torch.stack([text[place : place + self.seq_len] for place in chosen])

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids, labels (batch_size, seq_len), sources (batch_size,): from an endless stream of shuffled epochs."""
        num = len(self._all)
        rows = [
            shuffled(num, f"mixture:{self.seed}:{place // num}")[place % num]
            for place in range(step * batch_size, (step + 1) * batch_size)
        ]
        ids = self._all[rows].to(torch.int64)
        return ids, ids, self.sources[rows]

    def validation_batches(self, source: str, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows of a source that validate."""
        for rows in self.validation[source].to(torch.int64).split(batch_size):
            yield rows, rows
