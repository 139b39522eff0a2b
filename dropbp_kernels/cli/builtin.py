"""The built-in model: a small byte-level Llama, pretrained once on source files of Python's standard library.

It makes the command useful on a machine without a network: a model that has learned something, so that fine-tuning it
means something. Pretraining takes a minute or two on two cores and is cached for as long as recipe and corpus stay.
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import corpus, progress

if TYPE_CHECKING:
    import torch

NAME = "builtin"
MAX_SEQ_LEN = 1024


class ByteTokenizer:
    """UTF-8 bytes are the tokens 0 to 255; three special ones follow. Has what `data` uses of a real tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 256, 257, 258
    vocab_size = 259
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.bos_token_id] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@dataclass(frozen=True)
class Recipe:
    """The model and how it is pretrained. The cache is keyed by all of it."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    steps: int = 200
    batch_size: int = 8
    seq_len: int = 256
    learning_rate: float = 3e-3
    seed: int = 0


def config(recipe: Recipe) -> Any:
    """The model's config, of transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=MAX_SEQ_LEN,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=ByteTokenizer.pad_token_id,
    )


def cached_folder(recipe: Recipe) -> Path:
    """Where the pretrained model of this recipe lies, or would lie."""
    from .. import _backend

    key = json.dumps([asdict(recipe), sys.version_info[:3], corpus.fingerprint(corpus.PRETRAINING)])
    return _backend.cache_dir() / f"builtin-{hashlib.sha1(key.encode()).hexdigest()[:16]}"


def ensure_pretrained(recipe: Recipe, device: "torch.device") -> Path:
    """The folder of the pretrained model, in Hugging Face format; pretrains it if it is not there yet.

    The model is written to a temporary folder that is renamed when complete: an interruption leaves nothing behind.
    """
    folder = cached_folder(recipe)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as unfinished:
        model, loss = _pretrain(recipe, device)
        model.cpu().save_pretrained(unfinished)
        (Path(unfinished) / "pretraining.json").write_text(json.dumps({**asdict(recipe), "loss": loss}, indent=2))
        complete = Path(unfinished).with_name(f"complete-{os.getpid()}-{folder.name}")
        os.rename(unfinished, complete)
        os.mkdir(unfinished)  # so that TemporaryDirectory finds something to remove
    try:
        os.rename(complete, folder)
    except OSError:
        if not folder.exists():
            raise
    return folder


def _pretrain(recipe: Recipe, device: "torch.device") -> tuple[Any, float]:
    """Train from scratch; return the model and the mean loss of the last twenty steps."""
    import torch
    from transformers import LlamaForCausalLM

    from ..integrations.transformers import apply_dropbp, remove_dropbp

    text = "".join(f"# {name}\n{source}\n" for name, source in corpus.modules(corpus.PRETRAINING)).encode()
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    torch.manual_seed(recipe.seed)
    model: Any = LlamaForCausalLM(config(recipe))
    model.to(device).train()
    # Nothing is dropped; the fused kernels of the CPU shorten what a user waits for. On a GPU it is over in no time.
    handler = apply_dropbp(model, drop_rate=0.0, fused="auto" if device.type == "cpu" else False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    starts = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    with progress.bar("pretraining the built-in model (once)", recipe.steps) as bar:
        for step in range(recipe.steps):
            first = torch.randint(len(tokens) - recipe.seq_len, (recipe.batch_size, 1), generator=starts)
            ids = tokens[first + torch.arange(recipe.seq_len)].to(device, torch.int64)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * scheduled(step, recipe.steps)
            handler.step()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    remove_dropbp(model)
    return model, sum(losses[-20:]) / len(losses[-20:])


def scheduled(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up over a twentieth of the steps, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
