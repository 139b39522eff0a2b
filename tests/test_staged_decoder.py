"""How the stages of a target plan run: contexts that samples share, in slices, by flash attention."""

import copy
import functools

import pytest
import torch
from flash_stand_ins import attend_by_flash
from target_cases import CLOSE, assert_same, backward, chat, is_target, runs_again, tiny
from torch._dynamo.testing import CompileCounter

from dropbp_kernels import apply_dropbp, remove_dropbp
from dropbp_kernels.integrations import staged_decoder
from dropbp_kernels.integrations.decoder_parts import PARTS, DecoderParts, parts_of
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.targets import IGNORED, plan_targets

pytestmark = pytest.mark.usefixtures("turns_apart")


def pairs(padding_side="right"):
    """Two completions each of two prompts of 7 and 5 tokens, as trainers of preferences and of groups batch them."""
    tokens = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    starts = [0, 2, 0, 2] if padding_side == "left" else [0, 0, 0, 0]
    firsts = [7, 7, 7, 7] if padding_side == "left" else [7, 5, 7, 5]
    ends = [16, 12, 13, 16]
    labels = torch.full_like(tokens, IGNORED)
    for sample, (start, first, end) in enumerate(zip(starts, firsts, ends, strict=True)):
        tokens[sample, start:first] = tokens[sample % 2, start:first]
        mask[sample, :start] = mask[sample, end:] = 0
        labels[sample, first:end] = tokens[sample, first:end]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "use_cache": False}


