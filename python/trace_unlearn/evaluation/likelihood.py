"""Log-likelihoods of token rows, and the experts a model chooses on the way."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.metrics import exact_memorization, extraction_strength
from trace_unlearn.evaluation.predictions import Batch, predictions
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.sources.data import collate, loss_bearing
from trace_unlearn.sources.model import input_device

logger = logging.getLogger(__name__)


class Routes(NamedTuple):
    """The experts of a data set's loss-bearing tokens.

    Attributes:
        routes: [N, L, k] int16, of the first N tokens in data order; -1 fills layers of smaller k.
        counts: [L, E] int64, over all tokens.
    """

    routes: Tensor
    counts: Tensor


class Likelihood(NamedTuple):
    """Of a data set's loss-bearing tokens.

    Attributes:
        nll: their mean negative log-likelihood in nats.
        tokens: their number.
        routes: their experts, where asked for.
        exact_memorization: where asked for, the mean over rows of
            `trace_unlearn.evaluation.metrics.exact_memorization`, without the end-of-sequence token.
        extraction_strength: likewise.
        answers: likewise, how many rows have an answer, other than the end-of-sequence token.
        fact_accuracy: of these, the share whose last answer is all of most likely tokens; None where there are none.
    """

    nll: float
    tokens: int
    routes: Routes | None = None
    exact_memorization: float | None = None
    extraction_strength: float | None = None
    answers: int = 0
    fact_accuracy: float | None = None


def log_likelihood(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 8,
    keep_routes: int | None = None,
    recited: bool = False,
    eos: int | None = None,
    around: Callable[[Batch], contextlib.AbstractContextManager[None]] | None = None,
    label: str = "",
    progress: bool = True,
) -> Likelihood:
    """Runs `model` once over `dataset`, without logits where the model's loss can be fused.

    Args:
        model: a causal language model.
        dataset: rows as `load_tokens` gives them.
        batch_size: rows of one forward, in data order.
        keep_routes: for how many tokens to keep the chosen experts; None does not look at them (dense models).
        recited: whether exact memorisation, extraction strength and fact accuracy are measured, for the output layer a
            second time.
        eos: the end-of-sequence token, which does not count as recited.
        around: gives for a batch what is entered around its forward.
        label: what the progress bar says.
        progress: whether to show it.
    """
    recorder = None if keep_routes is None else RoutingRecorder(model, store_routes=True)
    total, tokens, kept = 0.0, 0, 0
    routes: list[Tensor] = []
    recitals: list[tuple[list[bool], list[bool]]] = []
    with contextlib.ExitStack() as stack:
        predict = stack.enter_context(predictions(model))
        if recorder is not None:
            stack.enter_context(recorder)
        for batch in batches(dataset, batch_size, input_device(model), f"{label}: likelihood", progress):
            bearing = loss_bearing(batch["labels"], batch["attention_mask"])
            if recorder is not None:
                recorder.mask_next(bearing)
            with contextlib.nullcontext() if around is None else around(batch):
                log_probs, correct = predict(batch, correct=recited)
            total -= log_probs.double().sum().item()
            tokens += int(bearing.sum())
            if recited:
                recitals += _recitals(batch["labels"], bearing, correct, eos)
            if recorder is not None and keep_routes is not None and kept < keep_routes:
                assert recorder.routes is not None
                routes.append(recorder.routes[bearing.to(recorder.routes.device)].to("cpu", torch.int16))
                kept += len(routes[-1])
    seen = None if recorder is None else Routes(torch.cat(routes)[:keep_routes], recorder.counts.cpu())
    nll = total / tokens if tokens else float("nan")
    if tokens and math.isnan(nll):
        logger.warning("%s: the model gives no numbers (NaN): it has diverged, its other measures mean nothing", label)
    texts = [text for text, _ in recitals if text]
    if not texts:
        return Likelihood(nll, tokens, seen)
    exact, strength = (sum(map(measure, texts)) / len(texts) for measure in (exact_memorization, extraction_strength))
    facts = [all(last) for given, (_, last) in zip(dataset["answer"], recitals, strict=True) if given and last]
    accuracy = sum(facts) / len(facts) if facts else None
    return Likelihood(nll, tokens, seen, exact, strength, len(facts), accuracy)


def _recitals(
    labels: Tensor, bearing: Tensor, correct: Tensor, eos: int | None
) -> Iterator[tuple[list[bool], list[bool]]]:
    """Of each row, whether its loss-bearing tokens are the most likely ones, and of its last answer alone.

    Neither has a last `eos`, and both may be empty. The last answer is the last run of loss-bearing positions.
    """
    for row, where, right in zip(labels.cpu(), bearing.cpu(), correct.cpu(), strict=True):
        positions = where.nonzero().flatten()
        gaps = (positions.diff() > 1).nonzero().flatten()
        start = int(gaps[-1]) + 1 if len(gaps) else 0
        if len(positions) and row[positions[-1] + 1] == eos:
            positions = positions[:-1]
        hits = right[positions].tolist()
        yield hits, hits[start:]


def batches(
    dataset: datasets.Dataset, batch_size: int, device: torch.device, label: str, progress: bool
) -> Iterator[Batch]:
    """Batches in data order, padded on the right, on `device`."""
    columns = dataset.select_columns(["input_ids", "labels"])
    with tqdm(total=len(dataset), desc=label, unit=" rows", disable=None if progress else True) as bar:
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
            f"base: its routing has the shape {tuple(before.routes.shape)} (tokens, layers, experts per token) of "
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
