"""The knobs of the method, checked."""

from __future__ import annotations

import dataclasses
import math

from trace_unlearn.checks import check_integers, check_numbers, check_word
from trace_unlearn.errors import UserError
from trace_unlearn.routing.statistics import UNITS
from trace_unlearn.training.objectives import OBJECTIVES, Knobs, Objective

WEIGHTINGS = ("reference", "live", "uniform")
RETAIN_LOSSES = ("nll", "kl")
# What is measured for each of these limits.
_LIMITS = {
    "stop_forget_nll": ("forget",),
    "stop_forget_increase": ("forget",),
    "stop_retain_nll": ("retain",),
    "stop_retain_increase": ("retain",),
    "best_forget_nll": ("forget", "retain"),
}


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """The knobs of the method: loss = gamma * forget loss + alpha * weighted retain loss.

    Attributes:
        objective: what is done to the forget set, one of `trace_unlearn.training.objectives.OBJECTIVES`. "grad_ascent"
            has no retain loss; "finetune" has nothing else, and learns the retain set: for targets and retrained
            references.
        gamma: weight of the forget loss.
        alpha: weight of the retain loss.
        beta: the objective's own strength; by default as published: 0.1 for "npo" and "dpo" (smaller is closer to plain
            ascent), 4.5 for "simnpo", 1 for "wga" and 5 for "satimp" (the power of the probability), 10 for "undial"
            (by how much a logit is lowered).
        beta2: of "satimp": the power of 1 - p. For people who reproduce or tune it.
        delta: of "simnpo": the margin, in nats per token, below which a document counts as remembered.
        layer: of "rmu": the decoder layer whose output is steered; by default a quarter of the way up.
        steering: of "rmu": the length of the steering vector; of the order of the layer's own hidden states or more.
        retain_loss: "nll" (what the retain tokens say) or "kl" (what the original model says of them: it keeps the
            behaviour where the data does not show it, and costs twice the output layer). "rmu" has its own.
        weighting: "reference": each retain token has the weight that the original model's routing gave it, stored in
            the dataset; "live": the routing of this very forward decides; "uniform": all tokens weigh the same.
            "finetune" is always uniform.
        unit: whose routing a weight looks at, as `calibrate` has it: "token", "context" or "document". None takes what
            the calibration was made with; another than that is refused.
        retain_per_forget: retain documents per forget document; for "finetune", documents per position of the batch.
        anchor: weight of the SEUF anchor loss, which keeps the forget tokens on `anchor_experts`; 0 for none. For the
            SEUF baseline and combinations with it, where only these experts are trained.
        anchor_experts: the (decoder layer, expert) pairs of the anchor.
        stop_forget_nll: training stops once the forget documents' mean loss has risen to so many nats per token; None
            for never.
        stop_forget_increase: likewise, but so many nats above the original model's.
        stop_retain_nll: likewise of held-out retain documents: too much was lost.
        stop_retain_increase: likewise, but so many nats above the original model's.
        stop_every: steps between two measures.
        stop_documents: they are taken on the first so many documents of a set.
        best_forget_nll: the result is not the last model but the best checkpoint: of those whose forget documents'
            mean loss is at least this, the one with the lowest loss of held-out retain documents; where none is, the
            one with the highest forget loss. None for the last.
        pace: whether the learning rate is doubled where the forget loss rises too slowly to come to `stop_forget_nll`,
            `stop_forget_increase` or `best_forget_nll` within the run's steps, and halved where it rises fast; decided
            at every measure.
    """

    objective: str = "grad_diff"
    gamma: float = 1.0
    alpha: float = 1.0
    beta: float | None = None
    beta2: float = 1.0
    delta: float = 0.0
    layer: int | None = None
    steering: float = 2.0
    retain_loss: str = "nll"
    weighting: str = "reference"
    unit: str | None = None
    retain_per_forget: int = 1
    anchor: float = 0.0
    anchor_experts: tuple[tuple[int, int], ...] = ()
    stop_forget_nll: float | None = None
    stop_forget_increase: float | None = None
    stop_retain_nll: float | None = None
    stop_retain_increase: float | None = None
    stop_every: int = 10
    stop_documents: int = 64
    best_forget_nll: float | None = None
    pace: bool = False

    def __post_init__(self) -> None:
        check_word("objective", self.objective, OBJECTIVES)
        check_word("weighting", self.weighting, WEIGHTINGS)
        check_word("retain_loss", self.retain_loss, RETAIN_LOSSES)
        if self.unit is not None:
            check_word("unit", self.unit, UNITS)
        if self.beta is None:
            object.__setattr__(self, "beta", self.method.beta)
        check_numbers(self, "gamma", "alpha", "beta2", "anchor")
        check_numbers(self, "beta", "steering", *_LIMITS, above_0=True)
        check_integers(self, retain_per_forget=1, stop_every=1, stop_documents=1, layer=0)
        if not math.isfinite(self.delta):
            raise UserError(f"delta: got {self.delta}, allowed are finite numbers")
        for name, measured in _LIMITS.items():
            limit = getattr(self, name)
            if limit is not None and (self.method.on_hidden_states or not all(self.needs[which] for which in measured)):
                raise UserError(f"{name}: got {limit}, but objective {self.objective!r} measures no such loss")
        stop, best = self.stop_forget_nll, self.best_forget_nll
        if stop is not None and best is not None and stop <= best:
            raise UserError(
                f"best_forget_nll: got {best}, allowed is less than stop_forget_nll, {stop}, where training stops: "
                "else there is nothing to choose from"
            )
        if self.pace and not self.measures_forget:
            raise UserError("pace: got true, but neither stop_forget_nll, stop_forget_increase nor best_forget_nll")
        if self.retain_loss == "kl" and (self.method.on_hidden_states or not self.method.uses_retain):
            raise UserError(f"retain_loss: got 'kl', but objective {self.objective!r} has no such retain loss")
        if self.anchor and (self.method.on_hidden_states or self.method.forget_loss is None):
            raise UserError(f"anchor: got {self.anchor}, but objective {self.objective!r} takes none")

    @property
    def method(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def knobs(self) -> Knobs:
        assert self.beta is not None  # set above, where none came
        return Knobs(self.beta, self.beta2, self.delta)

    @property
    def needs(self) -> dict[str, bool]:
        """Which sets the objective uses."""
        return {
            "forget": self.method.forget_loss is not None,
            "retain": self.method.uses_retain,
            "alternate": self.method.needs_alternate,
        }

    @property
    def routes_weigh(self) -> bool:
        """Whether retain tokens are weighed by routing."""
        return self.weighting != "uniform" and self.method.uses_retain and self.method.forget_loss is not None

    @property
    def stops(self) -> bool:
        """Whether the model is measured while it is trained: training may stop early, or its pace change."""
        return self.pace or any(getattr(self, name) is not None for name in _LIMITS if name != "best_forget_nll")

    @property
    def measures_forget(self) -> bool:
        """Whether the forget documents' loss is measured."""
        return any(getattr(self, name) is not None for name, measured in _LIMITS.items() if "forget" in measured)

    @property
    def holds_out(self) -> bool:
        """Whether the loss of held-out retain documents is measured."""
        return any(getattr(self, name) is not None for name, measured in _LIMITS.items() if "retain" in measured)
