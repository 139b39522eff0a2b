"""Gradients of target plans on tiny models of transformers, against dense models whose context is cut off by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from target_cases import CLOSE, assert_same, backward, chat, cut_inputs, is_target, runs_again, tiny

from dropbp_kernels import apply_dropbp
from dropbp_kernels.targets import IGNORED, plan_targets

pytestmark = pytest.mark.usefixtures("turns_apart")

FAMILIES = [
    *("cohere", "falcon", "gemma3_text", "gpt2", "gpt_neox", "hunyuan_v1_dense", "llama", "mistral", "olmo2", "opt"),
    *("phi", "qwen3"),
]
NOT_IN_FLOAT64 = ["mixtral", "deepseek_v3"]  # their experts multiply in float32 at most


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "falcon"])  # it has its own attention
def test_context_keys_and_values_are_constants(model_type, cut_attention):
    model, batch = tiny(model_type, attn_implementation="sdpa"), chat()
    dense = backward(cut_attention(copy.deepcopy(model), is_target(batch["labels"])), batch)
    apply_dropbp(model, 0.0, context="inference")
    assert_same(backward(model, batch), dense, **CLOSE)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
def test_one_hop_keeps_the_gradient_of_the_projections(model_type):
    model, batch = tiny(model_type), chat()
    dense = backward(cut_inputs(copy.deepcopy(model), is_target(batch["labels"])), batch)
    constant = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="one_hop")
    ours = backward(model, batch)
    assert_same(ours, dense, **CLOSE)
    with pytest.raises(AssertionError):
        assert_same(ours, constant, **CLOSE)


@pytest.mark.parametrize("model_type", [*FAMILIES, *NOT_IN_FLOAT64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_full_is_the_dense_gradient(model_type, attention):
    dtype = torch.float32 if model_type in NOT_IN_FLOAT64 else torch.float64
    model, batch = tiny(model_type, dtype, attn_implementation=attention), chat()
    dense = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_a_block_that_runs_several_times_leaves_its_keys_each_time(drop_rate, cut_attention):
    """Its number is not that of its last run, in which a context stage ends."""
    model, batch = tiny("hrm_text", attn_implementation="sdpa"), chat()
    dense_model = cut_attention(copy.deepcopy(model), is_target(batch["labels"]))
    with pytest.warns(UserWarning, match="only part of its blocks"):
        handler = apply_dropbp(model, drop_rate, context="inference", granularity="sample")
    handler.step()
    ours, dense = backward(model, batch), backward(dense_model, batch)
    if drop_rate:
        torch.testing.assert_close(ours[0], dense[0], **CLOSE)
    else:
        assert_same(ours, dense, **CLOSE)


def test_a_sliding_window_slides_over_places_and_not_over_stages():
    model, batch = tiny("mistral", sliding_window=5), chat()
    dense = backward(copy.deepcopy(model), batch)
    assert dense[0] != backward(tiny("mistral", sliding_window=64), batch)[0]
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def test_a_window_that_the_model_does_not_read_is_none():
    model, batch = tiny("llama", sliding_window=5), chat()
    dense = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt2", "llama"])
def test_kept_context_is_no_constant(model_type, cut_attention):
    model, batch = tiny(model_type, attn_implementation="sdpa"), chat()
    kept = runs_again(batch["labels"], context_keep=0.4, seed=5, step=0)
    assert kept.sum() == round(0.4 * plan_targets(batch["labels"]).num_context)
    dense = backward(cut_attention(copy.deepcopy(model), is_target(batch["labels"]) | kept), batch)
    head_rows = []
    handler = apply_dropbp(model, 0.0, context="inference", context_keep=0.4, seed=5)
    handler.step()
    model.get_output_embeddings().register_forward_hook(lambda module, args, _: head_rows.append(args[0].shape[1]))
    first = backward(model, batch)
    assert_same(first, dense, **CLOSE)
    assert head_rows == [8 + 5 + 1]  # the longest targets of each stage, and one beside the last label
    handler.step()
    with pytest.raises(AssertionError):
        assert_same(backward(model, batch), first, **CLOSE)  # other tokens
    handler.num_steps = 0
    handler.step()
    assert_same(backward(model, batch), first, rtol=0, atol=0)


def test_weights_under_autocast_keep_their_gradient():
    model, batch = tiny(dtype=torch.float32), chat()
    apply_dropbp(model, 0.0, context="inference")
    with torch.autocast("cpu", torch.bfloat16):
        grads = backward(model, batch)[1]
    assert grads.keys() == dict(model.named_parameters()).keys()


@st.composite
def padded_batches(draw):
    batch_size, seq_len = draw(st.integers(1, 3)), draw(st.integers(2, 10))
    real = torch.zeros(batch_size, seq_len, dtype=torch.long)
    for sample in range(batch_size):
        length = draw(st.integers(1, seq_len))
        start = draw(st.sampled_from([0, seq_len - length]))
        real[sample, start : start + length] = 1
    labelled = torch.tensor(
        [draw(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)) for _ in range(batch_size)]
    )
    tokens = torch.randint(3, 96, (batch_size, seq_len), generator=torch.Generator().manual_seed(seq_len))
    labels = torch.where(labelled & (real == 1), tokens, IGNORED)
    labels[:, 1:][real[:, :-1] == 0] = IGNORED
    return {"input_ids": tokens, "labels": labels, "attention_mask": real}


@settings(max_examples=25, deadline=None)
@given(padded_batches())
def test_any_labels_and_padding(batch):
    if not is_target(batch["labels"]).any():
        return
    model = tiny(num_hidden_layers=2)
    dense = backward(copy.deepcopy(model), {**batch, "use_cache": False})
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def test_positions_that_leave_padding_out():
    model, batch = tiny("opt", dropout=0.0), chat()
    mask = (torch.arange(16) >= torch.tensor([[0], [3], [2]])).long()
    batch = {**batch, "labels": batch["labels"].masked_fill(mask == 0, IGNORED), "attention_mask": mask}
    batch["labels"][2, 2] = IGNORED  # which padding would predict
    dense = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def test_packed_documents_do_not_see_each_other():
    batch = {name: value[:2] for name, value in chat().items() if name != "use_cache"}
    batch["labels"][0, :12] = IGNORED  # its first document has no target, both of the other sample have some
    batch["labels"][1, 3:5] = batch["input_ids"][1, 3:5]
    batch["position_ids"] = torch.cat([torch.arange(9), torch.arange(7)]).expand(2, 16)
    model = tiny()
    dense = backward(copy.deepcopy(model), {**batch, "use_cache": False})
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)
    del batch["position_ids"]
    assert backward(model, batch)[0] != dense[0]


def test_loss_on_all_tokens_is_undropped_training_bit_for_bit():
    batch = {**chat(), "labels": chat()["input_ids"]}
    model = tiny(dtype=torch.float32)
    dense = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference")
    assert_same(backward(model, batch), dense, rtol=0, atol=0)


def test_num_items_in_batch_divides_the_loss():
    model, batch = tiny(), chat()
    dense = backward(copy.deepcopy(model), {**batch, "num_items_in_batch": 100})
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, {**batch, "num_items_in_batch": 100}), dense, **CLOSE)
