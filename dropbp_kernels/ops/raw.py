"""The raw ops, by name, as the public functions call them."""

from types import SimpleNamespace

import torch

from .schema import SCHEMAS

# Their one overload each: torch.ops.dropbp_kernels.<name> would look for it at every call, 0.5 to 1 us.
raw = SimpleNamespace(
    **{name: getattr(torch.ops.dropbp_kernels, name).default for stem in SCHEMAS.values() for name in stem}
)
