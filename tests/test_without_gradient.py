"""Samples whose loss has no gradient run apart from the others, without autograd."""

import copy

import pytest
import torch
from target_cases import CLOSE, chat, tiny

from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations import target_plans
from dropbp_kernels.integrations.meters import TimeMeter
from dropbp_kernels.integrations.without_gradient import run_apart
from dropbp_kernels.measure import saved_bytes
from dropbp_kernels.targets import IGNORED, TargetRule

WEIGHTS = torch.tensor([0.0, 1.5, 0.0, -1.0])


def batch_of_four():
    """Samples of `chat`, the first of them twice."""
    batch = chat(4)
    batch["labels"][3] = batch["labels"][0]
    batch["labels"][3, 8:] = batch["input_ids"][3, 8:]
    batch["input_ids"][3, :8] = batch["input_ids"][0, :8]
    return batch


def step(model, handler, batch, weights=WEIGHTS, is_told=True):
    """The log-probabilities of a batch's labels, and gradients of their sum with a weight for each sample."""
    model.zero_grad()
    labels = batch["labels"]
    handler.step(labels=labels, without_gradient=weights == 0.0 if is_told else None)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    is_target = labels[:, 1:] != IGNORED
    logps = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * is_target
    (logps.sum(1) * weights).sum().backward()
    return logps.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def spy_on_rows(model):
    """What goes into the first block, in order: (samples, rows, whether autograd records it)."""
    rows = []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args: rows.append((*args[0].shape[:2], torch.is_grad_enabled()))
    )
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context_gradient": "one_hop"},
        {"context_gradient": "full"},
        {"shared_context": True},
        {"fused": True, "checkpoint": "kept"},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_values_and_gradients_are_those_of_the_whole_batch(model_type, options):
    model, batch = tiny(model_type), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference", **options)
    whole = step(model, handler, batch, is_told=False)
    apart = step(model, handler, batch)
    torch.testing.assert_close(apart, whole, **CLOSE)
    assert handler.targets.num_tokens == batch["labels"].numel()


def test_they_run_first_and_autograd_sees_the_others_alone():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    batch["labels"][:, :8] = IGNORED
    batch["labels"][:, 8:] = batch["input_ids"][:, 8:]
    rows = spy_on_rows(model)
    step(model, handler, batch)
    assert rows == [(2, 7, False), (2, 8, False), (2, 7, False), (2, 8, True)]


@pytest.mark.parametrize("context_gradient", ["none", "one_hop", "full"])
def test_they_save_nothing(context_gradient):
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
    labels = batch.pop("labels")
    num_bytes = []
    for samples, is_without in ((slice(None), WEIGHTS == 0.0), ([1, 3], None)):
        handler.step(labels=labels[samples], without_gradient=is_without)
        with saved_bytes() as saved:
            model(**{**batch, "input_ids": batch["input_ids"][samples]})
        num_bytes.append(saved.num_bytes)
    index = 8 * 4  # of joining the logits
    assert 0 < num_bytes[0] - num_bytes[1] <= index


