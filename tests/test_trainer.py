"""DropBPCallback in transformers' Trainer: plans, resumes bit for bit, calibration, and what it refuses."""

import copy
import json

import pytest
import ranks
import torch
from models import tiny_causal_lm, toy_model, with_lora

pytest.importorskip("accelerate")

from trainer_runs import NUM_BRANCHES, Watcher, arguments, assert_same, data, train, two_rows, weights
from transformers import Trainer, TrainerCallback

from dropbp_kernels import DropBPCallback, DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import checkpointing
from dropbp_kernels.integrations import trainer as trainer_module
from dropbp_kernels.layer import DropBP

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_plan_for_each_optimizer_step(tmp_path):
    callback = DropBPCallback(0.5, seed=3)
    watcher = Watcher(callback)
    train(tmp_path, callback, callbacks=[watcher], gradient_accumulation_steps=3)
    handler = callback.handler
    assert handler.num_steps == 6
    assert [plan.step for plan in watcher.plans] == [step for step in range(6) for _ in range(3)]
    assert watcher.plans[::3] == [handler.draw(step) for step in range(6)]
    assert watcher.grads == [plan.kept for plan in watcher.plans]


def test_one_plan_for_each_micro_batch(tmp_path):
    callback = DropBPCallback(0.5, plan="micro_batch")
    watcher = Watcher(callback)
    train(tmp_path, callback, callbacks=[watcher], gradient_accumulation_steps=3, max_steps=4)
    handler = callback.handler
    assert handler.num_steps == 12
    assert watcher.plans == [handler.draw(step) for step in range(12)]
    for index, grads in enumerate(watcher.grads):  # what any micro-batch of the step so far has kept
        ran = [watcher.plans[i].kept for i in range(3 * (index // 3), index + 1)]
        assert grads == tuple(map(any, zip(*ran, strict=True)))


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    callback = DropBPCallback(0.5)
    train(tmp_path, callback, gradient_accumulation_steps=5, max_steps=-1, num_train_epochs=2)  # 24 micro-batches
    assert callback.handler.num_steps == 10


@pytest.mark.parametrize("lora", [False, True])
def test_rate_zero_trains_as_without_the_callback(tmp_path, lora):
    wrap = with_lora if lora else (lambda model: model)
    trainer = train(tmp_path / "a", DropBPCallback(0.0, fused=False), wrap(tiny_causal_lm()))
    plain = Trainer(wrap(tiny_causal_lm()), arguments(tmp_path / "b"), train_dataset=data())
    plain.train()
    assert_same(weights(trainer), weights(plain))


@pytest.mark.parametrize(("plan", "restore_callbacks"), [("optimizer_step", True), ("micro_batch", False)])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, plan, restore_callbacks):
    def callback():
        return DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.3, plan=plan, seed=5)

    options = {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "restore_callback_states_from_checkpoint": restore_callbacks,
        "logging_steps": 1,
    }
    whole = train(tmp_path, callback(), with_lora(tiny_causal_lm(attention_dropout=0.1)), **options)
    rates = whole.callback_handler.callbacks[0].handler.drop_rates
    assert len(set(rates)) > 1
    for step in (1, 3):  # before and after calibration
        model = with_lora(tiny_causal_lm(attention_dropout=0.1))
        resumed = train(tmp_path, callback(), model, str(tmp_path / f"checkpoint-{step}"), **options)
        ours = resumed.callback_handler.callbacks[0]
        assert isinstance(ours, DropBPCallback)
        assert ours.handler.state_dict() == whole.callback_handler.callbacks[0].handler.state_dict()
        assert_same(weights(resumed), weights(whole))
        losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
        assert losses == [entry["loss"] for entry in whole.state.log_history if "loss" in entry]


def test_resuming_with_other_settings_or_without_a_state(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, **options)
    with pytest.raises(ValueError, match=r"drop_rate: expected 0\.5, with which the checkpoint was trained, got 0\.25"):
        train(tmp_path, DropBPCallback(0.25), resume=str(tmp_path / "checkpoint-3"), **options)
    with pytest.raises(ValueError, match="seed: expected None, with which"):
        train(tmp_path, DropBPCallback(0.5, seed=1), resume=str(tmp_path / "checkpoint-3"), **options)
    other = DropBPCallback(0.5, measure=True, remove_at_end=True)  # which change no step
    train(tmp_path, other, resume=str(tmp_path / "checkpoint-3"), **options)
    assert other.handler.num_steps == 6
    state_file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["stateful_callbacks"]["DropBPCallback"]
    state_file.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="the checkpoint at step 3 holds no state of it; plans start anew"):
        trainer = train(tmp_path, resume=str(tmp_path / "checkpoint-3"), **options)
    assert trainer.callback_handler.callbacks[0].handler.num_steps == 3


