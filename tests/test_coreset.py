"""CoresetSelector: features against autograd, picks against a plain greedy, and what scoring leaves as it was."""

import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_causal_lm, tiny_gpt2, with_lora
from torch import Tensor, nn

pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification

from dropbp_kernels import apply_dropbp
from dropbp_kernels.coreset import CoresetSelector
from dropbp_kernels.coreset.budgets import plan_budgets
from dropbp_kernels.coreset.moments import AdamMoments
from dropbp_kernels.coreset.projection import find_projection
from dropbp_kernels.coreset.scoring import Scorer, causal_lm_losses
from dropbp_kernels.measure import saved_bytes

SOURCES = [0] * 3 + [1] * 6 + [2] * 7
pytestmark = pytest.mark.usefixtures("one_thread")


def ragged_batch(size=16, width=12):
    """Rows of different lengths, padded on the right, with a prompt that has no label."""
    batch = dict(tiny_batch(size, width))
    lengths = torch.arange(size) % (width - 4) + 5
    places = torch.arange(width).expand(size, width)
    labels = batch["labels"].clone()
    labels[(places >= lengths[:, None]) | (places < torch.arange(size)[:, None] % 3)] = -100
    return {**batch, "attention_mask": (places < lengths[:, None]).long(), "labels": labels}


