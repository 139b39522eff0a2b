"""Fused ops: the public functions. Each runs in the best backend of its device (`_backend`)."""

from .. import _backend
from .schema import SCHEMAS

_backend.install(SCHEMAS)

from .column_update import column_restore, column_update  # noqa: E402
from .gated_residual_add import gated_residual_add  # noqa: E402
from .gated_residual_layer_norm import gated_residual_layer_norm  # noqa: E402
from .gated_residual_rms_norm import gated_residual_rms_norm  # noqa: E402
from .glu import geglu, swiglu  # noqa: E402
from .l1_distances import l1_distances  # noqa: E402
from .partial_gather import partial_gather  # noqa: E402
from .permuted_norm import permuted_layer_norm, permuted_rms_norm  # noqa: E402
from .permuted_residual_add import permuted_residual_add  # noqa: E402
from .rope import rope  # noqa: E402

__all__ = [
    "column_restore",
    "column_update",
    "gated_residual_add",
    "gated_residual_layer_norm",
    "gated_residual_rms_norm",
    "geglu",
    "l1_distances",
    "partial_gather",
    "permuted_layer_norm",
    "permuted_residual_add",
    "permuted_rms_norm",
    "rope",
    "swiglu",
]
