"""Target plans of models with images: positions of several axes, features of an image that are added in the first
layers, and tokens of an image that see each other.
"""

import warnings

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, cut_attention, cut_inputs, forget_cut, is_target, tiny
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, Gemma3Config

from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations import staged_decoder
from dropbp_kernels.integrations.same_code import calls
from dropbp_kernels.integrations.stage_keys import looks_ahead
from dropbp_kernels.stage_masks import StageMasks
from dropbp_kernels.targets import IGNORED, plan_targets

pytestmark = pytest.mark.filterwarnings("ignore:model. only part of its blocks:UserWarning")  # not the vision tower's

IMAGE, START, END = 100, 102, 103
VISION = {
    "glm4v": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]},
    "qwen3_vl": {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
    },
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}


def with_images(kind) -> nn.Module:
    vision = {"depth": 2, "num_heads": 4, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": START, "image_start_token_id": START}
    config = CONFIG_MAPPING[kind](
        text_config=TEXT, vision_config=vision | {"image_size": 16} | VISION[kind], video_token_id=101, **tokens
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float64, attn_implementation="sdpa").train()


def batch_with_images(**changed) -> dict[str, torch.Tensor]:
    """An image of 4 x 8 patches, 2 x 4 tokens, in each prompt; the last sample has a second image between two turns."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 99, (3, 32))
    tokens[:, 1], tokens[:, 2:10], tokens[:, 10] = START, IMAGE, END
    tokens[2, 18], tokens[2, 19:27], tokens[2, 27] = START, IMAGE, END
    labels = tokens.clone()
    labels[:, :14] = IGNORED
    labels[1, 24:] = labels[2, 17:29] = IGNORED
    return {
        "input_ids": tokens,
        "labels": labels,
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(4 * 32, 24, dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * 4),
        "use_cache": False,
        **changed,
    }


@pytest.mark.parametrize("kind", sorted(VISION))
def test_the_gradient_is_the_dense_one(kind):
    batch = batch_with_images()
    dense = backward(with_images(kind), batch)
    model = with_images(kind)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


@pytest.fixture
def cut():
    yield {
        "none": lambda model, targets: cut_attention(model.model.language_model, targets),
        "one_hop": lambda model, targets: cut_inputs(model.model.language_model, targets),
    }
    forget_cut()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"checkpoint": "kept"}], ids=str)
@pytest.mark.parametrize("context_gradient", ["none", "one_hop"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_context_is_a_constant_whatever_its_slices(kind, context_gradient, options, cut, monkeypatch):
    batch = batch_with_images()
    model = with_images(kind)
    cut[context_gradient](model, is_target(batch["labels"]))
    dense = backward(model, batch)
    model = with_images(kind)
    apply_dropbp(model, 0.0, context="inference", context_gradient=context_gradient, **options)
    with pytest.warns(UserWarning, match="to which context gives no gradient"):
        assert_same(backward(model, batch), dense, **CLOSE)
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: 12)  # four columns: images are cut
    assert_same(backward(model, batch), dense, **CLOSE)


@pytest.mark.parametrize("num_axes", [3, 4])
def test_positions_given_to_the_model(num_axes):
    """By a collator that computes them; the first of four axes is that of the text, and says where documents begin."""
    model, batch = with_images("qwen2_5_vl"), batch_with_images()
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    axes, _ = model.model.get_rope_index(**{name: batch[name] for name in names})
    assert axes.shape == (3, 3, 32)
    text = torch.arange(32).repeat(3, 1)
    batch["position_ids"] = torch.cat([text[None], axes])[-num_axes:]
    dense = backward(model, batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def test_documents_of_a_packed_sequence_are_told_by_the_first_of_four_axes():
    model, batch = with_images("qwen2_5_vl"), batch_with_images()
    text = torch.arange(32).repeat(3, 1)
    text[:, 20:] -= 20
    batch["position_ids"] = text.repeat(4, 1, 1)
    batch["labels"][:, 20:22] = IGNORED
    dense = backward(model, batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def test_prompts_with_the_same_image_run_once():
    tokens = batch_with_images()["input_ids"]
    tokens[:, :14] = tokens[0, :14]
    labels = tokens.masked_fill(torch.arange(32) < 14, IGNORED)
    changed = {"input_ids": tokens[:2], "labels": labels[:2], "mm_token_type_ids": (tokens == IMAGE).int()[:2]}
    pixels = torch.randn(32, 24, dtype=torch.float64).repeat(2, 1)
    batch = batch_with_images(**changed, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 8]] * 2))
    model = with_images("qwen3_vl")
    dense = backward(model, batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full", shared_context=True)
    assert_same(backward(model, batch), dense, **CLOSE)
    empty = torch.zeros_like(pixels)
    assert torch.isfinite(backward(model, {**batch, "pixel_values": empty})[0])
    with pytest.raises(ValueError, match=r"expected the same .* \(another image\?\)"):
        model(**{**batch, "pixel_values": empty, "image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 4]])})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_batch_without_images(kind):
    tokens = batch_with_images()["input_ids"] % 99
    labels = tokens.masked_fill(torch.arange(32) < 14, IGNORED)
    batch = {"input_ids": tokens, "labels": labels, "use_cache": False}
    model = with_images(kind)
    dense = backward(model, batch)
    apply_dropbp(model, 0.0, context="inference", context_gradient="full")
    assert_same(backward(model, batch), dense, **CLOSE)


def gemma(attention="sdpa") -> nn.Module:
    """Gemma 3, which makes a mask by which the tokens of an image see each other."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    text = {**tiny("gemma3_text").config.to_dict(), "vocab_size": 120, "sliding_window": 6}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, **tokens)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, attn_implementation=attention).train()
    if not calls(model, "loss_function"):
        pytest.skip("Gemma 3 of this transformers (5.15) shifts labels in its forward, and is refused as a whole")
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)
    return model


