"""Peak live activation bytes of a training step on a model of the built-in one's size: counted, so repeatable."""

import pytest
import torch
from models import with_lora

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli import builtin
from dropbp_kernels.measure import PeakLiveBytes, saved_bytes

BATCH_SIZE, SEQ_LEN = 4, 256


def builtin_sized_model():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return with_lora(LlamaForCausalLM(builtin.config(builtin.Recipe())), r=8)


def peak_of_step(model):
    tokens = torch.arange(BATCH_SIZE * SEQ_LEN).reshape(BATCH_SIZE, SEQ_LEN) % 256
    model.zero_grad()
    with PeakLiveBytes() as live, saved_bytes() as saved:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return live.peak_bytes, saved.num_bytes


def largest_transient(model):
    """Peak bytes while the largest branch runs as inference: one block without a graph, the residual stream included.

    The stream is two tensors while the MLP runs: the branch's input, and the block's, which the caller's frame holds.
    """
    decoder = model.get_base_model().model
    shape = (BATCH_SIZE, SEQ_LEN, model.config.hidden_size)
    rope = decoder.rotary_emb(torch.empty(shape), torch.arange(SEQ_LEN)[None])
    with torch.no_grad(), PeakLiveBytes() as live:
        x = torch.empty(shape).normal_()
        decoder.layers[0](x, position_embeddings=rope)
    return live.peak_bytes


@pytest.fixture(scope="module")
def undropped():
    model = builtin_sized_model()
    peak, saved = peak_of_step(model)
    return peak, saved, largest_transient(model)


@pytest.mark.parametrize("drop_rate", [0.5, 0.75, 0.875])
def test_peak_is_the_kept_share_and_one_branch_in_passing(drop_rate, undropped):
    baseline, baseline_saved, transient = undropped
    model = builtin_sized_model()
    handler = apply_dropbp(model, drop_rate)
    for _ in range(2):
        handler.step()
        peak, saved = peak_of_step(model)
        assert peak <= (1 - drop_rate) * baseline + transient
        assert saved <= (1 - drop_rate) * baseline_saved + 0.03 * baseline_saved  # logits and loss stay


def test_detach_after_saves_everything_on_the_way(undropped):
    """The control: deciding after the forward saves nearly all that an undropped step does, and frees it again."""
    _, baseline_saved, _ = undropped
    model = builtin_sized_model()
    apply_dropbp(model, 0.75, dropped_runs="detach").step()
    _, saved = peak_of_step(model)
    assert saved > 0.9 * baseline_saved
