"""The keys and values that the stages of a target plan leave to later stages, as a cache of transformers.

It differs from a generation cache in four ways. Rows lie in the order of the stages, so who may attend to whom is said
by a mask of our own. Every stage writes into a place of its own, so a checkpointed layer that runs again writes the
same again. Keys of target rows keep their graph. And under a plan by rows a layer runs on some samples at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache, DynamicLayer

from ..stage_masks import StageMasks
from ..targets import Stage
from .same_code import calls

_Keys = tuple[Tensor, Tensor, Tensor | None]  # keys, values, and whose of them each sample takes (None: its own)


class LastKeysLeft(Exception):
    """A context stage has left the keys of the last layer: what would follow in its pass goes to nobody."""


class _SeenKeys(Cache):
    """What rows of a stage see, of which num_before lie in stages before it, padding included."""

    is_recomputable = True  # a layer that runs again in the backward finds what it found and writes what it wrote

    def __init__(self, num_before: int):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.num_before = num_before

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows of the stages before, padding included."""
        return self.num_before

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the keys that a stage of query_length rows sees."""
        return self.num_before + query_length, 0


class LayerKeys(_SeenKeys):
    """What one stage sees in one layer: the keys of the stages before it, and its own once the layer has written them.

    Nothing in it tells a layer from others: those that are compiled one by one, and are given this, share their graphs.

    Args:
        before: keys and values of each stage before, and whose of them each sample takes.
        num_before: how many rows these stages have.
        sample_of: whose keys each sample takes of this stage, int64 (B,); None: its own.
        keeps: whether the stage's own keys are kept for later ones.
        is_end: whether a context stage ends here, by `LastKeysLeft`.

    Source: `Cache.update` of transformers.
    """

    def __init__(self, before: list[_Keys], num_before: int, sample_of: Tensor | None, keeps: bool, is_end: bool):
        super().__init__(num_before)
        self.before = before
        self.sample_of = sample_of
        self.keeps = keeps
        self.is_end = is_end
        self.own: list[_Keys] = []

    def of_layer(self, layer_idx: int) -> "LayerKeys":
        """This, which is about one layer."""
        return self

    def of_samples(self, samples: Tensor) -> "SampleKeys":
        """What some samples of the batch see, int64 (K,), and where they leave their keys."""
        return SampleKeys(self, samples)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values (B, H, rows, D) of this stage's rows behind those of the stages before."""
        if self.keeps:
            self.own = [(key_states, value_states, self.sample_of)]
        if not torch.compiler.is_compiling() and self.is_end:  # a traced pass cannot be left
            raise LastKeysLeft
        return self._join(key_states, value_states, is_spread=self.sample_of is None)

    def update_samples(self, key_states: Tensor, value_states: Tensor, samples: Tensor) -> Any:
        """As `update`, of some samples, int64 (K,); the others come in calls of their own."""
        if self.keeps:
            self.own = [*self.own, (key_states, value_states, samples)]
        return self._join(key_states, value_states, is_spread=True, samples=samples)

    def _join(
        self, key_states: Tensor, value_states: Tensor, *, is_spread: bool, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        pairs = []
        for keys, values, whose in self.before:
            # Context that samples share is spread here and not before: kept, it is as large as what ran.
            index = whose if is_spread else None
            if samples is not None:
                index = samples if index is None else index[samples]
            pairs.append(
                (keys, values) if index is None else (keys.index_select(0, index), values.index_select(0, index))
            )
        if not pairs:
            return key_states, value_states
        all_keys, all_values = zip(*pairs, (key_states, value_states), strict=True)
        return torch.cat(all_keys, dim=-2), torch.cat(all_values, dim=-2)


class HopKeys(LayerKeys):
    """Those of a context stage whose projections have a gradient ("one_hop").

    A type of its own, for which torch.compile compiles a block anew; for other hooks, which make the hop, it does not.
    """


class StageKeys(_SeenKeys):
    """What one stage sees, layer by layer.

    Args:
        before: by layer, keys and values of each stage before, and whose of them each sample takes.
        num_before: how many rows these stages have.
        stage: the one that runs; None before the first.
        is_last: whether no stage follows, so that the keys of this one need not be kept.
        ends_at: the layer in which a context stage ends; None: all of its layers run whole.
        is_hop: whether it is a context stage whose projections have a gradient.
    """

    def __init__(
        self,
        before: dict[int, list[_Keys]] | None = None,
        num_before: int = 0,
        stage: Stage | None = None,
        is_last: bool = False,
        ends_at: int | None = None,
        is_hop: bool = False,
    ):
        super().__init__(num_before)
        self.before = before or {}
        self.stage = stage
        self.is_last = is_last
        self.ends_at = ends_at
        self.is_hop = is_hop
        self._layers: dict[int, LayerKeys] = {}

    def of_layer(self, layer_idx: int) -> LayerKeys:
        """What the stage sees in one layer, and where that leaves its keys."""
        if layer_idx not in self._layers:
            sample_of = None if self.stage is None else self.stage.sample_of
            self._layers[layer_idx] = (HopKeys if self.is_hop else LayerKeys)(
                self.before.get(layer_idx, []), self.num_before, sample_of, not self.is_last, layer_idx == self.ends_at
            )
        return self._layers[layer_idx]

    def of_samples(self, samples: Tensor) -> "SampleKeys":
        """What some samples of the batch see, int64 (K,), and where they leave their keys."""
        return SampleKeys(self, samples)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values (B, H, rows, D) of this stage's rows behind those of the stages before."""
        return self.of_layer(layer_idx).update(key_states, value_states, layer_idx)

    def of_next(self, stage: Stage, *, is_last: bool, ends_at: int | None, is_hop: bool) -> "StageKeys":
        """What `stage` sees, which runs after this one; a recompute of this one keeps nothing more."""
        num_own = 0 if self.stage is None else self.stage.rows.shape[1]
        before = {}
        for number, layer in self._layers.items():
            # Stage by stage and not joined: what a context stage joins has no graph, and keys of targets need theirs.
            if layer.own:
                before[number] = [*layer.before, _of_all(layer.own)]
            layer.own, layer.keeps = [], False
        return StageKeys(before, self.num_before + num_own, stage, is_last, ends_at, is_hop)


class SampleKeys(_SeenKeys):
    """What some samples see of a stage, or of a layer of it, for a layer that runs on these alone."""

    def __init__(self, whole: StageKeys | LayerKeys, samples: Tensor):
        super().__init__(whole.num_before)
        self.whole = whole
        self.samples = samples

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values (K, H, rows, D) of these samples behind those of the stages before."""
        return self.whole.of_layer(layer_idx).update_samples(key_states, value_states, self.samples)


def _of_all(parts: list[_Keys]) -> _Keys:
    """Keys that some samples left after others, as those of the whole batch."""
    if len(parts) == 1:
        return parts[0]
    keys, values, samples = zip(*parts, strict=True)
    return torch.cat(keys), torch.cat(values), torch.cat(samples).argsort()


def is_flash(config: Any) -> bool:
    """Whether a model attends by flash attention, which takes no mask of ours."""
    return str(config._attn_implementation).startswith("flash_attention_")


def looks_ahead(mask: Any) -> bool:
    """Whether a row attends to a later one by `mask`, (B, 1, S, S), which models with images make themselves."""
    return isinstance(mask, Tensor) and mask.dim() == 4 and bool(as_bool(mask).triu(1).any())


def as_bool(mask: Tensor) -> Tensor:
    """A mask of which keys to attend to, also where it is given as what is added to scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _may_slide(decoder: Any) -> bool:
    """Whether a decoder whose layers are of one type masks by the window that its configuration names.

    One of transformers' that makes no such mask does not read it (Moshi, a Llama with a Mistral's configuration).
    """
    return calls(decoder, "create_sliding_window_causal_mask") is not False


class ModelMasks:
    """`StageMasks` as a model of transformers takes them.

    Args:
        decoder: its attention and its sliding window, if any, count.
        documents: int64 (B, S), as in `TargetPlan`.
        given: the mask that the model made, (B or 1, 1, S, S), or one for each type of layer; None or of fewer
            dimensions where rows attend to earlier ones alone.
    """

    def __init__(self, decoder: Any, documents: Tensor, given: Any = None):
        config = decoder.config
        self.masks = StageMasks(documents)
        self.given = tree_map_only(Tensor, as_bool, given) if any(map(looks_ahead, tree_leaves(given))) else None
        self.is_additive = config._attn_implementation == "eager"
        self.is_flash = is_flash(config)
        layer_types = set(getattr(config, "layer_types", None) or ())
        self.is_mixed = "sliding_attention" in layer_types
        slides = self.is_mixed or (not layer_types and _may_slide(decoder))
        self.window = getattr(config, "sliding_window", None) if slides else None

    def add(self, stage: Stage, dtype: torch.dtype) -> Any:
        """The mask (B, 1, L, keys so far) of a stage's rows, or one for each type of layer; None: plainly causal.

        For flash attention: which keys so far are no padding, (B, keys so far).
        """
        self.masks.add(stage)
        if self.given is not None:
            return tree_map_only(Tensor, lambda sees: self._spelled(self.masks.of_model(sees), dtype), self.given)
        if self.masks.is_causal:
            return None
        if self.is_flash:  # its last query sees the last key, so stages of one document follow each other by themselves
            return self.masks.is_row()
        near = self._spelled(self.masks.mask(self.window), dtype)
        if not self.is_mixed or self.window is None:
            return near
        return {"full_attention": self._spelled(self.masks.mask(), dtype), "sliding_attention": near}

    def _spelled(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.is_additive:
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
