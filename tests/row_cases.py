"""Plans by rows on tiny models, beside detach-after row by row, done by hooks."""

import torch
from models import step
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.tiny_models import tiny_causal_lm
from dropbp_kernels import apply_dropbp, remove_dropbp

BATCH, SEQ = 3, 6


def double(model_type, **overrides):
    """The tiny model in float64, which grouped_mm lacks, and without dropout, which rows draw in another order."""
    experts = {"experts_implementation": "eager"} if model_type in ("mixtral", "deepseek_v3") else {}
    return tiny_causal_lm(model_type, **experts, **overrides).double().eval()


def draw_masks(handler, tokens):
    """A random plan by hand: for each branch a mask over samples, or over tokens where the branch takes them."""
    generator = torch.Generator().manual_seed(0)
    masks = []
    for gate in handler.gates.values():
        shape = (BATCH * SEQ,) if tokens and gate.per_token else (BATCH,)
        masks.append(torch.rand(shape, generator=generator) < 0.5)
    return masks


def detach_rows(mask):
    """A forward hook that detaches what the rows of a module that are not in `mask` return."""

    def detach(output):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        for shape in ((BATCH, SEQ), (BATCH * SEQ,), (BATCH,)):
            if output.shape[: len(shape)] != shape:
                continue
            kept = mask if mask.numel() == BATCH * SEQ else mask[:, None].expand(BATCH, SEQ)
            kept = mask if shape == (BATCH,) else kept.reshape(shape)
            return torch.where(kept.reshape(*shape, *[1] * (output.dim() - len(shape))), output, output.detach())
        return output

    return lambda module, args, output: tree_map(detach, output)


def expected_step(model, masks, last_modules, inputs):
    hooks = [module.register_forward_hook(detach_rows(mask)) for module, mask in zip(last_modules, masks, strict=True)]
    result = step(model, inputs)
    for hook in hooks:
        hook.remove()
    return result


def assert_close(ours, expected, rtol=1e-7, atol=1e-12):
    torch.testing.assert_close(ours[0], expected[0], rtol=rtol, atol=atol)
    for name, grad in expected[1].items():
        theirs = ours[1][name]
        # A branch none of whose rows are kept has no graph; by hooks it has one through which zeros come.
        theirs = torch.zeros_like(grad) if theirs is None and grad is not None else theirs
        torch.testing.assert_close(theirs, grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def check(model, inputs, *, tokens, rtol=1e-7, atol=1e-12, **options):
    handler = apply_dropbp(model, 0.5, granularity="token" if tokens else "sample", fused_loss="off", **options)
    gates = list(handler.gates.values())
    last_modules = [gate.modules_of_branch[-1] for gate in gates]
    masks = draw_masks(handler, tokens)
    handler.set_plan(masks)
    ours = step(model, inputs)
    remove_dropbp(model)
    assert_close(ours, expected_step(model, masks, last_modules, inputs), rtol, atol)