def loss_of_row(model, batch, row):
    """Of one example alone, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return model(**{name: value[row : row + 1, :length] for name, value in batch.items()}).loss


@dataclass
class Returned:
    """What a model of your own may return: of no class that transformers knows."""

    logits: Tensor


# ---- features


@pytest.mark.parametrize("kind", ["llama", "lora", "gpt2", "dropped", "o_proj"])
def test_exact_features_are_the_gradient_of_each_example(kind):
    model = with_lora(tiny_causal_lm()) if kind == "lora" else tiny_gpt2() if kind == "gpt2" else tiny_causal_lm()
    model.eval()
    batch = ragged_batch(6)
    weight = {
        "llama": lambda: model.model.layers[2].self_attn.v_proj.weight,
        "dropped": lambda: model.model.layers[2].self_attn.v_proj.weight,
        "lora": lambda: model.base_model.model.model.layers[2].self_attn.v_proj.lora_B["default"].weight,
        "gpt2": lambda: model.transformer.h[1].attn.c_attn.weight,
        "o_proj": lambda: model.model.layers[1].self_attn.o_proj.weight,
    }[kind]()
    losses = [loss_of_row(model, batch, row) for row in range(6)]
    expected = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    if kind == "gpt2":  # its Conv1D stores (in, out)
        expected = [grad.T for grad in expected]
    if kind == "dropped":
        apply_dropbp(model, 0.0).set_plan([False] * 6)
    projection = "layers.1.self_attn.o_proj" if kind == "o_proj" else None
    ours, grads = CoresetSelector(model, projection=projection, max_tokens=24).score(batch)
    torch.testing.assert_close(ours, torch.stack(losses).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, torch.stack(expected).flatten(1), rtol=1e-4, atol=1e-6)


def test_a_projection_without_the_active_adapter_is_taken_whole():
    peft = pytest.importorskip("peft")
    merged = with_lora(tiny_causal_lm())
    merged.merge_adapter()
    assert find_projection(merged).linear is merged.base_model.model.model.layers[2].self_attn.v_proj
    model = with_lora(tiny_causal_lm())
    with model.disable_adapter():
        assert find_projection(model).linear is model.base_model.model.model.layers[2].self_attn.v_proj
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    v_proj = model.base_model.model.model.layers[2].self_attn.v_proj
    assert find_projection(model).linear is v_proj.lora_B["default"]
    model.set_adapter("other")
    assert find_projection(model).linear is v_proj


def test_an_example_without_labels_has_no_loss():
    losses = causal_lm_losses(torch.zeros(2, 3, 8), torch.tensor([[-100] * 3, [-100, 1, 2]]))
    torch.testing.assert_close(losses, torch.tensor([0.0, math.log(8)]))


def test_values_alone_come_before_fused_projections_and_names_are_whole():
    model = nn.ModuleDict({"v_proj": nn.Linear(2, 2), "c_attn": nn.Linear(2, 6)})
    assert find_projection(model).name == "v_proj"
    with pytest.raises(ValueError, match="expected the name of a linear, got 'attn'"):
        find_projection(model, "attn")


@pytest.mark.parametrize("max_tokens", [None, 30, 1])
def test_micro_batches_hold_what_they_may_and_no_column_too_many(max_tokens):
    model, batch = tiny_causal_lm(), {**ragged_batch(), "picture": torch.zeros(16, 40)}
    batch["labels"][3] = -100
    places = (batch["labels"] != -100) * torch.arange(1, 13)
    lengths = [max(1, place) for place in places.amax(1).tolist()]
    pieces = list(Scorer(model, find_projection(model)).micro_batches(batch, range(16), max_tokens))
    assert sorted(row for rows, _ in pieces for row in rows) == list(range(16))
    bound = sum(lengths) // 8 if max_tokens is None else max_tokens
    assert bound != 1 or len(pieces) == 16
    for rows, inputs in pieces:
        longest = max(lengths[row] for row in rows)
        assert inputs["labels"].shape == inputs["input_ids"].shape == (len(rows), longest)
        assert inputs["picture"].shape == (len(rows), 40)
        assert len(rows) * longest <= bound or len(rows) == 1


def test_rows_of_a_loss_of_ones_own_end_with_their_mask_where_it_is_one():
    model = tiny_causal_lm()
    scorer = Scorer(model, find_projection(model), lambda output, inputs: output)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for given, lengths in ((mask, [2, 1]), (mask[:, None, None], [3, 3])):
        assert scorer._lengths({"input_ids": torch.ones(2, 3), "attention_mask": given}) == lengths
    assert scorer._lengths({"features": torch.ones(2, 3)}) == [1, 1]


def test_projections_that_are_written_to_are_not_run_or_see_no_examples():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
            self.v, self.flat, self.unused = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, input_ids, attention_mask):
            x = self.v(self.embed(input_ids))
            x += 1.0
            return self.head(x + self.flat(x.flatten(0, 1)).view_as(x))

    model, batch = Own(), ragged_batch(6)
    logits = model(batch["input_ids"], batch["attention_mask"])
    causal_lm_losses(logits[:, :-1], batch["labels"][:, 1:]).sum().backward()
    grads = CoresetSelector(model, projection="v").score(batch)[1]
    torch.testing.assert_close(grads.sum(0), model.v.weight.grad.flatten(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="expected a linear that the loss depends on, unused is none"):
        CoresetSelector(model, projection="unused").score(batch)
    with pytest.raises(ValueError, match=r"input is \(batch, \.\.\., width\), but flat got \(\d+, 8\) for 1 examples"):
        CoresetSelector(model, projection="flat").score(batch, [0])


def test_a_batch_may_hold_options_of_the_forward():
    selector, batch = CoresetSelector(tiny_causal_lm()), ragged_batch(6)
    torch.testing.assert_close(selector.score({**batch, "use_cache": True}), selector.score(batch))


@pytest.mark.parametrize("features", ["exact", "spsa"])
def test_features_are_float32_under_autocast(features):
    """The loss is autocast's; what is made of it is not rounded once more."""
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = CoresetSelector(tiny_causal_lm(), features=features).score(ragged_batch(6))
    assert (grads.bfloat16() != grads).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["llama", "lora", "gpt2"])
def test_spsa_is_the_slope_along_its_directions_and_runs_the_first_blocks_once(kind):
    model = with_lora(tiny_causal_lm()) if kind == "lora" else tiny_gpt2() if kind == "gpt2" else tiny_causal_lm()
    batch = ragged_batch(6)
    calls = []
    first, last = (find_projection(model).blocks[place] for place in (0, -1))
    for block in (first, last):
        mlp = block.mlp
        mlp.register_forward_hook(lambda *_, mlp=mlp: calls.append(mlp))
    selector = CoresetSelector(model, features="spsa", directions=3, epsilon=2e-3, max_tokens=1000)
    losses, grads = selector.score(batch)
    assert (calls.count(first.mlp), calls.count(last.mlp)) == (1, 7)
    exact_losses, exact = CoresetSelector(model).score(batch)
    torch.testing.assert_close(losses, exact_losses)
    linear = find_projection(model).linear
    shape = (linear.out_features, linear.in_features) if kind != "gpt2" else (48, 16)
    directions = torch.stack([d.flatten() for d in selector._draw_directions(shape, losses.device)])
    expected = (exact @ directions.T) @ directions / 3
    torch.testing.assert_close(grads, expected, rtol=1e-2, atol=2e-2 * float(expected.abs().max()))


