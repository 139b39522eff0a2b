"""CoresetSelector: from a large batch the examples whose gradients stand for all.

    selector = CoresetSelector(model, keep=0.5)
    for batch, sources in loader:
        subset, weights = selector.subset(batch, sources)
        loss = model(**subset).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()

Scoring is a forward without autograd and, for exact gradients, a backward through the end of the last block. So what a
step saves is the backward, and the activation memory, of the examples that are left out.
"""

import hashlib
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..ops.l1_distances import l1_distances
from ..targets import IGNORED
from .budgets import num_kept, plan_budgets, source_id
from .facility_location import facility_location
from .moments import AdamMoments, largest_coordinates
from .projection import find_projection, linear_shape
from .ranks import Ranks
from .scoring import Loss, Scorer, as_scoring, batch_size_of, take_rows

if TYPE_CHECKING:
    import torch.distributed as dist

METHODS = ("facility_location", "stratified", "random")
FEATURES = ("exact", "spsa")
WEIGHTS = ("uniform", "cluster")
STATE_VERSION = 1
# What a row is filled up with where another rank's rows are longer.
_FILL = {"labels": IGNORED, "shift_labels": IGNORED}


class CoresetSelector:
    """Chooses, from each batch, the examples that are worth a backward.

    Args:
        model: a causal language model whose forward takes input_ids and returns logits; or any model, with `loss`.
            PEFT, DropBP's gates, autocast (set around `select`) and DDP's wrapper are understood.
        keep: share of each batch to keep, 0 < keep <= 1.
        method: "facility_location": the examples of each large source whose features are nearest to all of its others
            (CoLM). Controls without any scoring: "stratified": as many of each source, drawn at random; "random": from
            the whole batch.
        features: "exact": each example's gradient by the projection's weight; "spsa": its estimate along random
            directions, from forwards alone, as published.
        projection: name of the linear, or its last parts; None: the last V projection. With LoRA: its B.
        sources: how many examples each source has in the data set, which then decides which sources are small; None:
            each batch's own counts do.
        directions: how many directions spsa takes the mean over; each costs two forwards from the last block on.
        fixed: the same directions in every step. directions=1 with fixed=True is the published estimate.
        epsilon: how far spsa goes along a direction.
        num_coordinates: how many coordinates of the features are compared in each source, those with the largest mean;
            None: all.
        betas: of the running moments that normalise features as Adam would; None: gradients as they are.
        weights: "uniform": every kept example counts alike, as published; "cluster": in proportion to how many
            candidates it stands for. The mean is 1 either way.
        max_tokens: most tokens of a scoring forward, padding included; None: an eighth of the batch's.
        loss: (output, inputs) -> losses (n,), for models that are no causal LM or have labels of their own kind.
        seed: of directions and random choices; ranks must share it.
        group: the ranks that choose together; None: all, where torch.distributed is initialised.

    Errors: ValueError and TypeError for arguments out of range, and for a projection that the model does not have.
    Source: CoLM (arXiv 2407.19580).
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.5,
        *,
        method: str = "facility_location",
        features: str = "exact",
        projection: str | None = None,
        sources: Mapping[Hashable, int] | None = None,
        directions: int = 8,
        fixed: bool = False,
        epsilon: float = 1e-3,
        num_coordinates: int | None = 2560,
        betas: tuple[float, float] | None = (0.9, 0.999),
        weights: str = "uniform",
        max_tokens: int | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        group: "dist.ProcessGroup | None" = None,
    ):
        self.keep = _check_keep(keep)
        for name, value, known in [
            ("method", method, METHODS),
            ("features", features, FEATURES),
            ("weights", weights, WEIGHTS),
        ]:
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        for name, count in [
            ("directions", directions),
            ("num_coordinates", num_coordinates),
            ("max_tokens", max_tokens),
        ]:
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not 0.0 < epsilon < math.inf:
            raise ValueError(f"epsilon: expected a positive number, got {epsilon}")
        if betas is not None and not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas: expected two numbers with 0 <= beta < 1, got {betas}")
        self.model = _unwrapped(model)
        self.method, self.features, self.weights = method, features, weights
        self.projection = projection
        self.sources = None if sources is None else dict(sources)
        self.directions, self.fixed, self.epsilon = directions, fixed, epsilon
        self.num_coordinates = num_coordinates
        self.max_tokens = max_tokens
        self.loss = loss
        self.seed = seed
        self.group = group
        self.step = 0
        self.moments = None if betas is None else AdamMoments(betas)
        if method == "facility_location":
            find_projection(self.model, projection)

    # ---- choosing

    def select(
        self, batch: Mapping[str, Any], sources: Sequence[Hashable] | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (selected, weights): which examples to train on, in order, and the weight of each.

        With several ranks every rank gives its own batch, of one size for all; `selected` counts through the batches
        of all ranks, and each rank gets an equal share of what all have chosen together: `subset` fetches the rows.

        Shapes: every tensor of batch (B, ...); sources one for each example, integers or strings (None: all are of one
                source). selected, weights (num_kept(B, keep),).
        Dtypes: selected int64, weights float32, on the device of the batch.
        Errors: TypeError for a batch without tensors; ValueError when sources has another length, a batch is too small
                for its sources or all of it comes from small ones, labels are missing, or a loss is not finite.
        Cost:   exact: one inference forward, and a backward from the loss to the projection; spsa: one forward and
                2 * directions from the projection's block on; then the features' distances within each source. Examples
                of sources that are kept whole are not scored.
        """
        size = batch_size_of(batch)
        ranks = Ranks(self.group)
        names = _names(sources, size)
        device = next(value.device for value in batch.values() if isinstance(value, Tensor) and value.dim())
        known = {source_id(name): name for name in (*names, *(self.sources or ()))}
        sizes = torch.cat(ranks.gather(torch.tensor([size], device=device))).tolist()
        if min(sizes) != max(sizes):
            raise ValueError(f"batch: expected as many examples on every rank, got {sizes}")
        ids = torch.cat(ranks.gather(torch.tensor([source_id(name) for name in names], device=device))).tolist()
        candidates = [known.get(number, number) for number in ids]
        total = ranks.size * num_kept(size, self.keep)
        budgets = plan_budgets(candidates, total, self.sources)

        rows_of: dict[Hashable, list[int]] = {}
        for row, name in enumerate(candidates):
            rows_of.setdefault(name, []).append(row)
        picks = {row: 1.0 for name, rows in rows_of.items() if budgets[name] == len(rows) for row in rows}
        large = {name: rows for name, rows in rows_of.items() if budgets[name] < len(rows)}
        if self.method == "random":
            picks = dict.fromkeys(self._draw(range(len(candidates)), total, "random"), 1.0)
        elif self.method == "stratified":
            for name, rows in large.items():
                drawn = self._draw(rows, budgets[name], f"stratified:{source_id(name)}")
                picks.update(dict.fromkeys(drawn, len(rows) / budgets[name]))
        elif large:
            picks.update(self._pick_by_features(batch, large, budgets, ranks, size))
        self.step += 1

        ordered = sorted(picks)
        selected = torch.tensor(ordered[ranks.rank :: ranks.size], device=device)
        if self.weights == "uniform":
            return selected, torch.ones(len(selected), device=device)
        stands_for = torch.tensor([picks[row] for row in selected.tolist()], device=device)
        return selected, stands_for * (len(ordered) / sum(picks.values()))

    def subset(
        self, batch: Mapping[str, Any], sources: Sequence[Hashable] | Tensor | None = None
    ) -> tuple[dict[str, Any], Tensor]:
        """As `select`, and the chosen rows of every tensor of the batch in place of their numbers.

        With several ranks, rows that others hold are fetched; all entries of the batch must then be tensors.
        """
        selected, weights = self.select(batch, sources)
        ranks = Ranks(self.group)
        if ranks.size == 1:
            return take_rows(batch, selected.tolist()), weights
        size = batch_size_of(batch)
        everything = {
            name: ranks.gather_columns(value, _FILL.get(name, 0))
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == size
            else value
            for name, value in batch.items()
        }
        return take_rows(everything, selected.tolist()), weights

    def _draw(self, rows: Sequence[int], count: int, purpose: str) -> list[int]:
        generator = random.Random(f"coreset:{self.seed}:{self.step}:{purpose}")
        keys = [generator.random() for _ in rows]
        return [rows[place] for place in sorted(range(len(rows)), key=keys.__getitem__)[:count]]

    # ---- features

    def score(self, batch: Mapping[str, Any], rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Losses (n,) and gradients (n, P), float32, of these examples of the batch (None: of all).

        P is the number of weights of the projection. Weights, gradients, modes and plans are left as they are.

        Errors: ValueError when labels are missing or a loss is not finite; those of `loss` and of the model.
        """
        rows = range(batch_size_of(batch)) if rows is None else rows
        if self.loss is None and "labels" not in batch:
            raise ValueError(f"batch: expected labels, or a selector with a loss function, got {', '.join(batch)}")
        projection = find_projection(self.model, self.projection)
        scorer = Scorer(self.model, projection, self.loss)
        num_out, num_in = linear_shape(projection.linear)
        losses = torch.empty(len(rows), device=scorer.device)
        grads = torch.empty(len(rows), num_out * num_in, device=scorer.device)
        place_of = {row: place for place, row in enumerate(rows)}
        directions = [] if self.features == "exact" else self._draw_directions((num_out, num_in), scorer.device)
        with as_scoring(self.model):
            for piece, inputs in scorer.micro_batches(batch, rows, self.max_tokens):
                places = torch.tensor([place_of[row] for row in piece], device=scorer.device)
                if self.features == "exact":
                    losses[places], grads[places] = scorer.exact(inputs)
                else:
                    losses[places], changes = scorer.spsa(inputs, directions, self.epsilon)
                    along = torch.stack([direction.flatten() for direction in directions])
                    with without_autocast(scorer.device.type):
                        grads[places] = changes @ along / len(directions)
        wrong = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"loss: expected finite losses, but {len(wrong)} of {len(rows)} are not, the first of them "
                f"{losses[wrong[0]].item()} for example {rows[wrong[0]]} of the batch"
            )
        return losses, grads

    def _draw_directions(self, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        step = 0 if self.fixed else self.step
        digest = hashlib.blake2b(f"coreset:{self.seed}:{step}".encode(), digest_size=7).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
        return [torch.randn(shape, generator=generator, device=device) for _ in range(self.directions)]

    def _pick_by_features(
        self,
        batch: Mapping[str, Any],
        large: Mapping[Hashable, list[int]],
        budgets: Mapping[Hashable, int],
        ranks: Ranks,
        size: int,
    ) -> dict[int, float]:
        """The picks of the large sources, each with the number of candidates that it stands for."""
        first = ranks.rank * size
        rows = sorted(row - first for members in large.values() for row in members if first <= row < first + size)
        _, grads = self.score(batch, rows)
        place_of = {row + first: place for place, row in enumerate(rows)}
        chosen: dict[int, float] = {}
        features = grads if self.moments is None else self._normalised(grads)
        for name, members in large.items():
            places = [place_of[row] for row in members if row in place_of]
            picks, counts = self.pick(features[places], budgets[name])
            chosen.update((members[pick], float(count)) for pick, count in zip(picks, counts, strict=True))
        if self.moments is not None:
            total = ranks.sum(grads.sum(0))
            self.moments.update(total / sum(map(len, large.values())))
        return chosen

    def _normalised(self, grads: Tensor) -> Tensor:
        assert self.moments is not None
        self.moments.check(grads.shape[1])
        self.moments.to(grads.device)
        return self.moments.normalise(grads)

    def pick(self, features: Tensor, num_picks: int) -> tuple[list[int], list[int]]:
        """Which of the examples with these features (n, P) stand best for all of them, and for how many each does."""
        ranks = Ranks(self.group)
        total = ranks.sum(features.sum(0))  # the mean times a number that moves no coordinate
        coordinates = largest_coordinates(total, self.num_coordinates)
        rows = torch.cat(ranks.gather(features[:, coordinates].contiguous()))
        distances = l1_distances(rows)
        picks, counts = facility_location(distances.max() - distances, num_picks)
        return picks.tolist(), counts.tolist()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that the next choice depends on beside model and batch: the step, which seeds every draw, and moments."""
        moments = None if self.moments is None else self.moments.state_dict()
        return {"version": STATE_VERSION, "step": self.step, "seed": self.seed, "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken.

        Errors: ValueError for the state of another version, of another seed, or with moments where this has none.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            got = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state: expected what state_dict of version {STATE_VERSION} returned, got {got}")
        if state["seed"] != self.seed:
            raise ValueError(f"seed: expected {state['seed']}, with which the state was saved, got {self.seed}")
        if (state["moments"] is None) != (self.moments is None):
            was, now = ("None" if m is None else "given" for m in (state["moments"], self.moments))
            raise ValueError(f"betas: expected {was}, with which the state was saved, got {now}")
        self.step = state["step"]
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])


def _check_keep(keep: float) -> float:
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"keep: expected a number with 0 < keep <= 1, got {keep!r}")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: expected 0 < keep <= 1, got {keep}")
    return float(keep)


def _names(sources: Sequence[Hashable] | Tensor | None, size: int) -> list[Hashable]:
    if sources is None:
        return [0] * size
    names = sources.tolist() if isinstance(sources, Tensor) else list(sources)
    if len(names) != size:
        raise ValueError(f"sources: expected one for each of the {size} examples of the batch, got {len(names)}")
    return names


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
