"""Target plans on tiny models of transformers, against dense models whose context is cut off by hand."""

import copy
import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.tiny_models import tiny_causal_lm
from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.targets import IGNORED, plan_targets

FAMILIES = ["cohere", "falcon", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi", "qwen3"]
NOT_IN_FLOAT64 = ["mixtral", "deepseek_v3"]  # their experts multiply in float32 at most
# The loss is float32 whatever the model is; what it hands back is good to about eight digits.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def tiny(model_type="llama", dtype=torch.float64, **overrides) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_causal_lm(model_type, **overrides).to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def chat(batch_size=3, seq_len=16) -> dict[str, torch.Tensor]:
    """A prompt and a completion, the same with a tail that no target sees, and a talk of two turns."""
    tokens = torch.randint(3, 96, (batch_size, seq_len), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, :8] = IGNORED
    labels[1, :10] = labels[1, 13:] = IGNORED
    labels[2, :3] = labels[2, 6:11] = IGNORED
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def is_target(labels):
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def backward(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, dense, **tolerance):
    torch.testing.assert_close(ours[0], dense[0], **tolerance)
    names = {name for name, grad in dense[1].items() if grad.count_nonzero()}
    assert names <= ours[1].keys()
    for name, grad in ours[1].items():
        torch.testing.assert_close(
            grad, dense[1].get(name, torch.zeros_like(grad)), **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def cut_keys(targets, function, module, query, key, value, *args, **kwargs):
    """Attention whose context keys and values are constants."""
    keep = targets[:, None, :, None]
    key, value = torch.where(keep, key, key.detach()), torch.where(keep, value, value.detach())
    return function(module, query, key, value, *args, **kwargs)


@pytest.fixture
def cut_attention():
    """Lets a model of the attention interface attend with constant context keys and values."""

    def cut(model, targets):
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS.register("cut_keys", partial(cut_keys, targets, sdpa))
        ALL_MASK_ATTENTION_FUNCTIONS.register("cut_keys", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.config._attn_implementation = "cut_keys"
        return model

    yield cut
    for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        functions._global_mapping.pop("cut_keys", None)


def cut_inputs(model, targets):
    """The same with the input of every attention a constant at context rows."""

    def cut(module, args, kwargs):
        name, states = ("hidden_states", kwargs["hidden_states"]) if "hidden_states" in kwargs else (0, args[0])
        states = torch.where(targets[:, :, None], states, states.detach())
        return ((states, *args[1:]), kwargs) if name == 0 else (args, {**kwargs, name: states})

    for module in model.modules():
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(cut, with_kwargs=True)
    return model


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


def test_a_sliding_window_slides_over_places_and_not_over_stages():
    model, batch = tiny("mistral", sliding_window=5), chat()
    dense = backward(copy.deepcopy(model), batch)
    assert dense[0] != backward(tiny("mistral", sliding_window=64), batch)[0]
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def runs_again(labels, mask=None, **keep):
    """Which context rows run with autograd all the same, (B, S)."""
    plan = plan_targets(labels, mask, **keep)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    for stage in plan.stages:
        if stage.is_target:
            for sample, rows in enumerate(stage.rows):
                kept[sample, rows[stage.is_row[sample]]] = True
    return kept & ~is_target(labels)


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


def own_loss(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("model_type", ["cohere", "llama"])  # the first scales its logits behind the head
def test_labels_given_to_step_serve_a_loss_of_the_callers(model_type, cut_attention):
    model, batch = tiny(model_type, attn_implementation="sdpa"), chat()
    labels = batch.pop("labels")
    targets = is_target(labels)
    exact = cut_attention(copy.deepcopy(model), targets)
    exact_logits = exact(**batch).logits
    own_loss(exact_logits, labels).backward()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=labels)
    logits = model(**batch).logits
    torch.testing.assert_close(logits, torch.where(targets[..., None], exact_logits, 0.0))  # at their places
    own_loss(logits, labels).backward()
    for ours, dense in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, dense.grad, **CLOSE)
    assert torch.equal(model(**batch, logits_to_keep=6).logits, logits[:, -6:])
    assert torch.equal(model(**batch, logits_to_keep=torch.tensor([3, 9])).logits, logits[:, [3, 9]])
    assert torch.equal(model(**batch, return_dict=False)[0], logits)
    handler.step()  # they held for one step
    torch.testing.assert_close(model(**batch).logits, exact_logits)


def test_hidden_states_of_target_rows_come_back_at_their_places():
    model, batch = tiny(), chat()
    labels = batch.pop("labels")
    exact = model.model(**batch).last_hidden_state
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=labels)
    hidden = model.model(**batch).last_hidden_state
    torch.testing.assert_close(hidden, torch.where(is_target(labels)[..., None], exact, 0.0))


def test_labels_given_to_step_need_a_model_that_can_use_them():
    handler = apply_dropbp(tiny(), 0.0)
    with pytest.raises(ValueError, match="labels: expected None, since the model was not patched with context"):
        handler.step(labels=chat()["labels"])
    assert handler.num_steps == 0
    model, batch = tiny(), chat()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=batch["labels"])
    with pytest.raises(ValueError, match=r"labels: expected the shape of input_ids, \(2, 16\), got \(3, 16\); labels"):
        model(input_ids=batch["input_ids"][:2])


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


