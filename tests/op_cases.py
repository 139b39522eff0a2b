"""A registry of the ops: for every raw op calls of it and what they must give, for every public function its uses.

test_op_properties.py holds each of them to what all ops have in common. An op that is missing here fails it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from inputs import make
from torch import Tensor

from dropbp_kernels import ops, reference


@dataclass
class Tensors:
    """Random inputs of one call: rows, with two positions each, of `width` columns.

    wide: dtype of a residual stream; narrow: of a branch and of weights.
    """

    rows: int
    width: int
    wide: torch.dtype = torch.float32
    narrow: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    device: Any = "cpu"
    needs_grad: bool = False

    @property
    def few(self) -> int:
        return max(self.rows // 3, 1)

    def stream(self, rows: int | None = None) -> Tensor:
        return self._make((self.rows if rows is None else rows, 2, self.width), self.wide)

    def branch(self, rows: int | None = None) -> Tensor:
        return self._make((self.rows if rows is None else rows, 2, self.width), self.narrow)

    def weight(self) -> Tensor:
        return make((self.width,), self.narrow, device=self.device).requires_grad_(self.needs_grad)

    def constant(self) -> Tensor:
        return make((self.rows, self.width), self.wide, device=self.device)

    def statistic(self, rows: int | None = None) -> Tensor:
        """Positive, one for each row and position, in the dtype of sums."""
        dtype = torch.promote_types(self.wide, torch.float32)
        return 0.5 + torch.rand(self.rows if rows is None else rows, 2, device=self.device, dtype=dtype)

    def scale(self, rows: int) -> Tensor:
        """A factor for each row; the first is zero."""
        return torch.arange(rows, device=self.device) / 2.0

    def order(self) -> Tensor:
        return torch.randperm(self.rows, device=self.device)

    def chosen(self) -> Tensor:
        return self.order()[: self.few]

    def heads(self) -> Tensor:
        """x of rope: a sample, a position for each row, two heads."""
        x = make((1, self.rows, 2, self.width), self.wide, device=self.device)
        return (x if self.layout == "contiguous" else x.transpose(1, 2).contiguous().transpose(1, 2)).requires_grad_(
            self.needs_grad
        )

    def table(self) -> Tensor:
        return make((self.rows, self.width // 4 * 2), self.wide, device=self.device)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return make(shape, dtype, self.layout, self.device).requires_grad_(self.needs_grad)


def _permuted(t: Tensors, options: tuple[Any, ...], bias: bool, num_kept: int | None = None) -> tuple[Any, ...]:
    num_kept = t.few if num_kept is None else num_kept
    return t.stream(), t.weight(), t.weight() if bias else None, t.order(), num_kept, 1e-5, *options, t.narrow


def _permuted_backward(t: Tensors, *options: bool) -> tuple[Any, ...]:
    mean = t.statistic(t.few) if options[0] else torch.empty(0, device=t.device, dtype=t.statistic().dtype)
    saved = t.stream(t.few), t.weight(), mean, t.statistic(t.few), t.order()
    return t.stream(), t.branch(t.few), *saved, *options


# raw op -> what it is called with, by name; in the order of ops/schema.py.
RAW: dict[str, dict[str, Callable[[Tensors], tuple[Any, ...]]]] = {
    "gated_residual_add": {
        "all": lambda t: (t.stream(), t.branch(), None),
        "rows": lambda t: (t.stream(), t.branch(t.few), t.chosen()),
    },
    "gated_residual_add_": {
        "all": lambda t: (t.stream(), t.branch(), None),
        "rows": lambda t: (t.stream(), t.branch(t.few), t.chosen()),
    },
    "gated_residual_add_backward": {
        "scaled": lambda t: (t.stream(), None, None, 2.0, t.narrow),
        "as it is": lambda t: (t.stream(), None, None, 1.0, t.wide),  # still no alias of the input
        "rows": lambda t: (t.stream(), t.chosen(), t.scale(t.few), 1.0, t.wide),
    },
    "gated_residual_rms_norm": {
        "llama": lambda t: (t.stream(), t.branch(), t.weight(), 1e-5, False),
        "gemma": lambda t: (t.stream(), t.branch(), t.weight(), 1e-5, True),
        "one tensor twice": lambda t: (*[t.branch()] * 2, t.weight(), 1e-5, False),
    },
    "gated_residual_rms_norm_backward": {
        "trained": lambda t: (t.branch(), t.stream(), t.stream(), t.weight(), t.statistic(), False, True),
        "frozen": lambda t: (t.branch(), None, t.stream(), t.weight(), t.statistic(), True, False),
    },
    "gated_residual_layer_norm": {
        "bias": lambda t: (t.stream(), t.branch(), t.weight(), t.weight(), 1e-5),
        "no bias": lambda t: (t.stream(), t.branch(), t.weight(), None, 1e-5),
        "one tensor twice": lambda t: (*[t.branch()] * 2, t.weight(), t.weight(), 1e-5),
    },
    "gated_residual_layer_norm_backward": {
        name: lambda t, wanted=wanted, has_new=has_new: (
            t.branch(),
            t.stream() if has_new else None,
            t.stream(),
            t.weight(),
            t.statistic(),
            t.statistic(),
            *wanted,
        )
        for name, wanted, has_new in (
            ("trained", (True, True), True),
            ("weight", (True, False), False),
            ("bias", (False, True), True),
            ("frozen", (False, False), False),
        )
    },
    "permuted_residual_add": {
        "some": lambda t: (t.stream(), t.branch(t.few), t.branch(t.rows - t.few), t.order()),
        "none kept": lambda t: (t.stream(), t.branch(0), t.branch(), t.order()),
    },
    "permuted_norm": {
        "llama": lambda t: _permuted(t, (False, False), False),
        "llama with bias": lambda t: _permuted(t, (False, False), True),
        "gemma": lambda t: _permuted(t, (False, True), False),
        "layer": lambda t: _permuted(t, (True, False), True),
        "none kept": lambda t: _permuted(t, (True, False), True, 0),
        "all kept": lambda t: _permuted(t, (True, False), False, t.rows),
    },
    "permuted_norm_backward_": {
        "llama": lambda t: _permuted_backward(t, False, False, True, False),
        "gemma": lambda t: _permuted_backward(t, False, True, True, True),
        "layer": lambda t: _permuted_backward(t, True, False, True, True),
        "frozen": lambda t: _permuted_backward(t, True, False, False, False),
    },
    "glu": {
        **{name: lambda t, name=name: (t.branch(), t.branch(), name) for name in ("silu", "gelu", "gelu_tanh")},
        "halves": lambda t: (*t.branch().chunk(2, dim=-1), "silu"),
    },
    "glu_": {"silu": lambda t: (t.branch(), t.branch(), "silu")},
    "glu_backward": {
        name: lambda t, name=name: (t.branch(), t.branch(), t.branch(), name) for name in ("silu", "gelu", "gelu_tanh")
    },
    "glu_backward_": {"gelu": lambda t: (t.branch(), t.branch(), t.branch(), "gelu")},
    "partial_gather": {
        "twice the same": lambda t: (t.branch(), torch.tensor([3, 0, 3], device=t.device)),
        "rows apart": lambda t: (t.branch()[..., :-1], torch.tensor([3, 0], device=t.device)),
        "none": lambda t: (t.branch(), torch.tensor([], device=t.device, dtype=torch.int64)),
    },
    "column_update_": {
        "two": lambda t: (t.branch()[:, 0], t.stream()[:, 0, :2], torch.tensor([3, 0], device=t.device), 0.5)
    },
    "column_restore_": {
        "two": lambda t: (t.branch()[:, 0], t.branch()[:, 0, :2], torch.tensor([3, 0], device=t.device))
    },
    "l1_distances": {"narrow": lambda t: (t.branch()[:, 0],), "wide": lambda t: (t.stream()[:, 0],)},
    "rope": {
        "forward": lambda t: (t.heads(), t.table(), t.table(), False),
        "back": lambda t: (t.heads(), t.table(), t.table(), True),
    },
    "rope_": {"in place": lambda t: (t.heads(), t.table(), t.table())},
}


ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """All that a call leaves behind: its results, and its arguments, which it may have written into."""
    copies = copy.deepcopy(list(arguments))  # clone would make dense what is not
    results = function(*copies)
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    return results + [tensor for tensor in copies if isinstance(tensor, torch.Tensor)]


def assert_as_the_reference(op: str, arguments: tuple[Any, ...], actual: list[Tensor]) -> None:
    expected = call(getattr(reference, f"{op}_reference"), arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        rounding = ROUNDING.get(theirs.dtype, 0.0)
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding * max(largest, 1.0))
        if ours.dtype == torch.bfloat16:  # a rounding too many is within the tolerance, but shows in many elements
            assert ours.ne(theirs).sum() <= max(2, ours.numel() // 10)


HUGE_ROWS, HUGE_WIDTH, NUM_LAST = (1 << 22) + 3, 1024, 4  # more elements than 32 bits can number


def _huge(rows: int = HUGE_ROWS, width: int = HUGE_WIDTH) -> Tensor:
    """Memory that is touched at the last rows alone."""
    tensor = torch.empty(rows, width, dtype=torch.bfloat16)
    tensor[-NUM_LAST:] = 0.5 + torch.rand(NUM_LAST, width)
    return tensor


def _huge_order() -> Tensor:
    return torch.cat([torch.arange(HUGE_ROWS - NUM_LAST), torch.arange(HUGE_ROWS - NUM_LAST, HUGE_ROWS).flip(0)])


def _huge_parts() -> tuple[Tensor, Tensor]:
    return _huge(HUGE_ROWS // 4), _huge(HUGE_ROWS - HUGE_ROWS // 4)


def _channels() -> Tensor:
    return torch.randperm(HUGE_WIDTH)[:64]


# raw op, and what of it -> huge arguments. Results of each row depend on that row alone.
HUGE: dict[tuple[str, str], Callable[[], tuple[Any, ...]]] = {
    ("gated_residual_add_", "all"): lambda: (_huge(), _huge(), None),
    ("gated_residual_add_", "rows"): lambda: (_huge(), _huge(), _huge_order()),
    ("gated_residual_add_backward", "rows"): lambda: (
        _huge(),
        _huge_order(),
        torch.full((HUGE_ROWS,), 2.0),
        1.0,
        torch.bfloat16,
    ),
    ("permuted_residual_add", "some"): lambda: (_huge(), *_huge_parts(), _huge_order()),
    ("gated_residual_rms_norm", "llama"): lambda: (_huge(), _huge(), torch.randn(HUGE_WIDTH).bfloat16(), 1e-5, False),
    ("gated_residual_layer_norm", "no bias"): lambda: (
        _huge(),
        _huge(),
        torch.randn(HUGE_WIDTH).bfloat16(),
        None,
        1e-5,
    ),
    ("permuted_norm", "llama"): lambda: (
        _huge(),
        torch.randn(HUGE_WIDTH).bfloat16(),
        None,
        _huge_order(),
        HUGE_ROWS // 4,
        1e-5,
        False,
        False,
        torch.bfloat16,
    ),
    ("glu_", "silu"): lambda: (_huge(), _huge(), "silu"),
    ("glu_backward_", "silu"): lambda: (_huge(), _huge(), _huge(), "silu"),
    ("partial_gather", "some"): lambda: (_huge(), _channels()),
    ("column_update_", "some"): lambda: (_huge(), _huge(width=64), _channels(), 2.0),
    ("column_update_", "transposed"): lambda: (
        _huge().t(),
        torch.rand(HUGE_WIDTH, 1),
        torch.tensor([HUGE_ROWS - 1]),
        2.0,
    ),
    ("column_restore_", "some"): lambda: (_huge(), _huge(width=64), _channels()),
    ("rope", "samples"): lambda: (
        _huge()[:, None, None],
        _huge(width=64)[:, None],
        _huge(width=64)[:, None],
        False,
    ),
}


def _last(argument: Any) -> Any:
    """What stands of a huge argument in its last rows, which may be columns; rows are numbered from there."""
    if not isinstance(argument, torch.Tensor):
        return 0 if argument == HUGE_ROWS // 4 else argument  # rows that are kept
    first = HUGE_ROWS - NUM_LAST
    if argument.dtype == torch.int64:
        return argument[-NUM_LAST:] - first if argument[-1] >= first else argument
    if argument.shape[0] == HUGE_ROWS // 4:
        return argument[:0]
    is_huge = [size >= HUGE_ROWS // 2 for size in argument.shape]
    return (argument[-NUM_LAST:] if is_huge[0] else argument[..., -NUM_LAST:] if is_huge[-1] else argument).clone()


def assert_last_rows_as_the_reference(op: str, name: str, call_huge: Callable[..., Any]) -> None:
    arguments = HUGE[op, name]()
    expected = call(getattr(reference, f"{op}_reference"), tuple(_last(argument) for argument in arguments))
    results = call_huge(*arguments)
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    results += [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    for ours, theirs in zip(map(_last, results), expected, strict=True):
        torch.testing.assert_close(ours[len(ours) - len(theirs) :], theirs, rtol=1.6e-2, atol=1.6e-2)


@dataclass(frozen=True)
class Use:
    """A way to use a public function: run(*make(tensors)) is a tensor or a tuple, on inputs that a graph may hold.

    is_exact: the gradient is the derivative, not a multiple of it.
    has_backward: an op of ours runs in the backward, so that a second derivative is refused.
    """

    function: str
    make: Callable[[Tensors], tuple[Any, ...]]
    run: Callable[..., Any] = field(repr=False)
    is_exact: bool = True
    has_backward: bool = True
    has_gradient: bool = True


def _norms() -> dict[str, Use]:
    """The two boundary norms in the four states of who is kept."""
    uses = {}
    for name, function, num_parameters, options in (
        ("rms norm", ops.gated_residual_rms_norm, 1, {}),
        ("rms norm, gemma", ops.gated_residual_rms_norm, 1, {"casting": "gemma"}),
        ("layer norm", ops.gated_residual_layer_norm, 2, {}),
        ("layer norm, no bias", ops.gated_residual_layer_norm, 1, {}),
    ):
        for is_kept in (True, False):
            for next_kept in (True, False):

                def run(
                    residual, branch, *weights, is_kept=is_kept, next_kept=next_kept, function=function, options=options
                ):
                    branch = branch * 2 if is_kept else branch.detach() * 2
                    normed, new_residual = function(residual.sin(), branch, *weights, next_kept=next_kept, **options)
                    return normed.cos(), new_residual.cos()

                words = f"{'kept' if is_kept else 'dropped'} then {'kept' if next_kept else 'dropped'}"
                uses[f"{name}, {words}"] = Use(
                    function.__name__,
                    lambda t, n=num_parameters: (t.stream(), t.stream(), *(t.weight() for _ in range(n))),
                    run,
                    has_backward=next_kept,
                )
    return uses


def _adds() -> dict[str, Use]:
    uses = {}
    for name, options, takes_rows, takes_scale in (
        ("add", {}, False, False),
        ("add, scaled", {"grad_scale": 4.0}, False, False),
        ("add, scaled rows", {}, False, True),
        ("add at rows", {}, True, False),
        ("add at rows, scaled", {"grad_scale": 4.0}, True, False),
        ("add at rows, scaled rows", {}, True, True),
    ):
        for inplace in (False, True):
            for is_kept in (True, False):

                def run(residual, branch, rows, scale, is_kept=is_kept, inplace=inplace, options=options):
                    branch = branch * 2 if is_kept else branch.detach() * 2
                    factor = {} if scale is None else {"grad_scale": scale}
                    sums = ops.gated_residual_add(
                        residual.sin(), branch, rows=rows, inplace=inplace, **options, **factor
                    )
                    return sums.cos()

                def inputs(t, takes_rows=takes_rows, takes_scale=takes_scale):
                    count = t.few if takes_rows else t.rows
                    rows, scale = t.chosen() if takes_rows else None, t.scale(count) if takes_scale else None
                    return t.stream(), t.stream(count), rows, scale

                words = (", in place" if inplace else "") + ("" if is_kept else ", dropped")
                is_scaled = bool(options) or takes_scale
                uses[name + words] = Use(
                    "gated_residual_add",
                    inputs,
                    run,
                    is_exact=not is_scaled,
                    has_backward=is_kept and (is_scaled or takes_rows) and not inplace,
                )
    return uses


def _permuted_norm(function: Callable[..., Any], num_parameters: int, **options: Any) -> Use:
    def run(residual, *others):
        kept, dropped, stream = function(residual.sin(), *others, 3, **options)
        return kept.cos(), dropped, stream.cos()

    return Use(function.__name__, lambda t: (t.stream(), *(t.weight() for _ in range(num_parameters)), t.order()), run)


def _permuted_add(takes_scale: bool) -> Use:
    def run(residual, kept, dropped, order, scale):
        factor = {} if scale is None else {"grad_scale": scale}
        return ops.permuted_residual_add(residual.sin(), kept * 2, dropped, order, **factor).cos()

    def inputs(t):
        return t.stream(), t.stream(3), t.stream(t.rows - 3), t.order(), t.scale(3) if takes_scale else None

    return Use("permuted_residual_add", inputs, run, is_exact=not takes_scale)


def _changed_product(x: Tensor, weight: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    original = ops.column_update(weight, delta, index, scale=2.0)
    product = x @ weight.t()
    ops.column_restore(weight, original, index)
    return product


# What a user does with each function of ops.__all__.
PUBLIC: dict[str, Use] = {
    **_adds(),
    **_norms(),
    "permuted rms norm": _permuted_norm(ops.permuted_rms_norm, 1),
    "permuted rms norm, gemma": _permuted_norm(ops.permuted_rms_norm, 1, casting="gemma"),
    "permuted layer norm": _permuted_norm(ops.permuted_layer_norm, 2),
    "permuted add": _permuted_add(False),
    "permuted add, scaled rows": _permuted_add(True),
    "swiglu": Use("swiglu", lambda t: (t.stream(), t.stream()), lambda g, u: ops.swiglu(g.sin(), u * 2).cos()),
    "swiglu, donating": Use(
        "swiglu", lambda t: (t.stream(), t.stream()), lambda g, u: ops.swiglu(g.sin(), u * 2, donate=True).cos()
    ),
    "swiglu, packed": Use(
        "swiglu", lambda t: (t.stream(),), lambda packed: ops.swiglu(*packed.sin().chunk(2, dim=-1)).cos()
    ),
    "geglu": Use("geglu", lambda t: (t.stream(), t.stream()), lambda g, u: ops.geglu(g.sin(), u * 2).cos()),
    "geglu, tanh": Use(
        "geglu",
        lambda t: (t.stream(), t.stream()),
        lambda g, u: ops.geglu(g.sin(), u * 2, approximate="tanh", donate=True).cos(),
    ),
    "swiglu, in place": Use(
        "swiglu",
        lambda t: (t.stream(), t.stream()),
        lambda g, u: ops.swiglu(g.detach() * 2, u.detach(), inplace=True) + 1,
        has_gradient=False,
    ),
    "rope": Use(
        "rope",
        lambda t: (t.heads(), t.table(), t.table()),
        lambda x, cos, sin: ops.rope(x.sin(), cos, sin).cos(),
    ),
    "rope, in place": Use(
        "rope",
        lambda t: (t.heads(), t.table(), t.table()),
        lambda x, cos, sin: ops.rope(x.detach() * 2, cos, sin, inplace=True) + 1,
        has_gradient=False,
    ),
    "partial gather": Use(
        "partial_gather",
        lambda t: (t.stream(), torch.tensor([3, 0, 3], device=t.device)),
        lambda x, index: ops.partial_gather(x.sin(), index).cos(),
    ),
    "l1 distances": Use(
        "l1_distances",
        lambda t: (t.constant(),),
        ops.l1_distances,
        has_gradient=False,
    ),
    **{
        f"column {verb}": Use(
            f"column_{verb}",
            lambda t: (t.constant(), t.constant(), t.constant()[:, :2], torch.tensor([3, 0], device=t.device)),
            _changed_product,
            has_gradient=False,
        )
        for verb in ("update", "restore")  # neither is used without the other
    },
}
