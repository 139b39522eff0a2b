"""Target plans of models with images: positions of several axes, and features of an image added in the first layers."""

import pytest
import torch
from target_cases import CLOSE, assert_same, backward, cut_attention, cut_inputs, forget_cut, is_target
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations import staged_decoder
from dropbp_kernels.targets import IGNORED

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