def test_a_batch_without_a_target_has_no_gradient_and_says_so():
    model, batch = tiny(), chat()
    batch["labels"][:] = IGNORED
    apply_dropbp(model, 0.0, context="inference")
    with pytest.warns(UserWarning, match="no target in a batch"):
        assert not model(**batch).loss.requires_grad
    assert not model(**batch).loss.requires_grad  # and once
    labels = batch.pop("labels")
    handler = DropBPHandler(model, 0.0)
    handler.step(labels=labels)
    assert not model(**batch).logits.requires_grad
    assert not model.model(**batch).last_hidden_state.requires_grad
    handler.step()  # strict: that no gate was called is no mistake
    with pytest.raises(RuntimeError, match="gates were not called"):
        handler.step()  # now it is: there was no batch


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_trainer_goes_on_after_a_batch_without_a_target(tmp_path, num_micro_batches):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dropbp_kernels import DropBPCallback

    class Watch(TrainerCallback):
        weights = ()

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.weights += ([p.detach().clone() for p in model.parameters()],)

    batch = chat(3)
    batch["labels"][1] = IGNORED
    data = [{name: batch[name][index] for name in ("input_ids", "labels")} for index in range(3)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=num_micro_batches,
        logging_steps=1, report_to="none", use_cpu=True, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
    )  # fmt: skip
    model, watch = tiny(dtype=torch.float32), Watch()
    callback = DropBPCallback(0.0, context="inference", rates="sensitivity", calibrate_at=0.0)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback, watch])
    with pytest.warns(UserWarning, match="no target in a batch; its gradient is zero"):
        trainer.train()
    weights = (*watch.weights, [p.detach() for p in model.parameters()])
    moved = [any(map(torch.ne, map(torch.sum, old), map(torch.sum, new))) for old, new in itertools.pairwise(weights)]
    assert sum(moved) in ((4,) if num_micro_batches == 3 else (2, 3))  # of four steps, by the order of the samples
    assert all(torch.isfinite(p).all() for p in model.parameters())
    batch["labels"][:] = IGNORED
    assert not model(**batch).loss.requires_grad  # a loop of one's own asks