def test_a_schedule_spans_the_training(tmp_path):
    callback = DropBPCallback(0.5, rates="depth_linear", schedule="recovery:0.5", plan="micro_batch")
    watcher = Watcher(callback)
    train(tmp_path, callback, callbacks=[watcher], gradient_accumulation_steps=2)
    assert callback.handler.drop_rates == sorted(set(callback.handler.drop_rates))
    kept = [sum(plan) for plan in watcher.plans]
    assert max(kept[:6]) < NUM_BRANCHES
    assert kept[6:] == [NUM_BRANCHES] * 6
    assert callback.handler.total_steps == 12


def test_a_schedule_that_ends_before_the_training(tmp_path):
    callback = DropBPCallback(0.5, schedule="recovery:0.5", total_steps=4)
    watcher = Watcher(callback)
    train(tmp_path, callback, callbacks=[watcher])
    assert [sum(plan) == NUM_BRANCHES for plan in watcher.plans] == [False] * 2 + [True] * 4


def test_missing_gradients_as_zeros(tmp_path):
    none_missing = []

    class Grads(TrainerCallback):
        """After ours, before the optimizer."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            none_missing.append(all(p.grad is not None for p in model.parameters() if p.requires_grad))

    for mode in ("skip", "zero"):
        train(tmp_path / mode, DropBPCallback(0.5, missing_grad=mode), callbacks=[Grads()], max_steps=2)
    assert none_missing == [False, False, True, True]


def test_rates_from_an_earlier_calibration(tmp_path):
    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.0)
    train(tmp_path / "a", callback, max_steps=1)
    path = str(tmp_path / "calibration.json")
    callback.handler.calibration.save(path)
    again = DropBPCallback(0.5, rates=path)
    train(tmp_path / "b", again, max_steps=1)
    assert again.handler.drop_rates == callback.handler.drop_rates
    assert len(set(again.handler.drop_rates)) > 1


def test_rates_given_to_the_handler_before_training_stay(tmp_path):
    callback = DropBPCallback(0.5)
    trainer = Trainer(tiny_causal_lm(), arguments(tmp_path, max_steps=1), train_dataset=data(4), callbacks=[callback])
    rates = [0.0, 0.25, 0.5, 0.5, 0.75, 0.75]
    callback.handler.set_drop_rates(rates)
    trainer.train()
    assert callback.handler.drop_rates == rates


def test_evaluation_in_the_middle_disturbs_nothing(tmp_path):
    plain = train(tmp_path / "a")
    trainer = train(tmp_path / "b", eval_data=data(4), eval_strategy="steps", eval_steps=1)
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 6
    assert_same(weights(trainer), weights(plain))
    handlers = [t.callback_handler.callbacks[0].handler.state_dict() for t in (trainer, plain)]
    assert handlers[0] == handlers[1]
    assert not any("dropbp_drop_rate" in entry for entry in trainer.state.log_history if "eval_loss" in entry)


@pytest.mark.parametrize("rates", ["uniform", "sensitivity"])
def test_a_second_training_starts_anew(tmp_path, rates):
    callback = DropBPCallback(0.5, rates=rates)
    trainer = train(tmp_path, callback)
    first = callback.handler
    trainer.train()
    assert callback.handler is not first
    assert callback.handler.num_steps == 6
    assert (callback.handler.calibration is None) == (rates == "uniform")
    if rates == "uniform":
        assert callback.handler.state_dict() == first.state_dict()


def test_a_loop_after_the_training_has_every_gradient(tmp_path):
    model = tiny_causal_lm()
    train(tmp_path, DropBPCallback(0.75), model, max_steps=2)
    model(**two_rows()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_calibration_changes_the_rates_and_nothing_else(tmp_path):
    """Up to and in the step that calibrates, weights are those of uniform rates; so are gradients and dropout."""
    seen = {}

    class AtStep(TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                grads = [p.grad for p in model.parameters()]
                training = [module.training for module in model.modules()]
                values = {key: value.clone() for key, value in model.state_dict().items()}
                seen[self.name] = (values, torch.get_rng_state(), training, [g is None for g in grads])

    for name in ("uniform", "sensitivity"):
        callback = DropBPCallback(0.5, rates=name, calibrate_at=0.5)
        model = tiny_causal_lm(attention_dropout=0.1)
        train(tmp_path / name, callback, model, callbacks=[AtStep(name)], gradient_accumulation_steps=2)
        seen[name] += (callback.handler,)
    assert_same(seen["sensitivity"][0], seen["uniform"][0])
    assert torch.equal(seen["sensitivity"][1], seen["uniform"][1])
    assert seen["sensitivity"][2:4] == seen["uniform"][2:4]
    assert seen["uniform"][4].calibration is None
    handler = seen["sensitivity"][4]
    assert len(set(handler.drop_rates)) > 1
    assert all(value > 0 for value in handler.calibration.sensitivities)


def test_sensitivities_are_those_of_the_last_micro_batch(tmp_path):
    batches, models = [], []

    class Batch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                models.append(copy.deepcopy(model))

    model = tiny_causal_lm()
    model.register_forward_pre_hook(lambda m, a, k: batches.append(k), with_kwargs=True)
    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.0)
    train(tmp_path, callback, model, callbacks=[Batch()], gradient_accumulation_steps=2, max_steps=2)
    twin = models[0]
    remove_dropbp(twin)
    twin._forward_pre_hooks.clear()
    handler = apply_dropbp(twin, 0.5)
    handler.calibrate(lambda: twin(**batches[1]).loss)
    assert handler.calibration.sensitivities == callback.handler.calibration.sensitivities


@pytest.mark.parametrize(("reentrant", "method"), [(False, "exact"), (True, "published")])
def test_what_calibration_is_asked_for(tmp_path, monkeypatch, reentrant, method):
    seen = []
    monkeypatch.setattr(checkpointing, "_warn_of_reentrant", lambda: None)
    monkeypatch.setattr(DropBPHandler, "calibrate", lambda handler, loss, **options: seen.append(options))
    monkeypatch.setattr(DropBPHandler, "use_calibration", lambda handler, path, **options: seen.append(options))
    model = tiny_causal_lm()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    wanted = {"definition": "element", "allocation": "variance"}
    train(tmp_path, DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.0, **wanted), model, max_steps=1)
    assert seen == [{**wanted, "method": method}]
    train(tmp_path, DropBPCallback(0.5, rates="x.json", **wanted), tiny_causal_lm(), max_steps=1)
    assert seen[1] == {"allocation": "variance"}


def test_a_model_that_is_called_by_position(tmp_path):
    class ByPosition(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(inputs["input_ids"], labels=inputs["labels"]).loss

    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.0)
    ByPosition(tiny_causal_lm(), arguments(tmp_path, max_steps=1), train_dataset=data(), callbacks=[callback]).train()
    assert callback.handler.calibration is not None


def test_a_loss_that_puts_a_forward_of_its_own_in_place_for_a_while(tmp_path):
    """As losses of sentence-transformers do, whose forward names its inputs otherwise than the model."""

    class Decorated(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            original = model.forward
            model.forward = lambda features, labels=None: original(features, labels=labels)
            try:
                return model(inputs["input_ids"], labels=inputs["labels"]).loss
            finally:
                del model.forward

    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.0)
    Decorated(tiny_causal_lm(), arguments(tmp_path, max_steps=1), train_dataset=data(), callbacks=[callback]).train()
    assert callback.handler.calibration is not None


def test_a_model_without_loss_needs_a_loss_function(tmp_path):
    def loss_of(output, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())

    def run(callback):
        arguments_ = arguments(tmp_path, max_steps=4)
        trainer = Trainer(
            tiny_causal_lm(), arguments_, train_dataset=data(), callbacks=[callback], compute_loss_func=loss_of
        )
        trainer.train()

    run(DropBPCallback(0.5))  # which calibrates nothing
    callback = DropBPCallback(0.5, rates="sensitivity", calibrate_at=0.75)
    with pytest.raises(ValueError, match=r"loss: expected a function .* none in the model's CausalLMOutputWithPast"):
        run(callback)
    assert callback.handler.num_steps == 1  # and not when it is needed, three steps later
    callback = DropBPCallback(
        0.5, rates="sensitivity", loss=lambda model, inputs: model(**inputs).logits.float().logsumexp(-1).mean()
    )
    run(callback)
    assert callback.handler.calibration is not None


@pytest.mark.parametrize("remove_at_end", [False, True])
def test_the_patch_stays_or_goes(tmp_path, remove_at_end):
    model = tiny_causal_lm()
    classes = [type(module) for module in model.modules()]
    callback = DropBPCallback(0.5, remove_at_end=remove_at_end)
    train(tmp_path, callback, model, max_steps=2)
    assert ([type(module) for module in model.modules()] == classes) == remove_at_end
    assert callback.handler.report()["num_steps"] == 2
    assert not model._forward_pre_hooks


def test_a_model_made_for_each_training(tmp_path):
    callback = DropBPCallback(0.5)
    options = arguments(tmp_path, max_steps=2)
    trainer = Trainer(None, options, train_dataset=data(), model_init=lambda: tiny_causal_lm(), callbacks=[callback])
    for _ in range(2):
        trainer.train()
        assert callback.handler.model is trainer.model
        assert callback.handler.num_steps == 2


def test_a_callback_that_is_added_later(tmp_path):
    trainer = Trainer(tiny_causal_lm(), arguments(tmp_path, save_strategy="steps", save_steps=6), train_dataset=data())
    callback = DropBPCallback(0.5)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.handler.num_steps == 6
    assert trainer.callback_handler.callbacks[0] is callback
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["DropBPCallback"]["attributes"]["saved_state"]["num_steps"] == 6


class OwnModel(torch.nn.Module):
    """Gates of its own, and nothing of transformers."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 8)
        self.blocks = toy_model()

    def forward(self, input_ids, labels=None):
        logits = self.blocks(self.embedding(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 8), "logits": logits}


