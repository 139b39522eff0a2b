"""The linear whose gradient tells examples apart: the last block's V projection, or any that is named.

Its gradient is cheap, since nothing below it needs a backward, and it has seen all blocks but the last one's MLP.
"""

from dataclasses import dataclass

from torch import nn

# By preference: projections to values alone; then fused ones, whose gradient holds that of queries and keys too.
VALUE_NAMES = ("v_proj", "value", "value_proj", "v_lin", "wv", "v")
FUSED_NAMES = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj", "kv_b_proj", "att_proj")


@dataclass(frozen=True)
class Projection:
    """name: as in `named_modules`. linear: the module whose weight's gradient is the feature; with LoRA its B.

    blocks: the block that holds the linear and those that run before it, in order; empty where none was found.
    """

    name: str
    linear: nn.Module
    blocks: tuple[nn.Module, ...]


def find_projection(model: nn.Module, name: str | None = None) -> Projection:
    """The projection of that name, whole or its last parts ("self_attn.o_proj"); of several, the last one.

    None: the last V projection, else the last fused one.

    Errors: ValueError when there is none; the message lists the linears of the last block.
    """
    modules = dict(model.named_modules())
    if name is None:
        linears = [path for path in reversed(modules) if _is_linear(modules[path])]
        matches = (path for names in (VALUE_NAMES, FUSED_NAMES) for path in linears if path.split(".")[-1] in names)
    else:
        matches = (path for path in reversed(modules) if path == name or path.endswith(f".{name}"))
    if (found := next(matches, None)) is None:
        wanted = f"one of {', '.join((*VALUE_NAMES, *FUSED_NAMES))}" if name is None else "the name of a linear"
        raise ValueError(f"projection: expected {wanted}, got {name!r}; {_last_linears(modules)}")
    if not _is_linear(modules[found]):
        kind = type(modules[found]).__name__
        raise ValueError(f"projection: expected a linear, but {found} is a {kind}; {_last_linears(modules)}")
    return Projection(found, _trained_part(modules[found]), _blocks_up_to(found, modules))


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear; quantised weights have another shape of their own, and GPT-2's Conv1D is transposed."""
    if hasattr(linear, "out_features"):
        return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]
    if hasattr(linear, "base_layer"):
        return linear_shape(linear.base_layer)  # type: ignore[arg-type]
    return int(linear.nf), int(linear.nx)  # type: ignore[arg-type]


def _is_linear(module: nn.Module) -> bool:
    """A linear, quantised or not, or the layer in which PEFT keeps one."""
    return hasattr(module, "base_layer") or (
        isinstance(getattr(module, "weight", None), nn.Parameter)
        and ("Linear" in type(module).__name__ or type(module).__name__ == "Conv1D")
    )


def _trained_part(module: nn.Module) -> nn.Module:
    """Of a LoRA layer the B matrix of its active adapter, as the paper has it: its input is short. Else the module."""
    adapters = [name for name in getattr(module, "active_adapters", ()) if name in getattr(module, "lora_B", ())]
    if adapters and not getattr(module, "disable_adapters", False) and not getattr(module, "merged", False):
        return module.get_submodule(f"lora_B.{adapters[0]}")
    return module


def _blocks_up_to(path: str, modules: dict[str, nn.Module]) -> tuple[nn.Module, ...]:
    """The members, up to the one that holds `path`, of the outermost list of modules around it."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        container = modules[".".join(parts[: length - 1])]
        if isinstance(container, nn.ModuleList | nn.Sequential):
            children = list(container.named_children())
            place = [name for name, _ in children].index(parts[length - 1])
            return tuple(child for _, child in children[: place + 1])
    return ()


def _last_linears(modules: dict[str, nn.Module]) -> str:
    linears = [path for path, module in modules.items() if _is_linear(module)]
    return f"the model's last linears are {', '.join(linears[-8:])}" if linears else "the model has no linear"