def test_saved_bytes_are_those_of_the_target_rows():
    model = tiny(dtype=torch.float32, num_hidden_layers=4)
    tokens = torch.randint(3, 96, (2, 64))
    labels = tokens.clone()
    labels[:, :49] = IGNORED  # 16 of 64 rows are targets
    batch = {"input_ids": tokens, "labels": labels}
    with saved_bytes() as dense:
        model(**batch, use_cache=False)
    apply_dropbp(model, 0.0, context="inference")
    with saved_bytes() as ours:
        model(**batch)
    num_blocks, batch_size, num_heads, head_dim = 4, 2, 4, 8
    context_keys = 2 * batch_size * num_heads * 48 * head_dim * 4  # and values; float32, for every query head
    mask = batch_size * 16 * 64 * 4
    assert ours.num_bytes <= 0.26 * dense.num_bytes + num_blocks * (context_keys + mask)


def test_logits_are_those_of_target_rows():
    model, batch = tiny(), chat()
    exact = model(**batch).logits.detach()
    apply_dropbp(model, 0.0, context="inference")
    logits = model(**batch).logits.detach()
    targets = is_target(batch["labels"])
    torch.testing.assert_close(logits[0, :8], exact[0][targets[0]])
    torch.testing.assert_close(logits[1, :3], exact[1][targets[1]])


def test_evaluation_and_calls_without_labels_are_untouched():
    model, batch = tiny(), chat()
    exact = model(**batch).logits.detach()
    apply_dropbp(model, 0.0, context="inference")
    assert torch.equal(model(input_ids=batch["input_ids"], use_cache=False).logits, exact)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, exact)
    assert torch.equal(model.eval()(**batch).logits, exact)


@pytest.mark.parametrize("is_applied_first", [False, True])
def test_lora(is_applied_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False)
    batch, model = chat(), tiny()
    torch.manual_seed(1)
    expected = backward(peft.get_peft_model(copy.deepcopy(model), config), batch)
    if is_applied_first:
        apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    if not is_applied_first:
        apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), expected, **CLOSE)
    assert model(**batch).logits.shape[1] < 16  # it did run in stages


def test_prompts_that_an_adapter_learns_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny(dtype=torch.float32), config)
    apply_dropbp(model, 0.0, context="inference")
    with pytest.raises(ValueError, match=r"expected the shape of labels, \(3, 16\), got \(3, 18\); prompts that"):
        model(**chat())


@pytest.mark.parametrize(
    ("model_type", "checkpoint"), [("llama", "transformers"), ("gpt2", "transformers"), ("llama", "kept")]
)
def test_checkpointing(model_type, checkpoint):
    batch = chat()
    model = tiny(model_type)
    plain = copy.deepcopy(model)
    apply_dropbp(plain, 0.0, context="inference")
    expected = backward(plain, batch)
    if checkpoint == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        apply_dropbp(model, 0.0, context="inference")
    else:
        apply_dropbp(model, 0.0, context="inference", checkpoint="kept")
    with saved_bytes() as checkpointed:
        model(**batch)
    with saved_bytes() as whole:
        plain(**batch)
    assert checkpointed.num_bytes < 0.7 * whole.num_bytes
    assert_same(backward(model, batch), expected, rtol=0, atol=0)


def test_dropped_branches_too():
    batch, model = chat(), tiny(num_hidden_layers=3)
    expected = copy.deepcopy(model)
    handler = apply_dropbp(expected, 0.5, dropped_runs="detach", context="inference", seed=3)
    handler.step()
    expected = backward(expected, batch)
    handler = apply_dropbp(model, 0.5, context="inference", seed=3)
    handler.step()
    assert_same(backward(model, batch), expected, rtol=0, atol=0)
    handler.step()  # strict: every gate has been called