def test_spsa_passes_over_blocks_that_are_called_by_name_and_return_more():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden):
            return hidden + self.linear(hidden).tanh(), hidden.mean(-1, keepdim=True)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, input_ids, attention_mask):
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden, more = block(hidden=hidden)
                hidden = hidden + more
            return self.head(hidden)

    model, batch = Own(), ragged_batch(6)
    selector = CoresetSelector(model, projection="blocks.2.linear", features="spsa", directions=2, max_tokens=1000)
    _, exact = CoresetSelector(model, projection="blocks.2.linear").score(batch)
    directions = torch.stack([d.flatten() for d in selector._draw_directions((8, 8), exact.device)])
    expected = (exact @ directions.T) @ directions / 2
    torch.testing.assert_close(selector.score(batch)[1], expected, rtol=1e-2, atol=2e-2 * float(expected.abs().max()))


def test_spsa_leaves_a_block_its_own_forward_and_refuses_one_that_runs_twice():
    model, batch = tiny_causal_lm(), ragged_batch(4)
    layer = model.model.layers[0]
    layer.forward = own = functools.partial(type(layer).forward, layer)  # as accelerate's offloading has it
    spsa = {"features": "spsa", "directions": 1}
    scores = CoresetSelector(model, **spsa).score(batch)
    assert layer.forward is own
    assert all(map(torch.equal, scores, CoresetSelector(tiny_causal_lm(), **spsa).score(batch)))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])

        def forward(self, input_ids, attention_mask):
            return self.head(self.blocks[0](self.blocks[0](self.embed(input_ids))))

    with pytest.raises(ValueError, match="projection: expected its Sequential to run once, ran 2 times"):
        CoresetSelector(Twice(), projection="blocks.0.0", **spsa).score(batch)


def test_one_fixed_direction_is_one_number_times_one_vector():
    batch = ragged_batch(8)
    selector = CoresetSelector(tiny_causal_lm(), features="spsa", directions=1, fixed=True)
    _, first = selector.score(batch)
    selector.select(batch)
    _, second = selector.score(batch)
    assert torch.equal(first, second)
    values = torch.linalg.svdvals(first.double())
    assert values[1] < 1e-6 * values[0]
    fresh = CoresetSelector(tiny_causal_lm(), features="spsa", directions=4)
    before = fresh.score(batch)[1]
    assert (torch.linalg.svdvals(before)[:4] > 1e-3 * torch.linalg.svdvals(before)[0]).all()
    fresh.step += 1
    assert not torch.equal(before, fresh.score(batch)[1])


