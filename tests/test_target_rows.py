"""Plans by rows on target plans, against dense models whose context keys and dropped rows are cut off by hand."""

import copy
import itertools
import warnings

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, chat, cut_inputs, is_target, runs_again, tiny
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dropbp_kernels import DropBP, apply_dropbp
from dropbp_kernels.integrations import fusing
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.targets import IGNORED, plan_targets

pytestmark = pytest.mark.usefixtures("turns_apart")


def padded(side):
    """Samples of 16, 11 and 7 tokens, each a prompt and a completion, and one without a target."""
    batch = chat(4)
    real = torch.arange(16) < torch.tensor([[16], [11], [7], [9]])
    labels = batch["input_ids"].masked_fill(~real, IGNORED)
    labels[:, :4] = labels[3] = IGNORED
    if side == "left":
        real, labels = real.flip(1), labels.flip(1)
        labels[:, 1:][~real[:, :-1]] = IGNORED
    return {**batch, "labels": labels, "attention_mask": real.long()}


def packed():
    batch = {name: value[:3] if isinstance(value, Tensor) else value for name, value in chat().items()}
    batch["labels"][0, :12] = IGNORED  # its first document has no target
    batch["labels"][1, 3:5] = batch["input_ids"][1, 3:5]
    return {**batch, "position_ids": torch.cat([torch.arange(9), torch.arange(7)]).expand(3, 16)}


BATCHES = {"turns": chat, "right": lambda: padded("right"), "left": lambda: padded("left"), "packed": packed}
# Multi-head, grouped-query, sliding window in every layer and in some, a norm of two branches, experts.
FAMILIES = {
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "phi": {},
    "mixtral": {"experts_implementation": "eager"},  # the other one has no float64
}


def family(name, **overrides):
    return tiny(name, attn_implementation="sdpa", **FAMILIES[name], **overrides)


def kept_places(handler, branch):
    """Which of the batch's tokens a branch kept, bool (B, S), by what was drawn; no padding among them."""
    drawn = handler.plan.kept[branch].plan._drawn
    staged = drawn.batch.staged
    kept = torch.zeros(len(staged.stages[0].rows), staged.seq_len, dtype=torch.bool)
    for stage, of_branch in zip(staged.stages, drawn.rows, strict=True):
        rows = of_branch[branch]
        assert sorted(rows.permutation.tolist()) == list(range(len(rows.permutation)))
        chosen = torch.zeros(len(rows.permutation), dtype=torch.bool)
        chosen[rows.permutation[: rows.num_kept]] = True
        here = chosen.view_as(stage.rows) if rows.by_token else chosen[:, None].expand_as(stage.rows)
        assert rows.num_rows == (stage.is_row.sum() if rows.by_token else stage.is_row.any(1).sum())
        assert not (here & ~stage.is_row).any() if rows.by_token else stage.is_row[chosen].any(1).all()
        for sample in range(len(kept)):
            kept[sample, stage.rows[sample][here[sample] & stage.is_row[sample]]] = True
    return kept


def detach_rows(kept):
    """A forward hook that detaches a branch's output where a token is not kept."""
    return lambda module, args, output: tree_map_only(
        Tensor, lambda x: torch.where(kept[..., None], x, x.detach()) if x.shape[:2] == kept.shape else x, output
    )


def with_rows_cut(model, handler, ours):
    """A copy of the unpatched `model` in which dropped rows of every branch are cut off."""
    names = [
        next(name for name, module in handler.model.named_modules() if module is gate.modules_of_branch[-1])
        for gate in handler.gates.values()
    ]
    for branch, name in enumerate(names):
        model.get_submodule(name).register_forward_hook(detach_rows(kept_places(handler, branch)))
    return backward(model, ours)


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_targets_keep_their_gradient(name, granularity, cut_attention):
    model, batch = family(name), chat(6)
    batch["labels"][3, :5] = IGNORED
    dense = cut_attention(copy.deepcopy(model), is_target(batch["labels"]))
    handler = apply_dropbp(model, 0.5, granularity=granularity, context="inference")
    handler.step()
    ours = backward(model, batch)
    assert_same(ours, with_rows_cut(dense, handler, batch), **CLOSE)
    shares = [
        branch["num_kept"] / (branch["num_kept"] + branch["num_dropped"]) for branch in handler.report()["branches"]
    ]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in shares)
    handler.step()
    with pytest.raises(AssertionError):
        assert_same(backward(model, batch), ours, **CLOSE)  # other rows


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_padded_packed_and_several_turns(batch, name, cut_attention):
    model, batch = family(name), batch()
    dense = cut_attention(copy.deepcopy(model), is_target(batch["labels"]))
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", seed=2)
    handler.step()
    assert_same(backward(model, batch), with_rows_cut(dense, handler, batch), **CLOSE)