def test_what_a_hook_saw_can_be_called_again():
    model, batch = tiny(), chat()
    apply_dropbp(model, 0.0, context="inference")
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    first = backward(model, batch)
    assert_same(backward(model, seen[0]), first, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    from dropbp_kernels import DropBPCallback

    batch = chat(4)
    data = [{name: batch[name][index] for name in ("input_ids", "labels")} for index in range(4)]
    losses = []
    for options in ({}, {"context": "inference", "context_gradient": "full"}):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True
        )
        trainer = Trainer(
            tiny(dtype=torch.float32), arguments, train_dataset=data, callbacks=[DropBPCallback(0.0, **options)]
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


def test_fused_norms_too():
    batch, model = chat(), tiny()
    expected = copy.deepcopy(model)
    apply_dropbp(expected, 0.0, context="inference")
    expected = backward(expected, batch)
    apply_dropbp(model, 0.0, context="inference", fused=True)
    assert_same(backward(model, batch), expected, **CLOSE)


def test_removed_without_a_trace():
    model, batch = tiny(), chat()
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    apply_dropbp(model, 0.0, context="inference")
    assert list(model.state_dict()) == keys
    copy.deepcopy(model)
    backward(model, batch)
    remove_dropbp(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("_dropbp") for module in model.modules() for name in vars(module))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("bloom"), "takes no position_ids"),
        (lambda: tiny("falcon", alibi=True), "ALiBi"),
        (lambda: tiny_t5(), "encoder-decoder|expected a causal LM"),
        (lambda: with_attention(tiny(), "flex_attention"), "uses attention 'flex_attention'"),
        (lambda: with_batch_norm(tiny()), "normalises over the batch"),
        (lambda: tiny("gemma3_text", use_bidirectional_attention=True), "attends in both directions"),
        (lambda: tiny("lfm2", layer_types=["conv", "full_attention"]), "has layers with a state of their own"),
        (lambda: tiny().model, "expected a causal LM"),
    ],
)
def test_models_that_cannot_run_in_stages(make, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        apply_dropbp(model, 0.0, context="inference")
    assert [type(module) for module in model.modules()] == classes


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))


def with_attention(model, name):
    model.config._attn_implementation = name
    return model


def with_batch_norm(model):
    model.model.layers[0].mlp.norm = nn.BatchNorm1d(32)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "drop"}, "context: expected None or \"inference\", got 'drop'"),
        ({"context": "inference", "context_gradient": "two"}, "context_gradient: expected one of none, one_hop, full"),
        ({"context": "inference", "context_keep": 1.0}, "context_keep: expected 0 <= context_keep < 1, got 1.0"),
        (
            {"context": "inference", "context_keep": 0.1, "context_gradient": "full"},
            'context_keep: expected 0 with context_gradient="full"',
        ),
        ({"context_keep": 0.1}, 'context: expected "inference" with context_keep=0.1, got None'),
        ({"context_gradient": "full"}, 'context: expected "inference" with context_gradient=full, got None'),
        ({"shared_context": True}, 'context: expected "inference" with shared_context=True, got None'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        apply_dropbp(tiny(), 0.0, **options)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"output_hidden_states": True}, "output_hidden_states: expected False"),
        ({"output_router_logits": True}, "output_router_logits: expected False"),
        ({"attention_mask": torch.ones(3, 1, 16, 16, dtype=torch.bool)}, "attention_mask: expected shape"),
        ({"past_key_values": DynamicCache()}, "past_key_values: expected None with labels and context, got a cache"),
        ({"token_type_ids": torch.ones(3, 16)}, "token_type_ids: expected no further input by token"),
        ({"labels": torch.ones(3, 15, dtype=torch.long)}, r"labels: expected the shape of input_ids, \(3, 16\), got"),
    ],
)
def test_bad_calls(extra, message):
    model = tiny()
    apply_dropbp(model, 0.0, context="inference")
    with pytest.raises(ValueError, match=message):
        model(**{**chat(), **extra})
    backward(model, chat())  # and nothing is left behind


def test_a_step_that_saw_no_labels_is_warned_of_once():
    model = tiny()
    handler = apply_dropbp(model, 0.0, context="inference")
    batch = {name: value for name, value in chat().items() if name != "labels"}
    handler.step()
    model(**batch).logits.sum().backward()
    with pytest.warns(UserWarning, match="context: no labels were seen in a training step"):
        handler.step()
    model(**batch).logits.sum().backward()
    handler.step()  # said once
    model(**chat()).loss.backward()
    handler.step()