@pytest.mark.parametrize("features", ["exact", "spsa"])
def test_an_example_scores_alike_in_any_company_and_padding(features):
    """What is left is the rounding of matrix products of other shapes; spsa divides it by 2 epsilon."""
    batch = ragged_batch()
    wider = {name: F.pad(value, (0, 9), value=-100 if name == "labels" else 0) for name, value in batch.items()}
    model = tiny_causal_lm()
    selector = CoresetSelector(model, features=features, directions=2, epsilon=0.1)
    losses, grads = selector.score(batch)
    tolerance = {"rtol": 1e-4, "atol": (1e-6 if features == "exact" else 3e-5) * max(1.0, float(grads.abs().max()))}
    alone = [selector.score(batch, [row]) for row in range(16)]
    for other in (selector.score(wider), [torch.cat(values) for values in zip(*alone, strict=True)]):
        torch.testing.assert_close(other[0], losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other[1], grads, **tolerance)
    expected = torch.stack([loss_of_row(model, batch, row) for row in range(16)])
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", ["exact", "spsa"])
def test_scoring_leaves_everything_as_it_was(features):
    model = with_lora(tiny_causal_lm(attention_dropout=0.2))
    model.base_model.model.model.layers[0].eval()
    handler = apply_dropbp(model, 0.5)
    handler.step()
    gates = [(gate.kept, gate.was_called, gate.batch_size) for gate in handler.gates.values()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rng = torch.get_rng_state()
    CoresetSelector(model, features=features).subset(ragged_batch(), SOURCES)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    assert [(gate.kept, gate.was_called, gate.batch_size) for gate in handler.gates.values()] == gates
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scoring_saves_nothing_of_the_blocks_before_the_last():
    batch = ragged_batch()
    saved = {}
    for num_blocks in (3, 6):
        model = with_lora(tiny_causal_lm(num_hidden_layers=num_blocks))
        with saved_bytes() as exact:
            CoresetSelector(model).score(batch)
        saved[num_blocks] = exact.num_bytes
        with saved_bytes() as spsa:
            CoresetSelector(model, features="spsa").score(batch)
        assert spsa.num_bytes == 0
    assert saved[3] == saved[6]


@pytest.mark.parametrize("returned", [Tensor.clone, lambda x: {"logits": x}, lambda x: (x,), Returned])
def test_logits_are_found_in_what_a_model_of_your_own_returns(returned):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_causal_lm()

        def forward(self, input_ids, attention_mask):
            return returned(self.lm(input_ids, attention_mask=attention_mask).logits)

    batch = ragged_batch(6)
    torch.testing.assert_close(CoresetSelector(Own()).score(batch), CoresetSelector(tiny_causal_lm()).score(batch))


def test_a_model_that_is_no_causal_lm_brings_its_loss():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    batch = {**ragged_batch(6), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    selector = CoresetSelector(
        model, loss=lambda output, inputs: F.cross_entropy(output.logits, inputs["labels"], reduction="none")
    )
    losses, grads = selector.score(batch)
    weight = model.bert.encoder.layer[1].attention.self.value.weight
    for row in range(6):
        length = int(batch["attention_mask"][row].sum())
        one = {name: value[row : row + 1, :length] for name, value in batch.items() if name != "labels"}
        loss = model(**one, labels=batch["labels"][row : row + 1]).loss
        torch.testing.assert_close(losses[row], loss.detach())
        expected = torch.autograd.grad(loss, weight)[0].flatten()
        torch.testing.assert_close(grads[row], expected, rtol=1e-4, atol=1e-6)
    assert len(selector.select(batch)[0]) == 3


# ---- picks


def greedy(features, num_picks):
    """Facility location by the definition: the sum over all elements of the similarity to their best pick."""
    distances = (features[:, None] - features[None]).abs().sum(2)
    similarity = distances.max() - distances
    picks = []
    for _ in range(num_picks):
        objective = [
            -1.0 if new in picks else float(similarity[[*picks, new]].amax(0).sum()) for new in range(len(features))
        ]
        picks.append(objective.index(max(objective)))
    return picks


def test_picks_are_those_of_the_method_written_down_plainly():
    """Small sources whole; Adam's moments, the largest coordinates of each source, greedy picks."""
    model, batch = tiny_causal_lm(), ragged_batch()
    selector = CoresetSelector(model, num_coordinates=40)
    first = second = torch.zeros(512, dtype=torch.float64)
    for step in range(1, 5):
        model.model.embed_tokens.weight.data.add_(0.01 * torch.randn(64, 32))
        grads = CoresetSelector(model).score(batch)[1].double()
        expected = {0, 1, 2}
        for rows in ([3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]):
            m = (0.9 * first + 0.1 * grads[rows]) / (1 - 0.9**step)
            v = (0.999 * second + 0.001 * grads[rows] ** 2) / (1 - 0.999**step)
            updates = m / (v.sqrt() + 1e-8)
            places = updates.mean(0).abs().argsort(descending=True)[:40]
            budget = plan_budgets(SOURCES, 8)[SOURCES[rows[0]]]
            expected |= {rows[pick] for pick in greedy(updates[:, places], budget)}
        first = 0.9 * first + 0.1 * grads[3:].mean(0)
        second = 0.999 * second + 0.001 * grads[3:].mean(0) ** 2
        selected, weights = selector.select(batch, torch.tensor(SOURCES))
        if step > 1:  # in the first every update is 1 or -1 but for eps: which are largest is a matter of rounding
            assert selected.tolist() == sorted(expected)
        assert weights.tolist() == [1.0] * 8


def test_normalised_features_are_the_next_updates_of_adam():
    weight = nn.Parameter(torch.zeros(5))
    optimizer, moments = torch.optim.Adam([weight], lr=1.0), AdamMoments((0.9, 0.999))
    for _ in range(3):
        weight.grad, before = torch.randn(5), weight.detach().clone()
        update = moments.normalise(torch.stack([torch.randn(5), weight.grad]))[1]
        optimizer.step()
        torch.testing.assert_close(update, before - weight)
        moments.update(weight.grad)
    for num_coordinates in (4, 6):
        with pytest.raises(ValueError, match=f"expected the 5 weights that the moments are of, got {num_coordinates}"):
            moments.check(num_coordinates)


def test_examples_of_small_sources_are_not_scored():
    model, batch = tiny_causal_lm(), ragged_batch()
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    CoresetSelector(model).select(batch, SOURCES)
    assert sum(seen) == 13
    seen.clear()
    for selector in (CoresetSelector(model, 1.0), CoresetSelector(model, method="random")):
        selector.select(batch, SOURCES)
    assert not seen
    hook.remove()


def test_twins_are_kept_once():
    """Eight pairs of equal examples: the subset has one of each, and each stands for two."""
    batch = {name: value[[*range(8), *range(8)]] for name, value in ragged_batch(8).items()}
    selected, weights = CoresetSelector(tiny_causal_lm(), betas=None, weights="cluster", max_tokens=12).select(batch)
    assert {row % 8 for row in selected.tolist()} == set(range(8))
    assert weights.tolist() == [1.0] * 8


def test_controls_keep_the_same_number_and_draw_anew_in_each_step():
    model, batch = nn.Linear(2, 2), ragged_batch()
    for method in ("random", "stratified"):
        selector = CoresetSelector(model, method=method, weights="cluster", seed=1)
        draws = [selector.select(batch, SOURCES) for _ in range(60)]
        kept = torch.stack([torch.bincount(selected, minlength=16) for selected, _ in draws]).float()
        assert (kept.sum(1) == 8).all()
        assert kept.max() == 1
        if method == "stratified":
            assert (kept[:, :3] == 1).all()
            assert (kept[:, 3:9].sum(1) == 2).all()
            assert draws[0][1].tolist() == pytest.approx([0.5] * 3 + [1.5] * 2 + [7 / 6] * 3)
        assert len({tuple(selected.tolist()) for selected, _ in draws}) > 30
        assert (kept.mean(0) > 0.15).all()
        again = CoresetSelector(model, method=method, seed=1)
        assert torch.equal(again.select(batch, SOURCES)[0], draws[0][0])


def test_sources_of_one_size_are_drawn_from_apart():
    selector = CoresetSelector(nn.Linear(2, 2), method="stratified")
    draws = [selector.select(ragged_batch(), [0] * 8 + [1] * 8)[0] for _ in range(4)]
    assert any((draw[4:] - draw[:4] != 8).any() for draw in draws)


def test_the_model_is_found_inside_its_wrappers():
    model = tiny_causal_lm()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # the class's own wants a group of processes
    wrapped.module = model
    for each in (model, wrapped, torch.compile(model), torch.compile(wrapped)):
        assert CoresetSelector(each).model is model


def test_subset_takes_rows_of_everything_that_has_them():
    batch = {
        **ragged_batch(4),
        "names": list("abcd"),
        "letters": ("a", "b", "c", "d"),
        "scale": torch.tensor(2.0),
        "mode": "x",
    }
    subset, _ = CoresetSelector(nn.Linear(2, 2), method="random").subset(batch)
    rows = ["abcd".index(name) for name in subset["names"]]
    assert len(rows) == 2
    assert subset["letters"] == tuple(subset["names"])
    assert torch.equal(subset["input_ids"], batch["input_ids"][rows])
    assert subset["scale"] == 2
    assert subset["mode"] == "x"


@pytest.mark.parametrize("features", ["exact", "spsa"])
def test_a_resumed_selector_goes_on_exactly(features, tmp_path):
    model, batch = tiny_causal_lm(), ragged_batch()

    def make():
        return CoresetSelector(model, features=features, directions=2, seed=3, num_coordinates=50)

    whole = make()
    for _ in range(2):
        whole.select(batch, SOURCES)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    for _ in range(2):
        assert torch.equal(whole.select(batch, SOURCES)[0], resumed.select(batch, SOURCES)[0])
    ours, theirs = (s.state_dict()["moments"] for s in (whole, resumed))
    assert torch.equal(ours["first"], theirs["first"])
    assert torch.equal(ours["second"], theirs["second"])
    with pytest.raises(ValueError, match="seed: expected 3, with which the state was saved, got 0"):
        CoresetSelector(model).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="betas: expected given, with which the state was saved, got None"):
        CoresetSelector(model, seed=3, betas=None).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="state: expected what state_dict of version 1 returned, got None"):
        CoresetSelector(model).load_state_dict({})
    with pytest.raises(ValueError, match="returned, got list"):
        CoresetSelector(model).load_state_dict([])
    plain = CoresetSelector(model, betas=None)
    with pytest.raises(ValueError, match="betas: expected None, with which the state was saved, got given"):
        CoresetSelector(model).load_state_dict(plain.state_dict())
    elsewhere = CoresetSelector(model, seed=3, projection="o_proj")
    elsewhere.load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="projection: expected the 512 weights that the moments are of, got 1024"):
        elsewhere.select(batch, SOURCES)


