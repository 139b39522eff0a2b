"""The tuner: finds the targets in a model, chooses their columns and puts our layers in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .base_layer import features, is_quantised, out_by_in
from .config import PREFIX, PacaConfig
from .layer import Linear, PacaLayer
from .selection import NOT_CHOSEN, largest_columns, norms, random_columns


class PacaModel(BaseTuner):
    """A model whose targets have partial connections; made by `peft.get_peft_model(model, PacaConfig(...))`.

    Errors: ValueError, with the model as it was, when r exceeds the inputs of a target; TypeError when a target is no
        linear layer. Those of PEFT: NoMatchingPeftModuleError (a ValueError) when no target is found.
    """

    prefix = PREFIX
    tuner_layer_cls = PacaLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target before the first is replaced."""
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        for key, module in model.named_modules():
            found = self._check_target_module_exists(peft_config, key) if key else False
            if not found or isinstance(found, _ExcludedModule):
                continue
            r, (in_features, _) = _rank(peft_config, key), layer_features(_base_of(module), key)
            if r > in_features:
                raise ValueError(f"r: expected at most the {in_features} inputs of {key}, got {r}")
            if isinstance(module, PacaLayer) and peft_config.published and module.merged:
                raise ValueError(f"published: {key} has a merged adapter; unmerge it first")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around every call of a PEFT model, which takes adapter_names out of it when this has seen them."""
        if (names := kwargs.get("adapter_names")) is not None:
            raise ValueError(f"adapter_names: expected None, since samples of a batch share their columns, got {names}")
        yield

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = _rank(peft_config, current_key)
        pattern = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        settings: dict[str, Any] = {
            "r": r,
            "alpha": peft_config.alpha_pattern.get(pattern, peft_config.alpha),
            "indices": _choose(peft_config, target, r, current_key),
            "config": peft_config,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, PacaLayer):
            target.update_layer(adapter_name, **settings)
            return
        layer = new_layer(target, adapter_name, **settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trained until it is made active
        self._replace_module(parent, target_name, layer, target)


def _rank(config: PacaConfig, key: str) -> int:
    return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)


def _base_of(target: nn.Module) -> Any:
    """The linear itself, where a layer of a tuner stands around it."""
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def layer_features(base: nn.Module, key: str) -> tuple[int, int]:
    try:
        return features(base)
    except TypeError as error:
        raise TypeError(f"{error} at {key}") from None


def new_layer(target: nn.Module, adapter_name: str, **settings: Any) -> Linear:
    kind, base = Linear, _base_of(target)
    if is_quantised(base):
        from .bnb import LAYERS

        kind = next(ours for theirs, ours in LAYERS.items() if isinstance(base, theirs))
    return kind(target, adapter_name, **settings)


def _choose(config: PacaConfig, target: nn.Module, r: int, key: str) -> Tensor:
    base = _base_of(target)
    in_features, _ = features(base)
    if config.selection == "gradient":
        return torch.full((r,), NOT_CHOSEN, dtype=torch.int64, device="cpu")
    if config.selection == "weight_norm" and not base.weight.is_meta:
        return largest_columns(r, norms(out_by_in(base)))
    return random_columns(r, in_features, config.seed, key.rpartition(".")[0])
