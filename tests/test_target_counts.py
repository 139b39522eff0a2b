"""What a target plan leaves to do, counted: backward FLOPs, head FLOPs and saved bytes grow with the target rows."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tiny_models import tiny_causal_lm
from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations.decoder_parts import DecoderParts
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.targets import IGNORED

BATCH_SIZE, SEQ_LEN, NUM_LAYERS, WIDTH = 2, 24, 2, 32


def model(adapter, vocab_size=96):
    """Attention is eager: torch's counter does not know the CPU's flash attention."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": NUM_LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 4}
    lm = tiny_causal_lm("llama", attn_implementation="eager", vocab_size=vocab_size, **sizes)
    if adapter == "lora":
        lm = get_peft_model(lm, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    apply_dropbp(lm.train(), 0.0, context="inference", fused_loss="chunked")
    return lm


def batch(num_targets):
    tokens = torch.randint(3, 96, (BATCH_SIZE, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, : SEQ_LEN - num_targets] = IGNORED
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def flops(lm, num_targets):
    """FLOPs of the forward (the loss takes the head's gradient there) and of the backward."""
    with FlopCounterMode(display=False) as forward:
        loss = lm(**batch(num_targets)).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    lm.zero_grad()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_backward_flops_are_proportional_to_the_target_rows(adapter):
    lm = model(adapter)
    counted = {num: flops(lm, num)[1] for num in (3, 6, 12)}
    assert counted[6] == 2 * counted[3] > 0
    assert counted[12] == 4 * counted[3]


def test_of_context_the_last_layer_makes_keys_alone(monkeypatch):
    num_rows = SEQ_LEN - 6 - 1
    ours = flops(model("full"), 6)
    monkeypatch.setattr(DecoderParts, "last_keys", None)
    lm = model("full")
    whole = flops(lm, 6)
    mlp = lm.model.layers[-1].mlp
    linears = [lm.model.layers[-1].self_attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    attention = 2 * 2 * BATCH_SIZE * num_rows**2 * WIDTH
    spared = 2 * BATCH_SIZE * num_rows * sum(linear.weight.numel() for linear in linears) + attention
    assert (ours[0], ours[1]) == (whole[0] - spared, whole[1])


def test_head_flops_are_proportional_to_the_target_rows():
    small, large = model("lora", 96), model("lora", 196)  # frozen: the head's gradient is that of its input alone
    for num in (3, 6, 12):
        of_100_classes = flops(large, num)[0] - flops(small, num)[0]
        assert of_100_classes == 2 * (2 * BATCH_SIZE * num * WIDTH * 100)


def test_saved_bytes_grow_with_the_target_rows_over_the_keys_they_see():
    lm = model("lora")
    saved = {}
    for num in (3, 6, 9, 12):
        with saved_bytes() as counted:
            lm(**batch(num))
        saved[num] = counted.num_bytes
    per_target = {num: saved[num + 3] - saved[num] for num in (3, 6, 9)}
    assert len(set(per_target.values())) == 1
    keys_and_values = 2 * 4 * BATCH_SIZE * (SEQ_LEN - 1) * WIDTH * NUM_LAYERS  # the last token of all never runs
    shift = 4 * BATCH_SIZE * WIDTH  # the head's input has one row more, so that the model's own shift of labels fits
    assert saved[3] - per_target[3] == keys_and_values + shift
