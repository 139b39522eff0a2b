"""What may be asked of a simulated step: the words of `plan`'s options, and one setting."""

from dataclasses import dataclass

ADAPTERS = ("lora", "qlora", "paca", "qpaca", "full")
IN_FOUR_BITS = {"lora": "qlora", "paca": "qpaca"}  # the same adapter over a base in 4 bits
CHECKPOINTS = ("none", "block", "kept", "sliced")
# Bytes of AdamW's two moments, as multiples of the parameter's; "adamw8bit": one byte each.
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")


@dataclass(frozen=True)
class Setting:
    """How a step is run; what of a plan may vary while the model stays.

    target_share: of each sample's tokens, its last ones, that carry a loss, under a target plan; None: no target plan.
    """

    batch_size: int
    seq_len: int
    drop_rate: float
    checkpoint: str = "none"
    dropped_runs: str = "inference"
    fused_loss: str = "auto"
    fused: bool = False
    target_share: float | None = None

    @property
    def num_targets(self) -> int:
        """Tokens of a sample with a loss. The first token of a sample predicts the second: it never has one."""
        share = 1.0 if self.target_share is None else self.target_share
        return min(self.seq_len - 1, max(1, round(share * self.seq_len)))
