"""QPaCA: partial connections over weights that bitsandbytes holds in 4 or 8 bits. Imported where such a base is met.

Every product unpacks the weight once, into a tensor of its own, and the columns are written there: the packed weight is
never touched, and the trained columns stay in 16 or 32 bits. In the backward it is unpacked again, not kept.
"""

import warnings
from typing import Any

import bitsandbytes
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from .layer import Linear
from .linear import Columns, column_linear


def unpacked(base: Any) -> Tensor:
    """The weight of a quantised linear as (out, in), newly made."""
    return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None)).detach()


class _Quantised(Linear):
    def _product(self, x: Tensor, columns: Columns, trained: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        return column_linear(x, base.weight, base.bias, trained, columns, unpack=self._weight)

    def _pack(self, values: Tensor) -> None:
        raise NotImplementedError

    def _set_aside(self) -> Any:
        """All that `_restore` needs to make the base layer what it is now, to the bit."""
        base: Any = self.get_base_layer()
        return base.weight

    @torch.no_grad()
    def _merge(self, name: str, safe_merge: bool) -> Any:
        warnings.warn(
            f"merging into {type(self.get_base_layer()).__name__} quantises all of the weight anew; "
            "dropbp_kernels.paca.convert_to_lora is exact",
            stacklevel=4,
        )
        values = self._weight()
        self._write(values, name, safe_merge)
        before = self._set_aside()
        self._pack(values)
        return before


class Linear4bit(_Quantised):
    """bitsandbytes' Linear4bit (NF4 or FP4) with partial connections."""

    known_forwards = (bitsandbytes.nn.Linear4bit.forward,)

    def _must_stay_whole(self) -> bool:
        base: Any = self.get_base_layer()
        # In eval mode bitsandbytes may repack a weight for one kind of CPU; its own product knows that layout.
        return super()._must_stay_whole() or getattr(base.weight.quant_state, "packing_format_for_cpu", False)

    def _pack(self, values: Tensor) -> None:
        base: Any = self.get_base_layer()
        old = base.weight
        kinds = {
            name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        new: Any = bitsandbytes.nn.Params4bit(values.cpu(), requires_grad=False, **kinds)
        base.weight = new.to(old.device)

    def _restore(self, saved: Any) -> None:
        self.get_base_layer().weight = saved


class Linear8bitLt(_Quantised):
    """bitsandbytes' Linear8bitLt with partial connections: 8-bit weights, products in the dtype of the input."""

    known_forwards = (bitsandbytes.nn.Linear8bitLt.forward,)

    def _set_aside(self) -> Any:
        base: Any = self.get_base_layer()
        return base.weight, base.weight.CB, base.weight.SCB, base.state.CB, base.state.SCB

    def _pack(self, values: Tensor) -> None:
        base: Any = self.get_base_layer()
        old = base.weight
        new: Any = bitsandbytes.nn.Int8Params(values.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        base.weight = new.to(old.device)
        base.state.reset_grads()
        base.state.CB = base.state.SCB = None

    def _restore(self, saved: Any) -> None:
        base: Any = self.get_base_layer()
        base.weight, base.weight.CB, base.weight.SCB, base.state.CB, base.state.SCB = saved


LAYERS: dict[type[nn.Module], type[Linear]] = {
    bitsandbytes.nn.Linear4bit: Linear4bit,
    bitsandbytes.nn.Linear8bitLt: Linear8bitLt,
}
