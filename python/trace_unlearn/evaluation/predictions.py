"""What a model predicts of the next tokens: their log-probabilities, and whether they are the most likely ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.fusion.loss import fuse_loss, fused_loss_of
from trace_unlearn.sources.data import collate, loss_bearing
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.sources.model import input_device

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
TOKENS, WORDS = 1024, 16384  # a tile of logits when the most likely token is sought: 64 MiB


class RowScores(NamedTuple):
    """Of a row's loss-bearing tokens: log p, [n] float32, and whether each is the most likely one, [n] bool."""

    log_probs: Tensor
    correct: Tensor

    @property
    def nll(self) -> float:
        """The mean of -log p, in nats; NaN without tokens."""
        return -self.log_probs.double().mean().item()


def row_scores(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    correct: bool = False,
    label: str = "",
    progress: bool = True,
) -> list[RowScores]:
    """The scores of each row, in order.

    Args:
        model: a causal language model.
        rows: each with `input_ids` and `labels`, as `load_tokens` gives them.
        batch_size: rows of one forward.
        correct: whether the most likely tokens are sought, which costs the output layer a second time; without it all
            are False.
        label: what the progress bar says.
        progress: whether to show it.
    """
    found: list[RowScores] = []
    with (
        predictions(model) as predict,
        tqdm(total=len(rows), desc=label, unit=" rows", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            batch = {name: value.to(input_device(model)) for name, value in collate(some, pad_token_id=0).items()}
            log_probs, best = predict(batch, correct=correct)
            bearing = loss_bearing(batch["labels"], batch["attention_mask"]).cpu()
            log_probs, best = log_probs.float().cpu(), best.cpu()
            found += [RowScores(log_probs[i, where], best[i, where]) for i, where in enumerate(bearing)]
            bar.update(len(some))
    return found


@contextlib.contextmanager
def predictions(model: PreTrainedModel) -> Iterator[Predictor]:
    """Gives a `Predictor` of `model`.

    The logits never exist, except for models whose loss cannot be fused: these are named in a warning.
    """
    auxiliary = getattr(model.config, "output_router_logits", None)
    if auxiliary:
        model.config.output_router_logits = False  # its loss would be added to every position
    found = Predictor(model)
    try:
        yield found
    finally:
        found.close()
        if auxiliary:
            model.config.output_router_logits = auxiliary


class Predictor:
    """From a batch to [B, S]: log p(labels[t+1] | tokens up to t) in float32, and whether labels[t+1] is most likely.

    Both are 0 where t bears no loss, and the second is 0 everywhere unless `correct` asks for it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.handle = fused_loss_of(model)
        self.ours = self.handle is None
        if self.ours:
            try:
                self.handle = fuse_loss(model)
            except UserError as error:
                self._fall_back(error)

    def __call__(self, batch: Batch, *, correct: bool = False) -> tuple[Tensor, Tensor]:
        if self.handle is not None:
            try:
                with self.handle.per_token(_both if correct else _log_prob):
                    log_probs, best = self.model(**batch, use_cache=False).loss
                return log_probs, best
            except UserError as error:  # an operation on the logits that cannot be fused
                self._fall_back(error)
        return self._from_logits(batch)

    def _from_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**tokens, use_cache=False).logits
        found = torch.zeros(batch["labels"].shape, dtype=torch.float32, device=logits.device)
        best = torch.zeros_like(found, dtype=torch.bool)
        for row, labels in enumerate(batch["labels"].to(logits.device)):
            positions = (labels[1:] != IGNORE_INDEX).nonzero().flatten()
            log_p = logits[row, positions].float().log_softmax(-1)
            found[row, positions] = log_p.gather(1, labels[positions + 1].unsqueeze(1)).squeeze(1)
            best[row, positions] = log_p.argmax(-1) == labels[positions + 1]
        return found, best

    def _fall_back(self, error: UserError) -> None:
        logger.warning("computing logits, which takes more memory: %s", error)
        self.close()

    def close(self) -> None:
        if self.handle is not None and self.ours:
            self.handle()
        self.handle = None


def _log_prob(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    # Cloned, since FSDP warns of a module that returns a view.
    log_probs = tk.linear_log_prob(hidden, weight, target, **options).clone()
    return log_probs, torch.zeros_like(log_probs, dtype=torch.bool)


def _both(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    log_probs, best = _log_prob(hidden, weight, target, **options)
    where = target != options["ignore_index"]
    if bool(where.any()):
        found = most_likely(hidden[where], weight, options["bias"], negated=options["logit_scale"] < 0)
        best[where] = found == target[where]
    return log_probs, best


def most_likely(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, negated: bool = False) -> Tensor:
    """The index of the largest of the float32 logits, [N] int64; a tile of them exists at a time.

    In bfloat16, logits that differ by less than their rounding would tie. A soft cap and a scale keep the order;
    `negated` is for a negative scale.

    >>> most_likely(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    tensor([2])
    """
    found = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
    for first in range(0, len(hidden), TOKENS):
        rows = hidden[first : first + TOKENS].float()
        largest = rows.new_full((len(rows),), -torch.inf)
        index = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for low in range(0, len(weight), WORDS):
            logits = rows @ weight[low : low + WORDS].float().T
            if bias is not None:
                logits += bias[low : low + WORDS]
            top = (-logits if negated else logits).max(dim=1)
            index = torch.where(top.values > largest, top.indices + low, index)
            largest = torch.maximum(largest, top.values)
        found[first : first + TOKENS] = index
    return found
