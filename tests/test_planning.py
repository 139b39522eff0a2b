"""What a step would take, against steps that were taken: peaks counted on small models, FLOPs, weights."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from models import tiny_causal_lm
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, MambaConfig, Qwen3Config, T5Config

from dropbp_kernels import apply_dropbp
from dropbp_kernels.cli.errors import UserError
from dropbp_kernels.cli.planning import IN_FOUR_BITS, Setting, StepModel, worst_plans
from dropbp_kernels.measure import PeakLiveBytes

BATCH_SIZE, SEQ_LEN = 2, 96
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CHECKPOINTS = ("none", "block", "kept")


def config(config_class=LlamaConfig, num_layers=6, **more):
    return config_class(**SIZES, num_hidden_layers=num_layers, **more)


def real_model(adapter, **more):
    """The model of `config` with weights, as a user would make it."""
    model = tiny_causal_lm(**{**SIZES, "num_hidden_layers": 6}, dtype=None, **more).to(torch.bfloat16)
    if adapter == "full":
        return model.train()
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def patched(model, drop_rate, checkpoint):
    if checkpoint == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return apply_dropbp(model, drop_rate, checkpoint="kept" if checkpoint == "kept" else None)


def live_bytes(predicted):
    """What is allocated in the step itself."""
    return sum(n for tag, n in predicted.by_tag.items() if tag not in ("weights", "optimizer"))


def measured(model, context):
    tokens = torch.arange(BATCH_SIZE * SEQ_LEN).reshape(BATCH_SIZE, SEQ_LEN) % 256
    with context:
        model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()
    return context


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("drop_rate", [0.0, 0.75])
def test_prediction_is_within_five_percent_of_measured(adapter, checkpoint, drop_rate):
    predicted = StepModel(config(), adapter).predict(Setting(BATCH_SIZE, SEQ_LEN, drop_rate, checkpoint))
    model = real_model(adapter)
    handler = patched(model, drop_rate, checkpoint)
    live = live_bytes(predicted)
    peaks = []
    for _ in range(3 if drop_rate else 1):  # without dropping all plans are one
        handler.step()
        peaks.append(measured(model, PeakLiveBytes()).peak_bytes)
    assert abs(live - max(peaks)) <= 0.05 * max(peaks)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_bytes_and_flops_are_exact_for_the_plan_it_assumes(checkpoint):
    model = real_model("lora")
    (plan,) = worst_plans([2] * 6, 0.5)
    assert plan == [(True, True)] * 3 + [(False, False)] * 3
    predicted = StepModel(config()).predict(Setting(BATCH_SIZE, SEQ_LEN, 0.5, checkpoint))
    handler = patched(model, 0.5, checkpoint)
    handler.set_plan([entry for block in plan for entry in block])
    peak = measured(model, PeakLiveBytes()).peak_bytes
    assert peak <= live_bytes(predicted) <= peak + SEQ_LEN * 8  # a mask that real values show to be needless
    if checkpoint == "none":
        counted = measured(model, FlopCounterMode(display=False)).get_flop_counts()["Global"]
        core = 4 * BATCH_SIZE * SEQ_LEN**2 * SIZES["hidden_size"]
        # The CPU's flash attention is in the counts of torch 2.15, not in those of 2.13.
        linear = sum(flops for op, flops in counted.items() if "flash_attention_for_cpu" not in str(op))
        assert predicted.forward_flops + predicted.backward_flops == linear + core * (6 + 3 * 2.5)


@pytest.mark.parametrize(
    ("adapter", "checkpoint", "drop_rate"),
    [
        ("lora", "none", 0.0),
        ("lora", "kept", 0.65),
        ("lora", "block", 0.8),
        ("qlora", "none", 0.65),
        ("qpaca", "kept", 0.65),
        ("full", "none", 0.8),
        ("full", "block", 0.65),
    ],
)
def test_few_blocks_stand_for_all_exactly(adapter, checkpoint, drop_rate):
    """Of seven blocks with all branches kept, one that stands for five; of the dropped ones, one for two or three."""
    setting = Setting(1, 64, drop_rate, checkpoint)
    few = StepModel(config(num_layers=7), adapter)
    every = StepModel(config(num_layers=7), adapter, cut=False)
    assert few.cut
    assert not every.cut
    assert few.predict(setting) == every.predict(setting)


def test_blocks_that_differ_are_all_simulated():
    kinds = ["full_attention", "sliding_attention"] * 2
    model = StepModel(config(Qwen3Config, 4, head_dim=16, layer_types=kinds, use_sliding_window=True, sliding_window=8))
    assert not model.cut
    assert model.predict(Setting(1, 32, 0.5)).peak_bytes > 0


def test_worst_plans_keep_as_many_as_the_sampler_ever_keeps():
    assert worst_plans([2] * 8, 0.75) == [[(True, True)] * 2 + [(False, False)] * 6]
    uneven = [[(True, True), (True, False)], [(True, True), (False, True)]]  # 1.5 of each kind: 3 in all
    assert [plan[:2] for plan in worst_plans([2] * 6, 0.75)] == uneven
    assert [sum(map(sum, plan)) for plan in worst_plans([2] * 10, 0.99)] == [1, 1]  # 0.1 of each kind: 1 in all
    assert worst_plans([1] * 4, 0.0) == [[(True,)] * 4]


def test_weights_gradients_and_optimizer_states_are_counted():
    lora = StepModel(config())
    width, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 2
    frozen = 2 * SIZES["vocab_size"] * width + width
    frozen += 6 * (2 * width + 2 * width * width + 2 * width * kv + 3 * width * inner)
    trained = 6 * 8 * (2 * (width + width) + 2 * (width + kv) + 3 * (width + inner))
    assert lora.num_parameters == frozen + trained
    assert lora.num_trained == trained
    rope = 2 * 4 * (width // 4 // 2)  # inverse wavelengths, float32, and a copy as they were at first
    assert lora.weight_bytes == 2 * frozen + 4 * trained + rope
    assert lora.optimizer_bytes == 2 * 4 * trained
    assert StepModel(config(), optimizer="adamw8bit").optimizer_bytes == 2 * trained
    assert StepModel(config(), optimizer="sgd").optimizer_bytes == 0

    setting = Setting(1, 64, 0.5)
    accumulating = StepModel(config(), accumulation=True).predict(setting)
    assert accumulating.by_tag["gradients"] == 4 * trained
    assert accumulating.peak_bytes == pytest.approx(lora.predict(setting).peak_bytes + 4 * trained, rel=0.05)


@pytest.mark.parametrize(("adapter", "packed"), IN_FOUR_BITS.items())
def test_four_bit_base_takes_less_and_unpacks_one_weight_at_a_time(adapter, packed):
    setting = Setting(1, 64, 0.5)
    dense, in_four_bits = StepModel(config(), adapter), StepModel(config(), packed)
    linears = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert dense.weight_bytes - in_four_bits.weight_bytes == pytest.approx(linears * (2 - 0.5 - 1 / 64), rel=1e-3)
    assert dense.num_trained == in_four_bits.num_trained
    extra = live_bytes(in_four_bits.predict(setting)) - live_bytes(dense.predict(setting))
    assert 0 <= extra <= 2 * 64 * 160
    assert in_four_bits.predict(setting).flops == dense.predict(setting).flops


def test_detaching_afterwards_needs_more_where_a_cache_holds_the_graph():
    """With use_cache on, as configs have it, keys and values outlive their branch, and their graph with them."""
    ours = Setting(1, 256, 0.75)
    detached = dataclasses.replace(ours, dropped_runs="detach")
    cached = StepModel(config(num_layers=12), use_cache=True)
    plain = StepModel(config(num_layers=12))
    assert live_bytes(cached.predict(detached)) > 1.3 * live_bytes(cached.predict(ours))
    assert live_bytes(cached.predict(ours)) > live_bytes(plain.predict(ours))


def test_model_is_left_as_it_was():
    model = StepModel(config())
    setting = Setting(1, 64, 0.5, "block")
    first = model.predict(setting)
    model._predicted.clear()
    model.predict(Setting(1, 64, 0.875, "kept"))
    assert model.predict(setting) == first
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_what_cannot_be_planned_is_a_sentence():
    with pytest.raises(UserError, match="--model: model: expected"):
        StepModel(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1), "full")
    with pytest.raises(UserError, match="transformers cannot build a causal LM"):
        StepModel(T5Config(vocab_size=50, d_model=32))


def test_model_gated_by_its_modules_can_be_planned():
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 9, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    setting = Setting(1, 64, 0.6)
    few, every = (StepModel(GPT2Config(**sizes), cut=cut) for cut in (True, False))
    assert few.cut
    assert few.predict(setting) == every.predict(setting)


@pytest.mark.parametrize(("checkpoint", "drop_rate"), [("kept", 0.0), ("block", 0.65), ("none", 0.65)])
def test_few_blocks_stand_for_all_under_a_target_plan(checkpoint, drop_rate):
    """With 640 tokens of which 48 are targets, context runs in slices: each leaves its keys to the stages behind it."""
    setting = Setting(1, 640, drop_rate, checkpoint, target_share=0.075)
    few, every = (StepModel(config(num_layers=7), cut=cut).predict(setting) for cut in (True, False))
    assert few == every


def test_a_target_plan_takes_less():
    model = StepModel(config(num_layers=2))
    few, dense = (model.predict(Setting(1, 640, 0.0, target_share=share)) for share in (0.075, None))
    assert live_bytes(few) < live_bytes(dense)
    assert few.backward_flops < 0.15 * dense.backward_flops


@pytest.mark.parametrize("checkpoint", ["none", "kept"])
def test_a_target_plan_is_predicted_within_five_percent(checkpoint):
    predicted = StepModel(config()).predict(Setting(BATCH_SIZE, SEQ_LEN, 0.0, checkpoint, target_share=0.25))
    model = real_model("lora")
    apply_dropbp(model, 0.0, context="inference", checkpoint="kept" if checkpoint == "kept" else None)
    tokens = torch.arange(BATCH_SIZE * SEQ_LEN).reshape(BATCH_SIZE, SEQ_LEN) % 256
    labels = tokens.clone()
    labels[:, : -SEQ_LEN // 4] = -100
    with PeakLiveBytes() as live:
        model(input_ids=tokens, labels=labels).loss.backward()
    assert live_bytes(predicted) == pytest.approx(live.peak_bytes, rel=0.05)


def test_a_target_share_of_one_is_no_plan():
    few = StepModel(config())
    whole, dense = (few.predict(Setting(1, 64, 0.0, target_share=share)) for share in (1.0, None))
    assert (whole.by_tag, whole.flops) == (dense.by_tag, dense.flops)


def test_a_setting_leaves_nothing_to_the_next():
    model = StepModel(config(num_layers=2))
    before = model.predict(Setting(1, 32, 0.0))
    model.predict(Setting(1, 32, 0.0, "block"))
    model._predicted.clear()
    assert model.predict(Setting(1, 32, 0.0)) == before