# ---- what is refused


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match="keep: expected 0 < keep <= 1, got"):
        CoresetSelector(tiny_causal_lm(), keep)


def test_bad_arguments():
    model = tiny_causal_lm()
    with pytest.raises(TypeError, match=r"keep: expected a number with 0 < keep <= 1, got '0\.5'"):
        CoresetSelector(model, "0.5")
    with pytest.raises(TypeError, match="keep: expected a number with 0 < keep <= 1, got True"):
        CoresetSelector(model, True)
    for epsilon in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"epsilon: expected a positive number, got {epsilon}"):
            CoresetSelector(model, epsilon=epsilon)
    with pytest.raises(ValueError, match=r"betas: expected two numbers with 0 <= beta < 1, got \(0\.9, 1\.0\)"):
        CoresetSelector(model, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="features: expected one of exact, spsa, got 'x'"):
        CoresetSelector(model, features="x")
    with pytest.raises(ValueError, match="directions: expected at least 1, got 0"):
        CoresetSelector(model, features="spsa", directions=0)
    with pytest.raises(ValueError, match=r"projection: expected the name of a linear, got 'w_proj'; .*layers\.2\.mlp"):
        CoresetSelector(model, projection="w_proj")
    with pytest.raises(
        ValueError, match=r"projection: expected a linear, but model\.layers\.2\.self_attn is a LlamaAtt"
    ):
        CoresetSelector(model, projection="self_attn")
    with pytest.raises(ValueError, match=r"projection: expected one of v_proj, .*; the model has no linear"):
        CoresetSelector(nn.Embedding(3, 3))


