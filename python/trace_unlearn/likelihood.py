"""Log-likelihoods of token rows, and the experts a model chooses on the way."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from trace_unlearn.data import collate, loss_bearing
from trace_unlearn.encoding import IGNORE_INDEX
from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_loss, fused_loss_of
from trace_unlearn.routing import RoutingRecorder

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]


class Routes(NamedTuple):
    """The experts of a data set's loss-bearing tokens.

    Attributes:
        routes: [N, L, k] int16, of the first N tokens in data order; -1 fills layers of smaller k.
        counts: [L, E] int64, over all tokens.
    """

    routes: Tensor
    counts: Tensor


class Likelihood(NamedTuple):
    """The mean negative log-likelihood of the loss-bearing tokens in nats, their number, and their experts."""

    nll: float
    tokens: int
    routes: Routes | None


def log_likelihood(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 8,
    keep_routes: int | None = None,
    label: str = "",
    progress: bool = True,
) -> Likelihood:
    """Runs `model` once over `dataset`, without logits where the model's loss can be fused.

    Args:
        model: a causal language model.
        dataset: rows as `load_tokens` gives them.
        batch_size: rows of one forward, in data order.
        keep_routes: for how many tokens to keep the chosen experts; None does not look at them (dense models).
        label: what the progress bar says.
        progress: whether to show it.
    """
    recorder = None if keep_routes is None else RoutingRecorder(model, store_routes=True)
    total, tokens, kept = 0.0, 0, 0
    routes: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        log_probs = stack.enter_context(next_log_probs(model))
        if recorder is not None:
            stack.enter_context(recorder)
        for batch in batches(dataset, batch_size, model.device, f"{label}: likelihood", progress):
            bearing = loss_bearing(batch["labels"], batch["attention_mask"])
            if recorder is not None:
                recorder.mask_next(bearing)
            found = log_probs(batch)
            total -= found.double().sum().item()
            tokens += int(bearing.sum())
            if recorder is not None and keep_routes is not None and kept < keep_routes:
                assert recorder.routes is not None
                routes.append(recorder.routes[bearing.to(recorder.routes.device)].to("cpu", torch.int16))
                kept += len(routes[-1])
    seen = None if recorder is None else Routes(torch.cat(routes)[:keep_routes], recorder.counts.cpu())
    return Likelihood(total / tokens if tokens else float("nan"), tokens, seen)


@contextlib.contextmanager
def next_log_probs(model: PreTrainedModel) -> Iterator[Callable[[Batch], Tensor]]:
    """Gives a function from a batch to float32 [B, S]: log p(labels[t+1] | tokens up to t), 0 where t bears no loss.

    The logits never exist, except for models whose loss cannot be fused: these are named in a warning.
    """
    auxiliary = getattr(model.config, "output_router_logits", None)
    if auxiliary:
        model.config.output_router_logits = False  # its loss would be added to every position
    found = _LogProbs(model)
    try:
        yield found
    finally:
        found.close()
        if auxiliary:
            model.config.output_router_logits = auxiliary


class _LogProbs:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.handle = fused_loss_of(model)
        self.ours = self.handle is None
        if self.ours:
            try:
                self.handle = fuse_loss(model)
            except UserError as error:
                self._fall_back(error)

    def __call__(self, batch: Batch) -> Tensor:
        if self.handle is not None:
            try:
                with self.handle.log_probs():
                    found: Tensor = self.model(**batch, use_cache=False).loss
                return found
            except UserError as error:  # an operation on the logits that cannot be fused
                self._fall_back(error)
        return self._from_logits(batch)

    def _from_logits(self, batch: Batch) -> Tensor:
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = self.model(**tokens, use_cache=False).logits
        found = torch.zeros(batch["labels"].shape, device=logits.device)
        for row, labels in enumerate(batch["labels"].to(logits.device)):
            positions = (labels[1:] != IGNORE_INDEX).nonzero().flatten()
            log_p = logits[row, positions].float().log_softmax(-1)
            found[row, positions] = log_p.gather(1, labels[positions + 1].unsqueeze(1)).squeeze(1)
        return found

    def _fall_back(self, error: UserError) -> None:
        logger.warning("computing logits, which takes more memory: %s", error)
        self.close()

    def close(self) -> None:
        if self.handle is not None and self.ours:
            self.handle()
        self.handle = None


def batches(
    dataset: datasets.Dataset, batch_size: int, device: torch.device, label: str, progress: bool
) -> Iterator[Batch]:
    """Batches in data order, padded on the right, on `device`."""
    columns = dataset.select_columns(["input_ids", "labels"])
    with tqdm(total=len(dataset), desc=label, unit=" rows", disable=not progress) as bar:
        for start in range(0, len(dataset), batch_size):
            some = columns[start : start + batch_size]
            pairs = zip(some["input_ids"], some["labels"], strict=True)
            rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
            yield {name: tensor.to(device) for name, tensor in collate(rows, pad_token_id=0).items()}
            bar.update(len(rows))


def routing_shift(before: Routes, after: Routes) -> dict[str, Any]:
    """How the experts of the same tokens differ between two models.

    For a token, a layer and its k slots, `changed` counts the experts of `after` that `before` did not choose, over k.
    `total_variation` of a layer is 1/2 sum_e |p(e) - q(e)|, with p and q the experts' shares of all assignments.

    Returns:
        changed, total_variation (means over layers), changed_per_layer, total_variation_per_layer, tokens.

    >>> before = Routes(torch.tensor([[[0, 1]], [[2, 3]]]), torch.tensor([[1, 1, 1, 1]]))
    >>> after = Routes(torch.tensor([[[1, 0]], [[2, 0]]]), torch.tensor([[2, 1, 1, 0]]))
    >>> shift = routing_shift(before, after)
    >>> shift["changed"], shift["total_variation"], shift["tokens"]
    (0.25, 0.25, 2)
    """
    if before.routes.shape != after.routes.shape or before.counts.shape != after.counts.shape:
        raise UserError(
            f"base: its routing has the shape {tuple(before.routes.shape)} (tokens, layers, experts a token) of "
            f"{before.counts.shape[1]} experts, the model's {tuple(after.routes.shape)} of {after.counts.shape[1]}: "
            "another architecture, or other data"
        )
    changes = torch.zeros(after.routes.shape[1], dtype=torch.float64)
    slots = torch.zeros_like(changes)
    for start in range(0, len(after.routes), 4096):  # a piece at a time: the comparison is [n, L, k, k]
        old, new = before.routes[start : start + 4096], after.routes[start : start + 4096]
        filled = new >= 0
        changes += (filled & (new.unsqueeze(-1) != old.unsqueeze(-2)).all(-1)).sum((0, 2))
        slots += filled.sum((0, 2))
    changed = changes / slots.clamp(min=1)
    p, q = (found.counts.double() / found.counts.sum(1, keepdim=True).clamp(min=1) for found in (before, after))
    variation = (p - q).abs().sum(1) / 2
    return {
        "changed": changed.mean().item(),
        "total_variation": variation.mean().item(),
        "changed_per_layer": changed.tolist(),
        "total_variation_per_layer": variation.tolist(),
        "tokens": len(after.routes),
    }
