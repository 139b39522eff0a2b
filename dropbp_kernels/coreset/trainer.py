"""Coresets in transformers' `Trainer` and TRL's `SFTTrainer`: large batches in, subsets out.

trainer = Trainer(model, args, train_dataset=data)  # per_device_train_batch_size: of the candidates
selector = apply_coreset(trainer, keep=0.5)
trainer.train()
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .budgets import num_kept, source_id
from .scoring import batch_size_of
from .selector import CoresetSelector

STATE_FILE = "coreset.pt"


def apply_coreset(trainer: Any, keep: float = 0.5, *, source_column: str = "source", **options: Any) -> CoresetSelector:
    """Let a Trainer train on `keep` of each batch; return the selector. Call it before `trainer.train()`.

    Every micro-batch of `per_device_train_batch_size` candidates is replaced by its subset before the Trainer counts
    tokens, so that the loss is the mean over what is trained on. `source_column` of the training data tells the source
    of each example, an integer or a string; without it all are of one source. An incomplete batch at the end of an
    epoch that is no larger than a subset is kept whole. The selector's state goes into every checkpoint and comes back
    with it. Evaluation is untouched.

    Errors: ValueError when the trainer has a selector already, or for weights="cluster", which a Trainer's loss cannot
            take; TypeError for what is no Trainer; those of `CoresetSelector`. In training, ValueError for batches that
            have no row for each example (SFTTrainer's padding_free=True, pairs of DPOTrainer).
    Cost:   that of `CoresetSelector.select` for each micro-batch.
    """
    if not hasattr(trainer, "get_train_dataloader"):
        raise TypeError(f"trainer: expected a Trainer of transformers, got {type(trainer).__name__}")
    if hasattr(trainer, "coreset_selector"):
        raise ValueError("trainer: expected one without a coreset, got one that has it")
    if options.get("weights", "uniform") != "uniform":
        raise ValueError(f"weights: expected 'uniform', as a Trainer's loss has it, got {options['weights']!r}")
    selector = CoresetSelector(trainer.model, keep, **options)
    trainer.coreset_selector = selector
    _feed_sources(trainer, source_column)
    _train_on_subsets(trainer, selector, source_column)
    _keep_state(trainer, selector)
    return selector


class _SourceCollator:
    """Collates without the column of sources, which the model does not take, and puts it beside the result."""

    def __init__(self, collator: Callable[[Any], Any], column: str):
        self.collator, self.column = collator, column

    def __call__(self, examples: Sequence[Any]) -> Any:
        if not all(self.column in example for example in examples):
            return self._collated(examples)
        names = [example[self.column] for example in examples]
        rest = [{name: value for name, value in example.items() if name != self.column} for example in examples]
        ids = [source_id(name.item() if isinstance(name, Tensor) else name) for name in names]
        return {**self._collated(rest), self.column: torch.tensor(ids)}

    def _collated(self, examples: Sequence[Any]) -> Any:
        batch = self.collator(examples)
        if (num_rows := batch_size_of(batch)) != len(examples):
            raise ValueError(
                f"batch: expected a row for each of its {len(examples)} examples, of which some are chosen, got "
                f"{num_rows}; coresets know no padding_free=True and no pairs"
            )
        return batch


def _feed_sources(trainer: Any, column: str) -> None:
    """The loader of training data keeps the column, which the Trainer would take off; no other loader does."""
    original = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        trainer._set_signature_columns_if_needed()
        columns, collator = trainer._signature_columns, trainer.data_collator
        trainer._signature_columns = [*columns, column]
        trainer.data_collator = _SourceCollator(collator, column)
        try:
            return original()
        finally:
            trainer._signature_columns, trainer.data_collator = columns, collator

    trainer.get_train_dataloader = get_train_dataloader


def _train_on_subsets(trainer: Any, selector: CoresetSelector, column: str) -> None:
    original = trainer.get_batch_samples

    def subset_of(batch: Any) -> Any:
        batch = dict(batch)
        sources = batch.pop(column, None)
        if batch_size_of(batch) <= num_kept(trainer.args.train_batch_size, selector.keep):
            return batch
        return selector.subset(batch, sources)[0]

    def get_batch_samples(*args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, _ = original(*args, **kwargs)
        subsets = [subset_of(batch) for batch in batches]
        return subsets, trainer._get_num_items_in_batch(subsets, trainer.args.device)

    trainer.get_batch_samples = get_batch_samples


def _keep_state(trainer: Any, selector: CoresetSelector) -> None:
    """Saved and loaded with the optimizer's state."""
    save, load = trainer._save_optimizer_and_scheduler, trainer._load_optimizer_and_scheduler

    def save_with_ours(output_dir: str) -> None:
        save(output_dir)
        if trainer.args.should_save:
            torch.save(selector.state_dict(), Path(output_dir, STATE_FILE))

    def load_with_ours(checkpoint: str | None) -> None:
        load(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if path.is_file():
            selector.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            warnings.warn(
                f"{path}: expected the state of the coreset, found none; its moments start anew", stacklevel=2
            )

    trainer._save_optimizer_and_scheduler = save_with_ours
    trainer._load_optimizer_and_scheduler = load_with_ours
