"""A pytest plugin: every model of transformers that has known blocks is patched at drop rate 0 when it is made."""

import os
from typing import Any

from dropbp_kernels import apply_dropbp
from dropbp_kernels.gates import find_gates
from dropbp_kernels.integrations.families import FAMILIES

FUSED = os.getenv("DROPBP_SUITE_WAY") == "fused"


def pytest_configure(config: Any) -> None:
    """Patch at the end of every model's construction; a model inside another was patched by then."""
    from transformers import PreTrainedModel

    post_init = PreTrainedModel.post_init

    def patched(self: Any) -> None:
        post_init(self)
        has_blocks = any(family.fits(module) for module in self.modules() for family in FAMILIES.values())
        if has_blocks and not find_gates(self):
            apply_dropbp(self, 0.0, fused=FUSED, fused_loss="off")

    PreTrainedModel.post_init = patched