def context_rows(model, batch):
    """The rows of each pass through the decoder that was without autograd."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: None if torch.is_grad_enabled() else shapes.append(tuple(args[0].shape))
    )
    model(**batch)
    hook.remove()
    return shapes


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_shared_context_is_exact_with_its_whole_gradient(model_type, padding_side):
    model, batch = tiny(model_type), pairs(padding_side)
    dense = backward(copy.deepcopy(model), batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full", shared_context=True)
    assert_same(backward(model, batch), dense, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"context_keep": 0.5}])
@pytest.mark.parametrize("max_rows", [2, 256])
@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])  # of which one has both windows and none
def test_a_shared_context_runs_once_and_is_a_constant(
    model_type,
    max_rows,
    options,
    cut_attention,
    monkeypatch,
):
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: max_rows)
    model, batch = tiny(model_type, attn_implementation="sdpa", sliding_window=4), pairs()
    kept = runs_again(batch["labels"], batch["attention_mask"], **options)
    dense = backward(cut_attention(copy.deepcopy(model), is_target(batch["labels"]) | kept), batch)
    apply_dropbp(model, 0.0, context="inference", shared_context=True, **options).step()
    assert_same(backward(model, batch), dense, **CLOSE)
    assert context_rows(model, batch) == ([(2, 1)] * 6 if max_rows == 2 else [(2, 6)])  # of 4 samples


def test_rows_of_a_shared_context_are_counted():
    batch = pairs()
    plan = plan_targets(batch["labels"], batch["attention_mask"])
    shared = plan.with_shared_context(batch["input_ids"], torch.arange(16).unsqueeze(0))
    assert (plan.num_context, shared.num_context) == (2 * (6 + 4), 6 + 4)
    assert shared.stages[0].samples.tolist() in ([0, 1], [1, 0])
    assert [shared.stages[0].samples[index].item() for index in shared.stages[0].sample_of] == [0, 1, 0, 1]
    assert shared.num_target == plan.num_target


def test_contexts_that_differ_are_not_shared():
    batch = pairs()
    places = torch.arange(16).unsqueeze(0)
    plan = plan_targets(batch["labels"], batch["attention_mask"])
    assert plan.with_shared_context(torch.arange(64).reshape(4, 16), places) is plan
    shifted = places + torch.tensor([[0], [0], [1], [1]])
    assert plan.with_shared_context(batch["input_ids"], shifted) is plan
    for labels in (torch.ones(4, 16, dtype=torch.long), torch.full((4, 16), IGNORED)):
        plan = plan_targets(labels)  # no context at all
        assert plan.with_shared_context(torch.zeros_like(labels), places) is plan
    longer = batch["labels"].clone()
    longer[2, 7] = longer[3, 5] = IGNORED
    longer = plan_targets(longer, batch["attention_mask"])
    assert longer.with_shared_context(batch["input_ids"], places) is longer
    packed = plan_targets(longer.shift_labels, position_ids=torch.tensor([[0, 1, 0, 1, *range(12)]]).repeat(4, 1))
    mixed = packed.with_shared_context(torch.zeros(4, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
    assert mixed.num_context < packed.num_context


def test_a_shared_context_needs_tokens():
    model, batch = tiny(), pairs()
    apply_dropbp(model, 0.0, context="inference", shared_context=True)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="input_ids: expected token ids with shared_context"):
        model(**batch)


@pytest.mark.parametrize("context_gradient", ["none", "one_hop"])
def test_slices_of_the_context_change_no_gradient(context_gradient, monkeypatch):
    model, batch = tiny(), chat()
    expected = copy.deepcopy(model)
    apply_dropbp(expected, 0.0, context="inference", context_gradient=context_gradient)
    expected = backward(expected, batch)
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: 6)
    apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
    assert context_rows(model, batch) == [*[(3, 2)] * 4, (3, 1), *[(3, 2)] * 2, (3, 1)]
    assert_same(backward(model, batch), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own asking
def test_blocks_that_were_compiled_with_another_context_gradient_are_compiled_anew():
    """Dynamo tells neither one model's block from another's nor which hooks a module has."""
    torch.compiler.reset()
    batch = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in chat().items()}
    for context_gradient in ("none", "one_hop"):
        model = tiny(num_hidden_layers=1)
        apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
        expected = backward(model, batch)
        model.model.layers[0].compile(backend="eager")
        assert_same(backward(model, batch), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("context_gradient", "way"), [("none", "wrapped"), ("one_hop", "in place")])
def test_layers_compiled_one_by_one_share_their_graphs(context_gradient, way):
    num_graphs = []
    for num_layers in (2, 3):
        torch.compiler.reset()
        model, batch, counter = tiny(num_hidden_layers=num_layers), pairs(), CompileCounter()
        apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
        expected = backward(model, batch)
        layers = model.model.layers
        for number, layer in enumerate(list(layers)):
            if way == "in place":
                layer.compile(backend=counter)
            else:
                layers[number] = torch.compile(layer, backend=counter)
        before = [vars(layer).get("_compiled_call_impl") or layer.forward for layer in layers]
        for _ in range(2):
            loss, grads = backward(model, batch)
            grads = {name.replace("_orig_mod.", ""): grad for name, grad in grads.items()}
            assert_same((loss, grads), expected, **CLOSE)
            num_graphs.append(counter.frame_count)
        assert [vars(layer).get("_compiled_call_impl") or layer.forward for layer in layers] == before
    assert len(set(num_graphs)) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_layers_compiled_as_a_group_see_each_its_own_keys():
    class Group(torch.nn.Sequential):
        def forward(self, hidden_states, **kwargs):
            for layer in self:
                hidden_states = layer(hidden_states, **kwargs)
            return hidden_states

    torch.compiler.reset()
    model, batch = tiny(num_hidden_layers=3), pairs()
    apply_dropbp(model, 0.0, context="inference")
    expected = backward(model, batch)
    first, *others = model.model.layers
    group = Group(*others)
    group.compile(backend="eager")
    model.model.layers = torch.nn.ModuleList([first, group])
    loss, grads = backward(model, batch)
    assert_same((loss, dict(zip(expected[1], grads.values(), strict=True))), expected, **CLOSE)


def calls_with_and_without_graph(module):
    """How often `module` is called, from now on: [with autograd, as inference]."""
    calls = [0, 0]

    def count(module, args, kwargs):
        calls[not torch.is_grad_enabled()] += 1

    module.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("context_gradient", ["none", "one_hop"])
@pytest.mark.parametrize("model_type", ["cohere", "gpt2", "llama"])
def test_context_ends_with_the_keys_of_the_last_layer(model_type, context_gradient, checkpoint, monkeypatch):
    results = []
    for ends in (True, False):
        if not ends:
            monkeypatch.setattr(DecoderParts, "last_keys", None)
        model = tiny(model_type)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
        calls = [calls_with_and_without_graph(mlp) for mlp in (mlps[0], mlps[-1])]
        apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient)
        results.append((backward(model, chat()), calls))
    ((ours, calls), (whole, calls_of_whole)) = results
    assert_same(ours, whole, rtol=0, atol=0)
    assert calls[0] == calls_of_whole[0] == [calls[0][0], calls_of_whole[1][1]]
    assert calls[1][1] == 0 < calls_of_whole[1][1]


@pytest.mark.parametrize("name", ["", "layers.2", "layers.2.self_attn"])
def test_a_module_that_hooks_hold_sees_its_own_end(name):
    model = tiny(num_hidden_layers=3)
    apply_dropbp(model, 0.0, context="inference")
    module, begun, ended = model.model.get_submodule(name), [], []
    module.register_forward_pre_hook(lambda *_: begun.append(1))
    module.register_forward_hook(lambda *_: ended.append(1))
    model(**chat())
    assert len(ended) == len(begun) == 4  # stages of context and of targets, of two turns


def test_a_pass_does_not_walk_through_the_model(monkeypatch):
    model, batch, walked = tiny(), chat(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    apply_dropbp(model, 0.0, context="inference", context_gradient="one_hop")
    model(**batch)
    named_modules = torch.nn.Module.named_modules

    def walk(module, *args, **kwargs):
        for item in named_modules(module, *args, **kwargs):
            walked.extend([item[0]] if module is model.model else [])
            yield item

    monkeypatch.setattr(torch.nn.Module, "named_modules", walk)
    model(**batch)
    assert set(walked) <= {"", "embed_tokens"}  # one looks for the first parameter


def test_parts_are_found_again_once_the_last_layer_is_another():
    model = tiny()
    apply_dropbp(model, 0.0, context="inference")
    model(**chat())
    first = parts_of(model.model)
    assert parts_of(model.model) is first
    model.model.layers[-1] = copy.deepcopy(model.model.layers[-1])
    assert parts_of(model.model).around[-1] is model.model.layers[-1].self_attn
    remove_dropbp(model)
    assert PARTS not in vars(model.model)


def test_offloaded_layers_run_whole():
    accelerate = pytest.importorskip("accelerate")
    model = tiny(num_hidden_layers=2)
    expected = copy.deepcopy(model)
    apply_dropbp(expected, 0.0, context="inference")
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu"))
    apply_dropbp(model, 0.0, context="inference")
    calls = calls_with_and_without_graph(model.model.layers[-1].mlp)
    assert torch.equal(model(**chat()).loss, expected(**chat()).loss)
    assert calls[1] > 0


@pytest.mark.parametrize(("checkpoint", "num_slices"), [(None, 3), ("kept", 8)])
def test_context_needs_less_memory_than_targets(checkpoint, num_slices, monkeypatch):
    monkeypatch.setattr(staged_decoder, "PASS_ROWS", 1)
    tokens = torch.randint(3, 96, (1, 256))
    labels = tokens.clone()
    labels[:, :225] = IGNORED
    model = tiny(dtype=torch.float32, max_position_embeddings=256, intermediate_size=112, num_hidden_layers=8)
    apply_dropbp(model, 0.0, context="inference", checkpoint=checkpoint)
    at_passes = []
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: at_passes.append(live.peak_bytes))
    with PeakLiveBytes() as live:
        model(input_ids=tokens, labels=labels).loss.backward()
    assert len(at_passes) == num_slices + 1
    assert at_passes[-1] < 0.8 * live.peak_bytes
    sliced = at_passes[-1]
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: 225)
    at_passes.clear()
    with PeakLiveBytes() as live:
        model(input_ids=tokens, labels=labels)
    assert at_passes[-1] > 1.3 * sliced


# ---- flash attention, by stand-ins


@pytest.fixture
def with_flash(monkeypatch):
    return functools.partial(attend_by_flash, monkeypatch)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("sliding_window", [4, 64])
@pytest.mark.parametrize("context_gradient", ["none", "full"])
def test_flash_attention(with_flash, padding_side, sliding_window, context_gradient, monkeypatch):
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: 8)
    model, batch = tiny("mistral", sliding_window=sliding_window), pairs(padding_side)
    batch["labels"][0, 9:13] = IGNORED  # a second turn
    options = {"context": "inference", "context_gradient": context_gradient, "shared_context": True}
    by_flash = with_flash(copy.deepcopy(model))
    apply_dropbp(model, 0.0, **options)
    apply_dropbp(by_flash, 0.0, **options)
    assert_same(backward(by_flash, batch), backward(model, batch), **CLOSE)


def test_flash_attention_cannot_tell_documents_apart(with_flash):
    model, batch = with_flash(tiny()), chat()
    for option, least in (("context_keep", 0), ("target_keep", 1)):
        with pytest.raises(ValueError, match=f"{option}: expected {least} with attention 'flash_attention_2'"):
            apply_dropbp(model, 0.0, context="inference", **{option: 0.1})
    apply_dropbp(model, 0.0, context="inference")
    batch["position_ids"] = torch.cat([torch.arange(9), torch.arange(7)]).unsqueeze(0)
    with pytest.raises(ValueError, match="position_ids: expected one document a sample"):
        model(**batch)


def test_lengths_of_a_whole_batch_do_not_reach_its_stages(with_flash):
    """TRL's collator without padding gives flash attention the documents' ends, too."""
    model, batch = with_flash(tiny()), chat()
    batch |= {name: batch[name][:1] for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.arange(16).unsqueeze(0)
    apply_dropbp(model, 0.0, context="inference")
    expected = backward(model, batch)
    ends = torch.tensor([0, 16], dtype=torch.int32)
    batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 16, "max_length_k": 16}
    assert_same(backward(model, batch), expected, rtol=0.0, atol=0.0)