def test_a_model_with_gates_of_its_own(tmp_path):
    model = OwnModel()
    callback = DropBPCallback(0.5, rates="sensitivity", grad_scale="unbiased", remove_at_end=True)
    train(tmp_path, callback, model)
    assert callback.handler.grad_scale == "unbiased"
    assert len(set(callback.handler.drop_rates)) > 1
    assert sum(isinstance(module, DropBP) for module in model.modules()) == 4


@pytest.mark.slow
def test_ranks_of_ddp_draw_the_same_plans_and_stay_alike(tmp_path):
    import ddp_trainer

    with ranks.started("ddp_trainer.py", tmp_path):
        alone = ddp_trainer.run("uniform", 4)  # meanwhile, in one process: the same rows in each step
    first, second = ranks.results_in(tmp_path)
    for name in ddp_trainer.RUNS:
        assert first[name]["handler"] == second[name]["handler"]
        assert_same(first[name]["weights"], second[name]["weights"])
    assert len(set(first["sensitivity"]["handler"]["drop_rates"])) > 1
    assert first["uniform"]["handler"] == alone["handler"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["uniform"]["weights"][name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("option", "checkpointing"), [(False, False), (None, True)])
def test_ddp_that_does_not_look_for_unused_parameters_is_refused(option, checkpointing):
    from types import SimpleNamespace

    model = tiny_causal_lm()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mode = SimpleNamespace(value="distributed")
    args = SimpleNamespace(
        parallel_mode=mode, deepspeed_plugin=None, ddp_find_unused_parameters=option, torch_compile=False
    )
    with pytest.raises(ValueError, match="ddp_find_unused_parameters: expected True"):
        trainer_module._check_parallel(args, model, 0.5)
    trainer_module._check_parallel(args, model, 0.0)  # as of a target plan alone: nothing is without a gradient
    args.ddp_find_unused_parameters = True
    trainer_module._check_parallel(args, model, 0.5)


@pytest.mark.parametrize("wrapped_by", ["PEFT", "FSDP2", "DeepSpeed", "tensor parallel"])
def test_what_ddp_finds_by_itself_or_what_is_no_ddp_is_not_refused(wrapped_by):
    """accelerate's launcher asks for FSDP and DeepSpeed past TrainingArguments."""
    from types import SimpleNamespace

    model = tiny_causal_lm()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if wrapped_by == "PEFT":
        model = with_lora(model)
    if wrapped_by == "tensor parallel":
        model._tp_size = 2
    if wrapped_by == "FSDP2":
        block = model.model.layers[0]
        block.__class__ = type("FSDPLlamaDecoderLayer", (type("FSDPModule", (), {}), type(block)), {})
    args = SimpleNamespace(
        parallel_mode=SimpleNamespace(value="distributed"),
        fsdp=None,
        deepspeed=None,
        deepspeed_plugin=object() if wrapped_by == "DeepSpeed" else None,
        ddp_find_unused_parameters=None,
        torch_compile=False,
    )
    trainer_module._check_parallel(args, model, 0.5)


def test_replicas_are_refused():
    from types import SimpleNamespace

    args = SimpleNamespace(parallel_mode=SimpleNamespace(value="not_distributed"), n_gpu=2)
    with pytest.raises(ValueError, match=r"n_gpu: expected one GPU in a process, got 2, .* torchrun"):
        trainer_module._check_parallel(args, tiny_causal_lm(), 0.5)


def test_compiling_the_whole_model_is_warned_of():
    from types import SimpleNamespace

    args = SimpleNamespace(parallel_mode=SimpleNamespace(value="not_parallel"), torch_compile=True)
    with pytest.warns(UserWarning, match="torch_compile: .* block by block"):
        trainer_module._check_parallel(args, tiny_causal_lm(), 0.5)


def test_a_misspelt_option_is_named_at_once():
    with pytest.raises(TypeError, match=r"samplr: expected an option of apply_dropbp .*; did you mean sampler\?"):
        DropBPCallback(0.5, samplr="cyclic")
    with pytest.raises(TypeError, match=r"model: expected an option"):
        DropBPCallback(0.5, model=None)


def test_a_model_that_cannot_be_patched(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got none; module types found: Linear"):
        Trainer(model, arguments(tmp_path), train_dataset=data(), callbacks=[DropBPCallback(0.5)])
    model = tiny_causal_lm()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="sampler"):
        train(tmp_path, DropBPCallback(0.5, sampler="fair"), model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_rate": 1.0}, "drop_rate: expected 0 <= drop_rate < 1, got 1"),
        ({"drop_rate": 0.5, "calibrate_at": 1.0}, "calibrate_at: expected 0 <= calibrate_at < 1, got 1"),
        ({"drop_rate": 0.5, "rates": "best"}, "rates: expected one of uniform, depth_linear, sensitivity, got 'best'"),
        ({"drop_rate": 0.5, "plan": "epoch"}, "plan: expected one of optimizer_step, micro_batch, got 'epoch'"),
        ({"drop_rate": 0.5, "definition": "max"}, "definition: expected one of norm, element, got 'max'"),
        ({"drop_rate": 0.5, "allocation": "even"}, "allocation: expected one of published, .*, got 'even'"),
        ({"drop_rate": 0.5, "missing_grad": "none"}, "missing_grad: expected one of skip, zero, got 'none'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        DropBPCallback(**options)


def test_a_function_cannot_be_restored_by_the_trainer(tmp_path):
    def sampler(rates, flops, seed, step):
        return (True,) * len(rates)

    for name in ("sampler", "loss"):
        with pytest.raises(ValueError, match=f"restore_callback_states_from_checkpoint: expected False, since {name}"):
            train(tmp_path, DropBPCallback(0.5, **{name: sampler}), restore_callback_states_from_checkpoint=True)
    train(tmp_path, DropBPCallback(0.5, sampler=sampler), save_strategy="steps", save_steps=3)
