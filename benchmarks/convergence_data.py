"""The data that `benchmarks.convergence` trains on: real text that stands on every machine with Python.

builtin:docstrings  function sources and their docstrings, as the command line has them: about half of the tokens are
                    targets
builtin:docs        Python's language reference as running text: every token is a target
mixture             running text of three unequal sources (`coreset_data`): every token is a target
summaries           longer function sources and the first paragraph of their docstring: about a sixth are targets
"""

import functools
from collections.abc import Iterator

from torch import Tensor

from dropbp_kernels.cli import corpus
from dropbp_kernels.cli.builtin import ByteTokenizer
from dropbp_kernels.cli.data import Data, Row, encode, load_data
from dropbp_kernels.cli.documents import Document

from .coreset_data import SOURCES, Mixture


class MixtureData:
    """The mixture with the methods of `Data` that training uses. sources: those of the last batch; counts: of all."""

    def __init__(self, seq_len: int, seed: int):
        self.mixture = Mixture(seq_len, seed)
        self.counts = {place: len(self.mixture.train[name]) for place, name in enumerate(SOURCES)}
        self.sources: Tensor | None = None

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        ids, labels, self.sources = self.mixture.batch(step, batch_size)
        return ids, labels

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for source in SOURCES:
            yield from self.mixture.validation_batches(source, batch_size)

    def max_id(self) -> int:
        return 255


def load(name: str, seq_len: int, seed: int) -> Data | MixtureData:
    """The data of that name; which rows validate does not depend on the seed, the order of the others does."""
    if name.startswith("builtin:"):
        return load_data(name, ByteTokenizer(), seq_len, seed, note=lambda line: None)
    if name == "mixture":
        return MixtureData(seq_len, seed)
    if name == "summaries":
        return Data(_summaries(seq_len), ByteTokenizer.pad_token_id, seed, name)
    raise ValueError(f"data: expected a built-in name, mixture or summaries, got {name!r}")


@functools.cache
def _summaries(seq_len: int) -> tuple[Row, ...]:
    """Pairs that fill half of a row or more, so that little of a batch is padding."""
    documents = []
    for prompt, completion in corpus.docstring_pairs(seq_len - 1):
        summary = completion.split("\n\n")[0]
        summary += "" if summary.endswith('"""') else '"""'
        if len((prompt + summary).encode()) >= seq_len // 2:
            documents.append(Document("pair", (prompt, summary), "summaries"))
    return tuple(encode(documents, ByteTokenizer(), seq_len))