@pytest.mark.parametrize("granularity", ["branch", "sample", "token"])
def test_plans_that_drop_are_drawn_over_the_others(granularity):
    """Of samples that leave nothing out, gradients are those of a batch without the ones apart."""
    model, batch = tiny(), batch_of_four()
    alone = copy.deepcopy(model)
    ours = apply_dropbp(model, 0.5, context="inference", granularity=granularity, seed=3)
    apart = step(model, ours, batch)
    theirs = apply_dropbp(alone, 0.5, context="inference", granularity=granularity, seed=3)
    others = {name: value[[1, 3]] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    expected = step(alone, theirs, others, WEIGHTS[[1, 3]], is_told=False)
    torch.testing.assert_close(apart[0][[1, 3]], expected[0], **CLOSE)
    torch.testing.assert_close(apart[1], expected[1], **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_know_which_context_has_a_gradient():
    """Dynamo does not look at hooks, which make the hop."""
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference", context_gradient="one_hop")
    whole = step(model, handler, batch, is_told=False)
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(step(model, handler, batch), whole, **CLOSE)


@pytest.mark.parametrize("lacks_target", [False, True])
def test_where_all_run_apart_one_token_has_a_gradient_of_zero(lacks_target):
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    if lacks_target:
        batch["labels"][1] = IGNORED
    whole, rows = step(model, handler, batch, torch.zeros(4), is_told=False), spy_on_rows(model)
    apart = step(model, handler, batch, torch.zeros(4))
    torch.testing.assert_close(apart, whole, **CLOSE)
    assert all(gradient.count_nonzero() == 0 for gradient in apart[1].values())
    assert [of_call[:2] for of_call in rows if of_call[2]] == [(1, 1)]
    assert torch.equal(handler.targets.without_gradient, torch.ones(4, dtype=torch.bool))
    handler.step(labels=batch.pop("labels"), without_gradient=torch.ones(4, dtype=torch.bool))
    loss = model(**batch).logits.square().sum()
    with pytest.raises(RuntimeError, match="without_gradient: expected samples whose loss has no gradient"):
        loss.backward()


def test_one_without_a_target_stays_where_it_is():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    batch["labels"][0] = IGNORED
    whole, rows = step(model, handler, batch, is_told=False), spy_on_rows(model)
    torch.testing.assert_close(step(model, handler, batch), whole, **CLOSE)
    assert {samples for samples, _, is_recorded in rows if is_recorded} == {3}


@pytest.mark.filterwarnings("ignore:labels. no target in a batch")
def test_a_batch_without_a_target_is_run_as_before():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=torch.full_like(batch.pop("labels"), IGNORED), without_gradient=WEIGHTS == 0.0)
    rows = spy_on_rows(model)
    assert not model(**batch).logits.requires_grad
    assert rows == [(4, 16, False)]


def test_a_decoder_that_is_called_by_itself():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    results = []
    for is_without in (None, WEIGHTS == 0.0):
        model.zero_grad()
        handler.step(labels=batch["labels"], without_gradient=is_without)
        hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        (hidden * WEIGHTS[:, None, None]).square().sum().backward()
        results.append((hidden.detach(), [parameter.grad for parameter in model.model.parameters()]))
    torch.testing.assert_close(*results, **CLOSE)


def test_what_step_was_told_holds_for_every_call_until_the_next():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(labels=batch.pop("labels"), without_gradient=WEIGHTS == 0.0)
    rows = spy_on_rows(model)
    torch.testing.assert_close(model(**batch).logits, model(**batch).logits)
    half = len(rows) // 2
    assert rows[:half] == rows[half:]


def test_outputs_are_joined_by_samples():
    """Whole numbers too; what has no samples is that of the others."""
    labels = batch_of_four()["labels"]
    rule = TargetRule(labels=labels, without_gradient=WEIGHTS == 0.0)

    def call(module, run, number):
        return torch.tensor(float(len(number))), number * 1.0, number, number.new_ones(3), "text"

    inputs = {"number": torch.arange(4)}
    loss, floats, integers, other, text = run_apart(call, None, None, rule, labels, inputs, [0, 2])
    assert (loss.item(), text, len(other)) == (2.0, "text", 3)
    assert floats.tolist() == integers.tolist() == [0, 1, 2, 3]
    assert integers.dtype == torch.int64
    assert floats.requires_grad


def test_a_loss_that_has_a_gradient_there_is_an_error():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    labels = batch.pop("labels")
    handler.step(labels=labels, without_gradient=WEIGHTS == 0.0)
    loss = model(**batch).logits.square().sum()
    with pytest.raises(RuntimeError, match="without_gradient: expected samples whose loss has no gradient"):
        loss.backward()


def test_a_loss_of_the_model_is_an_error():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    handler.step(without_gradient=WEIGHTS == 0.0)
    with pytest.raises(ValueError, match="without_gradient: expected labels given to step as well, or a model that"):
        model(**batch)
    assert not handler.targets.is_inference
    handler.step()
    model(**batch).loss.backward()


def test_what_cannot_be_taken_apart_is_not(monkeypatch):
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    labels, rows = batch.pop("labels"), spy_on_rows(model)
    is_without = WEIGHTS == 0.0

    def samples_that_run(**inputs):
        handler.step(labels=labels, without_gradient=is_without)
        rows.clear()
        model(**batch, **inputs)
        return {samples for samples, *_ in rows}

    assert samples_that_run() == {2}
    assert samples_that_run(attention_mask=torch.ones_like(labels)) == {2}
    assert samples_that_run(position_ids=torch.arange(16).unsqueeze(0)) == {2}
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    tokens = batch.pop("input_ids")
    assert samples_that_run(inputs_embeds=embeddings) == {2}
    batch["input_ids"] = tokens
    assert samples_that_run(mm_token_type_ids=torch.zeros(2, 16)) == {4}
    monkeypatch.setattr(target_plans.parts_of(model.model), "gathers_weights", True)
    assert samples_that_run() == {4}


def test_bad_input():
    model, batch = tiny(), batch_of_four()
    with pytest.raises(ValueError, match="without_gradient: expected None, since the model was not patched"):
        apply_dropbp(copy.deepcopy(model), 0.5).step(without_gradient=WEIGHTS == 0.0)
    handler = apply_dropbp(model, 0.0, context="inference")
    for wrong, found in ((WEIGHTS, "torch.float32"), ([True], "True"), (torch.ones(2, 2, dtype=torch.bool), "2, 2")):
        with pytest.raises(TypeError, match=f"without_gradient: expected a tensor of bools, one for.*{found}"):
            handler.step(without_gradient=wrong)
    assert handler.num_steps == 0
    handler.step(labels=batch.pop("labels"), without_gradient=WEIGHTS[:3] == 0.0)
    with pytest.raises(ValueError, match=r"expected shape \(4,\), one entry for each sample of the call, got \(3,\)"):
        model(**batch)


def test_evaluation_runs_whole():
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    rows = spy_on_rows(model)
    handler.step(labels=batch.pop("labels"), without_gradient=WEIGHTS == 0.0)
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch)
    assert rows == [(4, 16, False), (4, 16, True)]


def test_their_forward_is_timed_too(monkeypatch):
    model, batch = tiny(), batch_of_four()
    handler = apply_dropbp(model, 0.0, context="inference")
    meter, clock = TimeMeter(model), iter(range(100))
    monkeypatch.setattr(meter, "_now", lambda: float(next(clock)))
    handler.step(labels=batch.pop("labels"), without_gradient=WEIGHTS == 0.0)
    model(**batch)
    meter.end("backward")
    assert meter.totals == {"forward": 2.0, "backward": 1.0, "step": 0.0}
    meter.close()
