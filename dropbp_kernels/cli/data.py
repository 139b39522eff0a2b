"""From documents to batches of token rows, with labels where the loss is.

=============================================  =========================  ==========================================
document                                       row of tokens              labels
=============================================  =========================  ==========================================
text: .txt file, or {"text": ...}              packed, seq_len tokens     all tokens
pair: {"prompt": ..., "completion": ...}       prompt, completion, end    completion and end
chat: {"messages": [{"role", "content"}]}      the tokenizer's template   what the assistant says
=============================================  =========================  ==========================================

Rows are padded on the right to the longest of their batch; under a causal mask no other row sees the padding, so no
attention mask is needed. Batches are a pure function of (seed, step).
"""

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..targets import IGNORED
from .documents import Document, read_documents
from .errors import UserError

PAD_MULTIPLE = 16
VALIDATE_EVERY = 20  # every 20th row is kept for validation,
MAX_VALIDATION_ROWS = 64  # but no more than these, so that a validation stays short next to the training


@dataclass(frozen=True)
class Row:
    """ids, labels: (length,) int32, length <= seq_len; labels are IGNORED where there is no loss."""

    ids: Tensor
    labels: Tensor


class Data:
    """Rows to train and to validate on, and the batch of any step.

    batch(step, batch_size) -> input_ids, labels: (batch_size, length) int64.
    """

    def __init__(self, rows: Sequence[Row], pad_id: int, seed: int, name: str):
        num_validation = min(MAX_VALIDATION_ROWS, max(1, len(rows) // VALIDATE_EVERY))
        every = len(rows) // num_validation
        is_validation = {i * every for i in range(num_validation)}
        validation = [row for i, row in enumerate(rows) if i in is_validation]
        self.validation = sorted(validation, key=lambda row: len(row.ids))  # a batch of alike rows is hardly padded
        self.train = [row for i, row in enumerate(rows) if i not in is_validation]
        self.pad_id = pad_id
        self.seed = seed
        self.name = name

    def batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Batch `step` of the endless stream of shuffled epochs, cut into batches of this size."""
        num = len(self.train)
        places = range(step * batch_size, (step + 1) * batch_size)
        return self._collate(
            [self.train[shuffled(num, f"data:{self.seed}:{place // num}")[place % num]] for place in places]
        )

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All validation rows, shortest first."""
        for start in range(0, len(self.validation), batch_size):
            yield self._collate(self.validation[start : start + batch_size])

    def _collate(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        longest = max(len(row.ids) for row in rows)
        length = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row.ids)] = row.ids
            labels[index, : len(row.labels)] = row.labels
        return ids, labels

    def max_id(self) -> int:
        return max(int(row.ids.max()) for row in (*self.train, *self.validation))

    def fingerprint(self) -> str:
        """Hash of all rows: tells whether a checkpoint was made with the same data."""
        digest = hashlib.sha1()
        for row in (*self.train, *self.validation):
            digest.update(row.ids.numpy().tobytes())
            digest.update(row.labels.numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        num_tokens = sum(len(row.ids) for row in self.train)
        num_targets = sum(int((row.labels[1:] != IGNORED).sum()) for row in self.train)  # the first is not predicted
        return {
            "name": self.name,
            "train_rows": len(self.train),
            "validation_rows": len(self.validation),
            "train_tokens": num_tokens,
            "train_tokens_with_loss": num_targets,
        }


@functools.lru_cache(maxsize=4)
def shuffled(num: int, seed: str) -> list[int]:
    """The order of num rows in an epoch, by its seed; only random(), whose stream is the same in every Python."""
    generator = random.Random(seed)
    keys = [generator.random() for _ in range(num)]
    return sorted(range(num), key=keys.__getitem__)


def load_data(name: str, tokenizer: Any, seq_len: int, seed: int, note: Callable[[str], None] = print) -> Data:
    """Read, tokenize, mask, pack and split the data called `name`: a built-in one, a file or a folder.

    Errors: UserError when it is missing, empty, malformed (with file and line) or too short for two rows.
    """
    documents = list(read_documents(name, seq_len, note))
    if not documents:
        raise UserError(f"--data {name}: expected text, found none")
    rows = list(encode(documents, tokenizer, seq_len))
    num_examples = sum(document.kind != "text" for document in documents)
    num_kept = sum(row.labels is not row.ids for row in rows)  # of a text they are one tensor
    if num_examples > num_kept and len(rows) >= 2:
        note(f"{name}: {num_examples - num_kept} of {num_examples} examples left out, without a token to train on")
    if len(rows) < 2:
        num_tokens = sum(len(row.ids) for row in rows)
        has_text = any(document.kind == "text" for document in documents)
        what = f"rows (sequences of {seq_len} tokens)" if has_text else "examples whose answer fits --seq-len"
        raise UserError(
            f"--data {name}: expected at least two {what}, one to train and one to validate, got {len(rows)} "
            f"({num_tokens} tokens); bring more text or lower --seq-len"
        )
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Data(rows, pad_id, seed, name)


def encode(documents: Sequence[Document], tokenizer: Any, seq_len: int) -> Iterator[Row]:
    """Rows of at most seq_len tokens; texts are packed one after the other, rows without any loss are left out."""
    stream: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if document.kind == "text":
            stream += tokenizer.encode(document.content) + end
            for start in range(0, len(stream) - seq_len + 1, seq_len):
                tokens = torch.tensor(stream[start : start + seq_len], dtype=torch.int32)
                yield Row(tokens, tokens)
            del stream[: len(stream) // seq_len * seq_len]
            continue
        if document.kind == "pair":
            ids, labels = _encode_pair(document.content, tokenizer, end, seq_len)
        else:
            ids, labels = _encode_chat(document, tokenizer, seq_len)
        if any(label != IGNORED for label in labels[1:]):  # the first token is never predicted
            yield Row(torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32))


def _encode_pair(pair: tuple[str, str], tokenizer: Any, end: list[int], seq_len: int) -> tuple[list[int], list[int]]:
    """Too long a pair loses the end of its completion beyond half a row, then the start of its prompt."""
    prompt = tokenizer.encode(pair[0])
    completion = _encode_behind(pair[0], pair[1], tokenizer) + end
    completion = completion[: max(seq_len // 2, seq_len - len(prompt))]
    excess = len(prompt) + len(completion) - seq_len
    if excess > 0:
        num_start = 1 if prompt[0] == tokenizer.bos_token_id else 0
        prompt = prompt[:num_start] + prompt[num_start + excess :]
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _encode_behind(before: str, text: str, tokenizer: Any) -> list[int]:
    """The tokens of `text` where it stands behind `before`.

    By itself a text gets the space that SentencePiece puts in front of all it is given; so it is encoded only where a
    token would reach over the border.
    """
    first, both = (tokenizer.encode(each, add_special_tokens=False) for each in (before, before + text))
    if both[: len(first)] == first:
        return both[len(first) :]  # type: ignore[no-any-return]
    return tokenizer.encode(text, add_special_tokens=False)  # type: ignore[no-any-return]


def _encode_chat(document: Document, tokenizer: Any, seq_len: int) -> tuple[list[int], list[int]]:
    """Apply the chat template; label what the assistant says. Too long a chat loses its end."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{document.origin}: messages need a tokenizer with a chat template, which this model lacks; "
            "use prompt and completion instead"
        )
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for text, is_assistant in _chat_parts(document, tokenizer):
        part = _encode_behind(before, text, tokenizer)  # the template writes special tokens itself
        ids += part
        labels += part if is_assistant else [IGNORED] * len(part)
        before = text
    return ids[:seq_len], labels[:seq_len]


def _chat_parts(document: Document, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Cut the rendered chat into (text, is it the assistant's).

    A turn of the assistant is what rendering it adds to the prompt for it. Few templates mark it themselves, so the
    chat is rendered up to each turn. Some templates rewrite earlier turns (dropping thoughts, say): such a turn does
    not stand in the whole chat as it was said and gets no loss; the last one always does.
    """
    messages = document.content
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            # A prompt for the assistant may open a thought that the rendered turn lacks: take what they share.
            start = _num_shared(before, after)
            earlier = tokenizer.apply_chat_template(messages[:index], tokenize=False)
            if whole.startswith(after) and start >= len(earlier):
                yield whole[done:start], False
                yield whole[start : len(after)], True
                done = len(after)
    except (ValueError, TypeError, KeyError, _template_error()) as error:
        raise UserError(f"{document.origin}: the chat template refuses these messages: {error}") from error
    if done < len(whole):
        yield whole[done:], False


def _num_shared(first: str, second: str) -> int:
    """Number of characters at the start that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _template_error() -> type[Exception]:
    from jinja2.exceptions import TemplateError

    return TemplateError
