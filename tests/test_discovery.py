"""Branches found by tracing: what is found, what is refused, and that a refusal leaves the model as it was."""

import pytest
import torch
import transformers
from torch import nn

from benchmarks.models_check import check_gradients
from benchmarks.models_sweep import PAGE, model_types, page, read_rows, sweep
from benchmarks.tiny_models import tiny_causal_lm, tiny_inputs
from dropbp_kernels import apply_dropbp
from dropbp_kernels.integrations.discovery import NotFound, discover
from dropbp_kernels.integrations.families import FAMILIES
from dropbp_kernels.integrations.gating import ModuleGate

pytestmark = pytest.mark.filterwarnings("ignore:.*FLOPs unknown")


class PreNorm(nn.Module):
    """A block nobody knows: a sublayer of two modules, a scaled branch, a norm inside, dropout."""

    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 16), nn.Linear(16, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        x = x + 0.5 * self.dropout(self.attn(self.norm1(x)))
        return self.norm3(self.fc2(torch.tanh(self.fc1(self.norm2(x))))) + x


class LayerScale(PreNorm):
    """A parameter of the block's own scales a branch."""

    def __init__(self, width=8):
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x + self.scale * self.attn(self.norm1(x))


class PostNorm(PreNorm):
    def forward(self, x):
        return self.norm1(x + self.attn(x))


class Plain(PreNorm):
    def forward(self, x):
        return self.attn(self.norm1(x))


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": x, "loss": x.square().mean()}


def inputs():
    return {"x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))}


def test_branches_of_an_unknown_block_by_name():
    (_, first), (block, second) = discover(Model(PreNorm), inputs())
    assert (
        first.branches == second.branches == {"attention": ("norm1", "attn"), "mlp": ("norm2", "fc1", "fc2", "norm3")}
    )
    assert first.block == ("PreNorm",)
    assert type(block).__name__ == "PreNorm"


def test_an_unknown_block_is_gated_right():
    problems, (missed, gates) = check_gradients(Model(PreNorm), inputs(), inputs=inputs())
    assert not problems
    assert not missed
    assert list(gates) == [f"blocks.{i}.gate_{name}" for i in range(2) for name in ("attention", "mlp")]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (LayerScale, "scale is applied between modules"),
        (PostNorm, "is there a norm after the add"),
        (Plain, "no path of plain adds"),
    ],
)
def test_what_cannot_be_proved_is_refused_with_three_lines(block, reason):
    model = Model(block)
    model.embed.weight.requires_grad_(False)
    model.train()
    before = [(type(module), dict(module._forward_hooks), list(vars(module))) for module in model.modules()]
    with pytest.raises(
        NotFound, match=rf'(?s)blocks\.0 \({block.__name__}\).*{reason}.*register_family\("mine", block="'
    ):
        apply_dropbp(model, 0.5, inputs=inputs())
    assert [(type(module), dict(module._forward_hooks), list(vars(module))) for module in model.modules()] == before
    assert not model.embed.weight.requires_grad
    assert all(module.training for module in model.modules())


def test_a_refusal_is_about_blocks_and_not_about_what_feeds_them():
    """Wav2Vec2's convolutions are a list of modules too, and come first."""
    model = Model(PostNorm)
    model.embed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 8))
    with pytest.raises(NotFound, match=r"branches in blocks\.0 \(PostNorm\): .*norm after the add"):
        apply_dropbp(model, 0.5, inputs=inputs())


def test_the_proof_sees_a_branch_that_leaks(monkeypatch):
    """A gate that does not drop: the proof, and not a later gradient, has to say so."""
    monkeypatch.setattr(ModuleGate, "entry", lambda gate, stream: True)
    model = Model(PreNorm)
    with pytest.raises(NotFound, match="fail the proof"):
        apply_dropbp(model, 0.5, inputs=inputs())
    assert type(model.blocks[0].attn) is nn.Linear


def test_the_proof_sees_a_stream_that_carries_no_gradient():
    class Cut(PreNorm):
        def forward(self, x):
            return 0.0 * x + self.attn(self.norm1(x))

    with pytest.raises(NotFound, match="branches found in Cut fail the proof"):
        apply_dropbp(Model(Cut), 0.5, inputs=inputs())


def test_a_model_without_a_list_of_blocks():
    with pytest.raises(NotFound, match="no list of blocks"):
        apply_dropbp(PreNorm(), 0.5, inputs={"x": torch.ones(1, 2, 8)})


def test_a_model_of_something_else_than_tokens():
    """What it said was an error from inside of it, about an argument that nobody had given."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    with pytest.raises(NotFound, match=r"Dinov2Model does not run on four token ids alone \(.*Pass inputs=\.\.\."):
        apply_dropbp(model, 0.5)
    with pytest.raises(ValueError, match="channel dimension"):  # the model's own words about what somebody gave
        apply_dropbp(model, 0.5, inputs={"pixel_values": torch.ones(1, 2, 8, 8)})
    assert len(apply_dropbp(model, 0.5, inputs={"pixel_values": torch.ones(1, 3, 8, 8)}).gates) == 4


@pytest.mark.parametrize("model_type", ["gemma4_text", "exaone4", "mamba", "gpt_oss", "qwen3_next"])
def test_models_of_transformers_that_the_table_lacks(model_type):
    model = tiny_causal_lm(model_type)
    assert not any(family.fits(module) for family in FAMILIES.values() for module in model.modules())
    problems, (missed, gates) = check_gradients(model, tiny_inputs())
    assert not problems
    assert not missed
    assert len(gates) >= 2


def test_the_page_is_that_of_the_committed_rows():
    assert PAGE.read_text() == page(read_rows())


def test_at_least_forty_models_are_checked_and_none_is_wrong():
    rows = read_rows()
    assert sum(row.status == "checked" for row in rows) >= 40
    assert all(row.note for row in rows if row.status != "checked")
    assert not [row.model_type for row in rows if row.status == "wrong"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_sweep_still_sees_what_the_rows_say():
    import transformers

    rows = {row.model_type: row for row in read_rows()}
    version = read_rows()[0].transformers
    if version != transformers.__version__:
        pytest.skip(f"the rows are of transformers {version}, not {transformers.__version__}")
    assert sorted(rows) == sorted(model_types())
    some = sorted(rows)[::4]  # the whole takes a minute and a half: python -m benchmarks.models_sweep
    seen = {name: (now.status, now.fused_adds) for name in some if (now := sweep(name))}
    changed = {name: what for name, what in seen.items() if what != (rows[name].status, rows[name].fused_adds)}
    assert not changed