def test_bad_batches():
    model, batch = tiny_causal_lm(), ragged_batch()
    selector = CoresetSelector(model)
    with pytest.raises(ValueError, match="sources: expected one for each of the 16 examples of the batch, got 15"):
        selector.select(batch, SOURCES[:15])
    with pytest.raises(ValueError, match="sources: expected at most 8, as many as examples are kept of 16, got 16"):
        selector.select(batch, range(16))
    with pytest.raises(TypeError, match="batch: expected a mapping of names to tensors, got list"):
        selector.select([1, 2])
    with pytest.raises(ValueError, match="batch: expected labels, or a selector with a loss function, got input_ids"):
        selector.select({"input_ids": batch["input_ids"]})
    small = CoresetSelector(model, sources={0: 3, 1: 4, 2: 500})
    with pytest.raises(ValueError, match="all 4 examples are from small ones: 0, 1"):
        small.select(ragged_batch(4), [0, 0, 0, 1])
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(
        ValueError, match="loss: expected finite losses, but 16 of 16 are not, the first of them nan for example 0"
    ):
        CoresetSelector(broken).select(batch)
    tokens = batch["input_ids"].clamp(max=62)
    tokens[5, 0] = 63
    one_broken = copy.deepcopy(model)
    one_broken.model.embed_tokens.weight.data[63] = float("nan")
    with pytest.raises(ValueError, match="but 1 of 2 are not, the first of them nan for example 5 of the batch"):
        CoresetSelector(one_broken).score({**batch, "input_ids": tokens}, [4, 5])
    assert selector.step == 0
    assert all(module.training for module in broken.modules())
