"""When enough is forgotten, or too much: what decides is measured every so many steps, and at checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import loss_bearing
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.pace import factor
from trace_unlearn.training.passes import batches, in_eval

FORGET, RETAIN = "stop_forget_nll", "stop_retain_nll"  # their names in the log


class EarlyStop:
    """Measures the mean loss per token of forget documents and of held-out retain documents, and decides by it.

    A measure depends on the model alone, and all of them stand in the log, which checkpoints hold: a run that was
    killed comes to the same decisions when it goes on.

    Args:
        config: says what is measured, and the limits.
        forget: of its documents the first `config.stop_documents` are taken.
        held_out: retain documents that are not trained on, likewise.
        pad_token_id: for batches of them.
    """

    def __init__(
        self,
        config: TraceConfig,
        forget: datasets.Dataset | None,
        held_out: datasets.Dataset | None,
        pad_token_id: int,
    ) -> None:
        self._config, self._pad_token_id = config, pad_token_id
        given = {FORGET: forget if config.measures_forget else None, RETAIN: held_out}
        self._sets = {
            name: documents.select(range(min(config.stop_documents, len(documents))))
            for name, documents in given.items()
            if documents is not None
        }
        self._found: list[dict[str, float]] = []  # in the order of their steps

    def resume(self, log: Sequence[Mapping[str, float]]) -> None:
        """Takes what was measured before from the log of a run that goes on."""
        names = ("step", *self._sets)
        self._found = [{name: entry[name] for name in names} for entry in log if all(name in entry for name in names)]

    def due(self, step: int) -> bool:
        """Whether to measure after this step."""
        return self._config.stops and step % self._config.stop_every == 0

    def measured(self, step: int) -> bool:
        """Whether all that there is to measure at this step has been."""
        return not self._sets or (bool(self._found) and self._found[-1]["step"] == step)

    def measure(
        self,
        step: int,
        accelerator: Any,
        log_probs: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        args: TrainingArguments,
    ) -> dict[str, float]:
        """What is to be logged; all processes take part."""
        found: dict[str, float] = {}
        for name, documents in self._sets.items():
            sums = torch.zeros(2, dtype=torch.float64, device=args.device)
            for start, batch in batches(documents, self._pad_token_id, accelerator, args):
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                losses = -in_eval(model, log_probs, batch).where(bearing, 0.0)
                if start is not None:  # else a spare batch, which another process counts
                    sums += torch.stack([losses.double().sum(), bearing.sum().double()])
            total, tokens = accelerator.reduce(sums, "sum").tolist()
            found[name] = total / max(tokens, 1.0)
        self._found.append({"step": step, **found})
        return found

    def reached(self, step: int) -> bool:
        """Whether training stops by what was measured at this step; a NaN does stop it."""
        if not self.due(step) or not self._found or self._found[-1]["step"] != step:
            return False
        found, config = self._found[-1], self._config
        limits = [(FORGET, config.stop_forget_nll), (RETAIN, config.stop_retain_nll)]
        if config.stop_forget_increase is not None:
            limits.append((FORGET, self._found[0][FORGET] + config.stop_forget_increase))
        if config.stop_retain_increase is not None:
            limits.append((RETAIN, self._found[0][RETAIN] + config.stop_retain_increase))
        return any(not found[name] < limit for name, limit in limits if limit is not None)

    def factor(self, steps: int) -> float:
        """What the learning rate is multiplied by from now on, in a run of so many steps."""
        if not self._config.pace or not self._found:
            return 1.0
        config, start = self._config, self._found[0][FORGET]
        goals = [config.stop_forget_nll, config.best_forget_nll]
        if config.stop_forget_increase is not None:
            goals.append(start + config.stop_forget_increase)
        at = [(int(found["step"]), found[FORGET]) for found in self._found]
        due = [(step, nll) for step, nll in at if step % config.stop_every == 0]  # and not those of checkpoints
        return factor(due, min(goal for goal in goals if goal is not None), steps)

    def check_original(self) -> None:
        """UserError where the original model, measured last, has come to a limit already."""
        found = self._found[-1] if self._found else {}
        for name, limit in ((FORGET, "stop_forget_nll"), (RETAIN, "stop_retain_nll"), (FORGET, "best_forget_nll")):
            if (value := getattr(self._config, limit)) is not None and not found[name] < value:
                raise UserError(
                    f"{limit}: got {value}, but the original model's loss of these documents is {found[name]:.3f} "
                    "nats per token, allowed is more than that"
                )

    def is_best(self, step: int, best: int | None) -> bool:
        """Whether the checkpoint of this step, the last one measured, is better than that of step `best`."""
        return best is None or best == step or self._rank(self._at(step)) < self._rank(self._at(best))

    def choice(self, step: int) -> dict[str, Any]:
        """For the record: what decided for the checkpoint of this step."""
        found, original = self._at(step), self._found[0]
        return {
            "step": step,
            "reached": not self._rank(found)[0],
            "forget_nll": found[FORGET],
            "retain_nll": found[RETAIN],
            "original_forget_nll": original[FORGET],
            "original_retain_nll": original[RETAIN],
        }

    def _at(self, step: int) -> Mapping[str, float]:
        return next(found for found in reversed(self._found) if found["step"] == step)

    def _rank(self, found: Mapping[str, float]) -> tuple[int, float]:
        """The lower, the better: first those that forgot enough, by what they keep; then the others, by how much."""
        forget, retain = found[FORGET], found[RETAIN]
        assert self._config.best_forget_nll is not None
        if not (math.isfinite(forget) and math.isfinite(retain)):
            return 2, 0.0
        return (0, retain) if forget >= self._config.best_forget_nll else (1, -forget)
