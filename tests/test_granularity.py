"""granularity="sample" and "token": gradients of models against detach-after row by row, done by hooks, in float64."""

import itertools
import warnings

import pytest
import torch
from models import encoder_decoder, gradients, step, tiny_batch, toy_model, with_lora
from models import tiny_causal_lm as tiny_llama
from row_cases import BATCH, SEQ, assert_close, check, double, expected_step
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tiny_models import tiny_inputs
from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.integrations.family import Family
from dropbp_kernels.measure import saved_bytes

FAMILIES = ["bert", "bloom", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_neox", "llama", "mixtral", "olmo2", "opt"]


@pytest.mark.parametrize("tokens", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradients_are_those_of_detached_rows(model_type, tokens):
    model = double(model_type)
    # Its router multiplies in float32, which rounds as the number of rows and the CPU will have it.
    tolerance = {"rtol": 1e-5, "atol": 1e-8} if model_type == "deepseek_v3" else {}
    check(model, tiny_inputs(BATCH, SEQ), tokens=tokens, **tolerance)


@pytest.mark.parametrize("tokens", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("name", ["t5", "vit", "whisper"])
def test_encoders_and_cross_attention(name, tokens):
    model, inputs, _ = encoder_decoder(name)
    inputs = {key: torch.cat([value, value[:1].flip(-1)]) for key, value in inputs.items()}  # three samples
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    model = model.double().eval()
    handler = apply_dropbp(model, 0.5, granularity="token" if tokens else "sample", fused_loss="off")
    with torch.no_grad():
        expected_loss = model(**inputs).loss
    handler.step()
    ours = step(model, inputs)
    torch.testing.assert_close(ours[0], expected_loss, rtol=1e-9, atol=1e-12)
    # Which rows each branch kept: encoder and decoder have other numbers of tokens, so they are asked once more.
    gates = list(handler.gates.values())
    hooks = [
        gate.modules_of_branch[-1].register_forward_hook(detach_drawn(handler.plan.kept[place], gate))
        for place, gate in enumerate(gates)
    ]
    for gate in gates:
        gate.kept = True
    expected = step(model, inputs)
    for hook in hooks:
        hook.remove()
    remove_dropbp(model)
    assert_close(ours, expected)


def detach_drawn(entry, gate):
    """As `detach_rows`, for the rows that a drawn plan keeps of the batch that the gate is called with."""

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        rows = entry.rows(gate.batch_of(first), per_token=gate.per_token)
        kept = torch.zeros(len(rows.permutation), dtype=torch.bool)
        kept[rows.permutation[: rows.num_kept]] = True

        def detach(tensor):
            if not isinstance(tensor, Tensor) or tensor.shape[0] != first.shape[0]:
                return tensor
            shape = first.shape[:2] if rows.by_token else first.shape[:1]
            return torch.where(kept.reshape(*shape, *[1] * (tensor.dim() - len(shape))), tensor, tensor.detach())

        return tree_map(detach, output)

    return hook


def test_a_sequence_first_attention_is_refused_and_nothing_is_patched():
    """Its time steps were taken for samples: other values, and no error."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)  # batch_first is False by default
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    named = Family(
        ("TransformerEncoderLayer",), {"attention": ("norm1", "self_attn"), "mlp": ("norm2", "linear1", "linear2")}
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*FLOPs unknown")
        with pytest.raises(
            ValueError, match=r"layers\.0\.gate_attention has an nn\.MultiheadAttention of \(seq, batch"
        ):
            apply_dropbp(model, 0.5, granularity="sample", families=[named])
        assert len(apply_dropbp(model, 0.5, families=[named]).gates) == 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_padding_is_told_to_the_gates_and_never_kept(model_type):
    model = double(model_type)
    inputs = tiny_inputs(BATCH, SEQ)
    is_real = torch.arange(SEQ)[None] < torch.tensor([[6], [2], [4]])
    inputs["labels"] = inputs["labels"].masked_fill(~is_real, -100)
    inputs["attention_mask"] = is_real.long()
    handler = apply_dropbp(model, 0.5, granularity="token", fused_loss="off")
    handler.step()
    ours = step(model, inputs)
    last_modules = [gate.modules_of_branch[-1] for gate in handler.gates.values()]
    masks = []
    for branch, gate in enumerate(handler.gates.values()):
        rows = handler.plan.kept[branch].plan._drawn.rows[0][branch]
        assert (rows.num_kept, rows.num_rows) == ((6, 12) if gate.per_token else (rows.num_kept, 3))
        kept = torch.zeros(len(rows.permutation), dtype=torch.bool)
        kept[rows.permutation[: rows.num_kept]] = True
        assert not gate.per_token or not (kept.reshape(BATCH, SEQ) & ~is_real).any()
        masks.append(kept)
    assert handler.report()["branches"][1]["num_dropped"] == 6
    remove_dropbp(model)
    assert_close(ours, expected_step(model, masks, last_modules, inputs))
    handler = apply_dropbp(model, 0.5, granularity="token", fused_loss="off")
    handler.step()
    handler.report()  # asked for too early, which changes nothing
    step(model, {name: value for name, value in inputs.items() if name != "attention_mask"})
    assert handler.report()["branches"][1]["num_dropped"] == 9  # a mask is of one batch
    if model_type == "opt":  # whose positions are those of a mask of tokens
        return
    step(model, inputs)
    inputs["attention_mask"] = torch.ones(BATCH, 1, SEQ, SEQ, dtype=torch.bool).tril()
    step(model, inputs)
    assert handler.report()["branches"][1]["num_dropped"] == 9 + 6 + 9  # nor is it of one whose mask does not say


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("way", ["kept", "transformers", "reentrant"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_checkpointing_and_lora(model_type, way):
    """The same gradients, also when the next plan is drawn before the backward, and less saved."""
    results = []
    for checkpointing in (False, True):
        model = double(model_type)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = with_lora(model).double()
        model.enable_input_require_grads()
        checkpoint = "kept" if checkpointing and way == "kept" else None
        handler = apply_dropbp(model, 0.5, granularity="token", checkpoint=checkpoint, fused_loss="off", strict=False)
        if checkpointing and way != "kept":
            model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
        handler.step()
        with warnings.catch_warnings(), saved_bytes() as saved:
            warnings.filterwarnings("ignore", "gradient checkpointing: it is reentrant")
            loss = model(**tiny_inputs(BATCH, SEQ)).loss
        handler.step()
        loss.backward()
        results.append(((loss.detach(), gradients(model)), saved.num_bytes))
    assert_close(results[1][0], results[0][0])
    assert way == "reentrant" or results[1][1] < results[0][1]


def test_what_is_saved_is_proportional_to_the_rows_kept():
    """Counted on a stack of Llama layers with LoRA, whose embeddings need a gradient: bytes are c + rows * b."""
    model = with_lora(tiny_llama(attn_implementation="sdpa"))
    handler = apply_dropbp(model, 0.5, granularity="token", fused_loss="off")
    layers = model.get_submodule("base_model.model.model.layers")
    embedded = torch.randn(8, 10, 32, requires_grad=True)
    rope = model.get_submodule("base_model.model.model.rotary_emb")(embedded, torch.arange(10)[None])
    counts = []
    for num_samples in (1, 2, 3, 4):
        samples = torch.arange(8) < num_samples
        handler.set_plan([samples, samples.repeat_interleave(10)] * 3)
        with saved_bytes() as saved:
            x = embedded
            for layer in layers:
                x = layer(x, position_embeddings=rope)
        counts.append(saved.num_bytes)
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert steps[0] == steps[1] == steps[2] > 0
    permutations = 3 * 8 * (8 + 80) * 2  # int64, one for the norm's rows and one for the add's
    assert counts[0] - steps[0] <= permutations + sum(p.nbytes for p in model.parameters() if p.dim() == 2)


def test_grad_scale_scales_the_gradient_of_kept_rows():
    """One branch between the parameters and the loss, so its gradients scale by the factor; both kinds of gates."""
    for make in (lambda: toy_model(1), lambda: torch.nn.Sequential(MyMLP())):
        grads = {}
        for grad_scale in (1.0, "unbiased"):
            torch.manual_seed(0)
            model = make()
            if isinstance(model[0], MyMLP):
                entry = Family(("MyMLP",), {"mlp": ("norm", "up", "down")})
                handler = apply_dropbp(model, 0.75, granularity="sample", grad_scale=grad_scale, families=[entry])
            else:
                handler = DropBPHandler(model, 0.75, granularity="sample", grad_scale=grad_scale)
            handler.step()
            model(torch.ones(4, 3, 8)).sum().backward()
            grads[grad_scale] = [parameter.grad for parameter in model.parameters()]
        for plain, scaled in zip(grads[1.0], grads["unbiased"], strict=True):
            torch.testing.assert_close(scaled, 4 * plain)


class MyMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_the_mean_over_plans_is_the_gradient():
    """Unbiased gates: over all choices of two of four samples that two branches can make for themselves, exactly.

    Not so where both keep the same two.
    """
    model = toy_model(2).double()
    handler = DropBPHandler(model, 0.5, granularity="sample", grad_scale="unbiased", keep_one=False)
    x = torch.randn(4, 3, 8, dtype=torch.float64)

    def gradient(entries):
        handler.set_plan(entries)
        model.zero_grad()
        model(x).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    pairs = [torch.tensor([place in pair for place in range(4)]) for pair in itertools.combinations(range(4), 2)]
    mean = sum(map(gradient, itertools.product(pairs, pairs))) / len(pairs) ** 2
    aligned = sum(gradient([pair, pair]) for pair in pairs) / len(pairs)
    handler.grad_scale = 1.0
    full = gradient([True, True])
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=1e-12)
    assert (aligned - full).norm() > 0.01 * full.norm()


def test_the_backward_does_equal_work_in_every_step():
    """FLOPs of the operators of the backward, counted, at shares that are not whole."""
    model = tiny_llama()
    handler = apply_dropbp(model, 0.5, granularity="token", fused_loss="off")
    counted = set()
    for _ in range(4):
        handler.step()
        loss = model(**tiny_batch(4)).loss
        with FlopCounterMode(display=False) as flops:
            loss.backward()
        counted.add(flops.get_total_flops())
    assert len(counted) == 1


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_report_counts_all_micro_batches(checkpointing):
    """Also where they differ in size, once each where blocks are computed again, and on from a state between two."""
    model = tiny_llama()
    handler = apply_dropbp(model, 0.5, granularity="sample")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})

    def run_step():
        for size in (2, 8, 8):
            model(**tiny_batch(size)).loss.backward()
        with torch.no_grad():
            model(**tiny_batch(4))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradient checkpointing: it is reentrant")
        for _ in range(2):
            handler.step()
            state = handler.state_dict()
            run_step()
        report = handler.report()
        assert [(branch["num_kept"], branch["num_dropped"]) for branch in report["branches"]] == [(18, 18)] * 6
        remove_dropbp(model)
        resumed = apply_dropbp(model, 0.5, granularity="sample")
        resumed.load_state_dict(state)
        run_step()
    assert resumed.report() == report


def test_callback_with_accumulation(tmp_path):
    from trainer_runs import arguments
    from transformers import Trainer

    from dropbp_kernels import DropBPCallback

    tokens = torch.randint(64, (16, 8), generator=torch.Generator().manual_seed(1)).tolist()
    data = [{"input_ids": row, "labels": row, "attention_mask": [1] * 6 + [0] * 2} for row in tokens]
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1}
    callback = DropBPCallback(drop_rate=0.5, granularity="token", aligned=2)
    trainer = Trainer(tiny_llama(), arguments(tmp_path, **settings), train_dataset=data, callbacks=[callback])
    trainer.train()
    report = callback.handler.report()
    assert [branch["num_kept"] for branch in report["branches"]] == [8, 48] * 3  # of four micro-batches
    log = next(entry for entry in trainer.state.log_history if "dropbp_flops_kept" in entry)
    assert log["dropbp_flops_kept"] == pytest.approx(0.5)
    assert log["dropbp_drop_rate"] == pytest.approx(0.5)