def batch_of_gemma(first_label=8) -> dict[str, torch.Tensor]:
    """Images in prompts, in the third sample also between turns and where no target sees it; none in the last, all of
    which has labels.
    """
    torch.manual_seed(1)
    tokens = torch.randint(3, 99, (4, 32))
    tokens[:2, 2:6] = tokens[2, 3:7] = tokens[2, 16:20] = tokens[2, 28:] = IMAGE
    labels = tokens.clone()
    labels[:3, :first_label] = labels[2, 14:22] = labels[2, 26:] = IGNORED
    types, pixels = (tokens == IMAGE).long(), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    return {
        "input_ids": tokens,
        "labels": labels,
        "token_type_ids": types,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(tokens),
        "use_cache": False,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"context_gradient": "full"},
        {"context_gradient": "full", "shared_context": True},
        {"context_gradient": "one_hop"},
        {"context_gradient": "one_hop", "checkpoint": "kept"},
    ],
    ids=str,
)
def test_images_whose_tokens_see_each_other(attention, options, monkeypatch):
    monkeypatch.setattr(staged_decoder, "rows_at_once", lambda *_: 6)  # two columns, which would tear an image
    model, batch = gemma(attention), batch_of_gemma()
    if "shared_context" in options:
        for name in ("input_ids", "token_type_ids"):
            batch[name][1, :8] = batch[name][0, :8]
        batch["pixel_values"][1] = batch["pixel_values"][0]
    else:
        batch["attention_mask"][0, 30:] = 0
        batch["labels"][0, 30:] = IGNORED
        if attention == "sdpa":  # transformers' eager masks make NaN of a padded row on the left in float64
            batch["attention_mask"][1, :2] = 0
    if options["context_gradient"] == "one_hop":
        cut_inputs(model.model.language_model, is_target(batch["labels"]))
    dense = backward(model, batch)
    model = gemma(attention)
    apply_dropbp(model, 0.0, context="inference", families=["gemma3"], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "inputs_embeds: expected to depend on no trained parameter")
        assert_same(backward(model, batch), dense, **CLOSE)


def test_batches_of_such_models_without_images():
    batch = batch_of_gemma()
    del batch["pixel_values"]
    batch["input_ids"] %= 99
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    dense = backward(gemma(), batch)
    model = gemma()
    apply_dropbp(model, 0.0, context="inference", context_gradient="full", families=["gemma3"])
    assert_same(backward(model, batch), dense, **CLOSE)


def test_a_label_behind_an_image_whose_tokens_see_each_other():
    model = gemma()
    apply_dropbp(model, 0.0, context="inference", context_gradient="full", families=["gemma3"])
    with pytest.raises(ValueError, match="attention_mask: expected rows that attend to none of a later stage"):
        model(**batch_of_gemma(first_label=6))  # so that the image's last token is a target


def test_a_mask_of_the_models_that_is_causal_gives_the_masks_without_it():
    plan = plan_targets(batch_of_gemma()["labels"])
    masks, causal = StageMasks(plan.documents), torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    for stage in plan.stages:
        masks.add(stage)
        assert masks.of_model(causal).any(3).all()  # padded rows too
        is_row = stage.is_row[:, None, :, None]
        assert torch.equal(masks.of_model(causal) & is_row, masks.mask() & is_row)


def test_a_mask_that_looks_one_row_ahead_is_seen():
    sees = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 4, 4).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert not any(map(looks_ahead, (sees, added, sees[0, 0], None)))
    sees[..., 1, 2], added[..., 1, 2] = True, 0.0
    assert all(map(looks_ahead, (sees, added)))