@pytest.mark.parametrize(
    "options", [{"context_gradient": "one_hop"}, {"context_gradient": "full"}, {"context_keep": 0.4}]
)
def test_what_context_contributes(options, cut_attention):
    model, batch = family("llama"), chat()
    targets = is_target(batch["labels"])
    dense = copy.deepcopy(model)
    if "context_keep" in options:
        dense = cut_attention(dense, targets | runs_again(batch["labels"], **options, seed=0, step=0))
    elif options["context_gradient"] == "one_hop":
        dense = cut_inputs(dense, targets)
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", **options)
    handler.step()
    assert_same(backward(model, batch), with_rows_cut(dense, handler, batch), **CLOSE)
    kept = kept_places(handler, 1)  # tokens of an MLP
    assert (kept & ~targets).any() == (options != {"context_gradient": "one_hop"})


def test_rows_of_targets_that_are_drawn(cut_attention):
    """Of a stage whose targets ran before, with the context, once."""
    model, batch = family("llama"), chat()
    left = plan_targets(batch["labels"], target_keep=0.6).shift_labels
    labels = torch.nn.functional.pad(left[:, :-1], (1, 0), value=IGNORED)
    dense = cut_attention(copy.deepcopy(model), is_target(labels))
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", target_keep=0.6)
    handler.step()
    assert_same(backward(model, batch), with_rows_cut(dense, handler, {**batch, "labels": labels}), **CLOSE)


def test_a_sample_is_kept_in_all_its_turns_and_one_without_a_target_in_none():
    model, batch = family("llama"), padded("right")
    batch["labels"][2, 5] = IGNORED  # a turn before and one behind
    handler = apply_dropbp(model, 0.5, granularity="sample", context="inference")
    targets = is_target(batch["labels"])
    for _ in range(4):
        handler.step()
        backward(model, batch)
        rows = handler.plan.kept[0].plan._drawn
        assert len(rows.rows) == 2
        assert {count for _, count in rows.counts} == {3}  # of four samples
        for branch in range(4):
            kept = kept_places(handler, branch) & targets
            assert torch.equal(kept, targets & kept.any(1, keepdim=True))
            assert not kept[3].any()


@pytest.mark.parametrize("way", ["kept", "transformers"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing(name, way):
    """The same gradients, also when the next plan is drawn before the backward, and less saved."""
    results = []
    for is_checkpointed in (False, True):
        model = family(name)
        if is_checkpointed and way == "transformers":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpoint = "kept" if is_checkpointed and way == "kept" else None
        handler = apply_dropbp(
            model, 0.5, granularity="token", context="inference", checkpoint=checkpoint, strict=False
        )
        handler.step()
        with saved_bytes() as saved:
            loss = model(**chat()).loss
        handler.step()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}, saved.num_bytes))
    assert_same(results[1][:2], results[0][:2], rtol=0, atol=0)
    assert results[1][2] < 0.8 * results[0][2]


def test_blocks_that_run_again_as_a_whole_see_the_rows_of_their_stage(monkeypatch):
    """So do those of which a branch consists of several linears."""
    monkeypatch.setattr(DropBP, "is_checkpointable", property(lambda gate: False))
    model, results = family("llama"), []
    for is_checkpointed in (False, True):
        copied = copy.deepcopy(model)
        if is_checkpointed:
            copied.gradient_checkpointing_enable({"use_reentrant": False})
        handler = apply_dropbp(copied, 0.5, granularity="token", context="inference", strict=False)
        handler.step()
        loss = copied(**chat()).loss
        handler.step()
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in copied.named_parameters()}))
    assert_same(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"fused": True}, {"aligned": True}, {"grad_scale": "unbiased"}])
def test_options_of_both(options, cut_attention):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    batch, dense = chat(), family("llama")
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(dense), config).double()
    torch.manual_seed(1)
    dense = peft.get_peft_model(cut_attention(dense, is_target(batch["labels"])), config).double()
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", **options)
    handler.step()
    ours = backward(model, batch)
    if "grad_scale" not in options:
        assert_same(ours, with_rows_cut(dense, handler, batch), rtol=1e-4, atol=1e-6)
        return
    for name, grad in ours[1].items():  # of the last branch, between which and the loss no other one stands
        if "layers.1.mlp.down_proj" in name:
            plain = with_rows_cut(dense, handler, batch)[1][name]
            torch.testing.assert_close(grad, 2.0 * plain, **CLOSE)


