"""A linear layer some of whose columns are trained, in the shape that PEFT gives its layers."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..plain_linear import is_watched
from .base_layer import features, is_plain, out_by_in
from .config import PacaConfig
from .linear import Columns, column_linear
from .selection import NOT_CHOSEN, check_indices


class PacaLayer(BaseTunerLayer):
    """What PEFT asks of a tuner's layer.

    paca_columns: per adapter what is trained, (out, r): the change of the chosen columns over the scaling, or where
    `published` the columns over the scaling. paca_indices: which columns, (r,) int64, in the state dict too;
    NOT_CHOSEN until `select_columns` has run.
    """

    adapter_layer_names = ("paca_columns",)
    other_param_names = ("r", "alpha", "scaling", "published", "chosen")
    training: bool  # of nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.published: dict[str, bool] = {}
        self.chosen: dict[str, tuple[int, ...]] = {}  # paca_indices on the host, so that nothing waits for the device
        self.paca_columns = nn.ParameterDict()
        self.paca_indices = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: list[Any] = []  # what `unmerge` puts back, newest last
        self._together: tuple[Any, Columns, list[Tensor]] | None = None  # of several active adapters
        self.in_features, self.out_features = features(self.get_base_layer())

    # ---- adapters

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        alpha: float,
        indices: Tensor,
        config: PacaConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter. Errors: ValueError when indices are not r different columns."""
        if config.selection != "gradient":
            check_indices("indices", indices, r, self.in_features)
        self.r[adapter_name], self.alpha[adapter_name], self.scaling[adapter_name] = r, alpha, alpha / r
        self.published[adapter_name] = config.published
        self.paca_indices[adapter_name] = indices
        self.chosen[adapter_name] = tuple(indices.tolist())
        self.paca_columns[adapter_name] = nn.Parameter(torch.zeros(self.out_features, r))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.published:
            self.reset_columns(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_columns(self, adapter_name: str) -> None:
        """Let the adapter change nothing."""
        trained = self.paca_columns[adapter_name]
        with torch.no_grad():
            if self.published[adapter_name] and not trained.is_meta:
                original = self._weight().index_select(1, self._indices(adapter_name))
                trained.copy_(original / self.scaling[adapter_name])
            else:
                trained.zero_()

    def choose(self, adapter_name: str, indices: Tensor) -> None:
        """Train other columns from here on. Errors: ValueError when they are not r different columns."""
        check_indices("indices", indices, self.r[adapter_name], self.in_features)
        self.chosen[adapter_name] = tuple(indices.tolist())
        self.paca_indices[adapter_name] = indices.to(self.paca_indices[adapter_name].device)
        self.reset_columns(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.paca_indices:
            del self.paca_indices[adapter_name]
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.paca_indices:  # PEFT 0.20 would make integers floating
            indices, device = self.paca_indices[adapter_name], self.paca_columns[adapter_name].device
            if not indices.is_meta and device.type != "meta":
                self.paca_indices[adapter_name] = indices.to(device)

    def _check_loaded(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse columns that do not fit, before anything is loaded; note which ones they are."""
        for name, trained in self.paca_columns.items():
            loaded = state_dict.get(f"{prefix}paca_columns.{name}")
            if loaded is not None and loaded.shape != trained.shape:
                raise ValueError(
                    f"{prefix}paca_columns.{name}: expected shape {tuple(trained.shape)}, got {tuple(loaded.shape)}"
                )
            indices = state_dict.get(f"{prefix}paca_indices.{name}")
            if indices is not None:
                if not (indices == NOT_CHOSEN).all():
                    check_indices(f"{prefix}paca_indices.{name}", indices, self.r[name], self.in_features)
                self.chosen[name] = tuple(indices.tolist())

    # ---- what the active adapters make of the weight

    def _weight(self) -> Tensor:
        """The base weight as (out, in), unpacked where it is held in another form."""
        return out_by_in(self.get_base_layer())

    def _indices(self, adapter_name: str) -> Tensor:
        if self.chosen[adapter_name][0] == NOT_CHOSEN:
            raise RuntimeError(
                f"adapter {adapter_name!r}: its columns are not chosen yet; with selection='gradient' call "
                "dropbp_kernels.paca.select_columns(model, backprop) before training"
            )
        return self.paca_indices[adapter_name]

    def _changing(self) -> list[str]:
        """The active adapters of this layer, but those that cannot have changed anything yet, where that may be."""
        active = [name for name in self.active_adapters if name in self.paca_columns]
        if self.training and torch.is_grad_enabled():
            return active
        return [name for name in active if self.chosen[name][0] != NOT_CHOSEN]

    def _active_columns(self, names: list[str]) -> tuple[Columns, Tensor]:
        """The columns of all these adapters and what is trained of them, as one."""
        if len(names) == 1:
            (name,) = names
            indices = self._indices(name)
            columns = Columns(indices, self.chosen[name], self.scaling[name], self.published[name])
            return columns, self.paca_columns[name]
        self._check_alone(names)
        key = tuple(self.chosen[name] for name in names)
        device = self.paca_columns[names[0]].device
        if self._together is None or self._together[0] != key or self._together[1].indices.device != device:
            places = [self._indices(name) for name in names]
            union = torch.cat(places).unique()
            positions = [torch.searchsorted(union, indices) for indices in places]
            self._together = key, Columns(union, tuple(union.tolist()), 1.0), positions
        _, columns, positions = self._together
        deltas = [self._delta(name) for name in names]
        total = deltas[0].new_zeros(self.out_features, len(columns.key))
        for delta, position in zip(deltas, positions, strict=True):
            total = total.index_add(1, position, delta.to(total.dtype))
        return columns, total

    def _check_alone(self, names: list[str]) -> None:
        if len(names) > 1 and any(self.published[name] for name in names):
            raise ValueError(f"published: such an adapter replaces columns and works alone, got {', '.join(names)}")

    def _delta(self, adapter_name: str) -> Tensor:
        """What the adapter adds to its columns, (out, r), with its graph."""
        delta = self.paca_columns[adapter_name] * self.scaling[adapter_name]
        if self.published[adapter_name]:
            self._check_alone([*self.merged_adapters, adapter_name])  # the base's own columns are needed
            return delta - self._weight().index_select(1, self._indices(adapter_name))
        return delta

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base weight, in that weight's layout; PEFT asks for it."""
        delta = self._delta(adapter)
        dense = delta.new_zeros(self.out_features, self.in_features)
        dense.index_copy_(1, self._indices(adapter), delta)
        return dense.t() if isinstance(self.get_base_layer(), Conv1D) else dense

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Linear(nn.Module, PacaLayer):
    """nn.Linear or transformers' Conv1D with partial connections."""

    known_forwards: tuple[Any, ...] = (nn.Linear.forward, Conv1D.forward)  # that this layer may stand in for

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        PacaLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_loaded(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._changing()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        columns, trained = self._active_columns(names)
        if args or kwargs or self._must_stay_whole():
            return self._beside(x, columns, trained, *args, **kwargs)
        return self._product(x, columns, trained)

    def _product(self, x: Tensor, columns: Columns, trained: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        weight = base.weight.t() if isinstance(base, Conv1D) else base.weight  # not `_weight`, whose graph is cut
        return column_linear(x, weight, base.bias, trained, columns)

    def _must_stay_whole(self) -> bool:
        """Whether the base layer has to be called as it is, with the columns' product beside it.

        So where its weight may not be written to for a moment or is not all there (trained itself, sharded, a tensor
        subclass), where somebody changed or watches its forward (hooks, accelerate's offloading), and under
        torch.compile, whose graphs write to no weight. Saved is the same; what is computed, more.
        """
        base: Any = self.get_base_layer()
        return bool(
            torch.compiler.is_compiling()
            or type(base).forward not in self.known_forwards
            or "forward" in vars(base)
            or self.base_layer is not base
            or is_watched(base)
            or not is_plain(base)
            or base.weight.requires_grad
        )

    def _beside(self, x: Tensor, columns: Columns, trained: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        change = trained * columns.scaling
        if columns.replace:
            change = change - self._weight().index_select(1, columns.indices)
        return result + F.linear(x.index_select(-1, columns.indices), change.to(x.dtype)).to(result.dtype)

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' columns into the base weight; `unmerge` restores it to the bit.

        Errors: ValueError, the weight untouched, when safe_merge and a column would not be finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.paca_columns and self.chosen[name][0] != NOT_CHOSEN:
                self._before_merge.append(self._merge(name, safe_merge))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.merged_adapters.pop()
            self._restore(self._before_merge.pop())

    @torch.no_grad()
    def _merge(self, name: str, safe_merge: bool) -> Any:
        """Merge one adapter; return what `_restore` needs."""
        base: Any = self.get_base_layer()
        if not is_plain(base):
            raise TypeError(f"merge: expected a dense weight or one of bitsandbytes, got {type(base.weight).__name__}")
        return self._write(self._weight(), name, safe_merge)

    def _write(self, weight: Tensor, name: str, safe_merge: bool) -> Any:
        """Write the adapter's columns into `weight`; return the indices and what stood there."""
        self._check_alone([*self.merged_adapters, name])
        indices = self._indices(name)
        original = weight.index_select(1, indices)
        columns = Columns(indices, (), self.scaling[name], self.published[name]).of(original, self.paca_columns[name])
        if safe_merge and not torch.isfinite(columns).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.index_copy_(1, indices, columns.to(weight.dtype))
        return indices, original

    @torch.no_grad()
    def _restore(self, saved: Any) -> None:
        """Put back what `_merge` returned."""
        indices, original = saved
        weight = self._weight()
        weight.index_copy_(1, indices.to(weight.device), original.to(weight))

    def __repr__(self) -> str:
        return "paca." + super().__repr__()