def test_a_shared_context_serves_the_samples_that_are_kept(cut_attention):
    batch = chat(4)
    batch["input_ids"][1::2, :7] = batch["input_ids"][::2, :7]
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(16) < 8, IGNORED)
    results = []
    for shared_context in (False, True):
        model = family("llama")
        handler = apply_dropbp(model, 0.5, granularity="token", context="inference", shared_context=shared_context)
        handler.step()
        results.append(backward(model, batch))
    assert_same(results[1], results[0], **CLOSE)
    with pytest.raises(
        ValueError, match='granularity: expected "branch" with shared_context and context_gradient="full"'
    ):
        apply_dropbp(
            family("llama"),
            0.5,
            granularity="sample",
            context="inference",
            context_gradient="full",
            shared_context=True,
        )


def test_saved_bytes_are_those_of_the_kept_target_rows():
    """Counted: every kept sample, and every kept token, costs the same, however many dropped rows there are."""
    model = tiny(dtype=torch.float32, attn_implementation="sdpa")
    batch = chat(6)
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(16) < 12, IGNORED)
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", fused_loss="chunked")

    def saved(num_samples, num_tokens):
        samples = torch.arange(6) < num_samples
        tokens = (torch.arange(16) >= 11).repeat(6) & (torch.arange(96) < num_tokens * 16)
        handler.set_plan([samples, tokens] * 2)
        with saved_bytes() as counted:
            model(**batch)
        return counted.num_bytes

    counts = [saved(number, number) for number in (1, 2, 3, 4)]
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert steps[0] == steps[1] == steps[2] > 0
    handler.set_plan([True] * 4)
    with saved_bytes() as whole:
        model(**batch)
    assert counts[2] < 0.6 * whole.num_bytes


def test_rows_by_hand_are_those_of_the_batch(cut_attention):
    model, batch = family("llama"), chat()
    dense = cut_attention(copy.deepcopy(model), is_target(batch["labels"]))
    handler = apply_dropbp(model, 0.5, context="inference")
    generator = torch.Generator().manual_seed(3)
    masks = [torch.rand(shape, generator=generator) < 0.5 for shape in (3, 48) * 2]
    handler.set_plan(masks)
    for gate, mask in zip(handler.gates.values(), masks, strict=True):
        name = next(name for name, module in model.named_modules() if module is gate.modules_of_branch[-1])
        kept = mask.view(3, -1).expand(3, 16)
        dense.get_submodule(name).register_forward_hook(detach_rows(kept))
    assert_same(backward(model, batch), backward(dense, batch), **CLOSE)
    handler.set_plan([torch.ones(4, dtype=torch.bool)] * 4)
    with pytest.raises(ValueError, match="expected as many rows as the batch has, 3 samples, got 4"):
        model(**batch)


def test_one_sample_with_targets_is_no_share():
    model, batch = family("llama"), chat()
    batch["labels"][1:] = IGNORED
    handler = apply_dropbp(model, 0.5, granularity="sample", context="inference")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "granularity: a batch of one sample")
        for _ in range(3):
            handler.step()
            backward(model, batch)
    kept = [branch["num_kept"] for branch in handler.report()["branches"]]
    assert sum(kept) == 6  # two of four branches in each step
    assert [branch["num_kept"] + branch["num_dropped"] for branch in handler.report()["branches"]] == [3] * 4


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_in_the_trainer(tmp_path):
    from trainer_runs import arguments
    from transformers import Trainer

    from dropbp_kernels import DropBPCallback

    batch = chat(8)
    data = [{name: batch[name][index] for name in ("input_ids", "labels")} for index in range(8)]
    settings = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, logging_steps=1)
    callback = DropBPCallback(0.5, granularity="token", context="inference")
    trainer = Trainer(tiny(dtype=torch.float32), settings, train_dataset=data, callbacks=[callback])
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "dropbp_flops_kept" in entry)
    assert log["dropbp_flops_kept"] == pytest.approx(0.5, abs=0.05)


def test_norms_that_read_permuted_rows_of_a_stage(monkeypatch):
    """In float32, where a compiled kernel serves them; padding is behind the rows that run."""
    model, results = tiny(dtype=torch.float32), []
    handler = apply_dropbp(model, 0.5, granularity="token", context="inference", strict=False)
    for has_kernel in (True, False):
        monkeypatch.setattr(fusing, "has_kernel", lambda *_, has_kernel=has_kernel: has_kernel)
        handler.num_steps = 0
        handler.step()
        results.append(backward(model, chat()))
    assert_same(*results, rtol=1e-4, atol=1e-6)
