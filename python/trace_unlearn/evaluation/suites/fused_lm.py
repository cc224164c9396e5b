"""A model class of lm-evaluation-harness whose log-likelihoods need no logits. It is imported where lm-eval is."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.predictions import most_likely
from trace_unlearn.fusion.loss import FusedLoss, fuse_loss, fused_loss_of
from trace_unlearn.sources.encoding import IGNORE_INDEX

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class FusedLM(HFLM):  # type: ignore[misc]
    """lm-eval's `HFLM`, with its arguments, whose `loglikelihood` and `loglikelihood_rolling` make no [T, V] logits.

    Requests that differ in their last token only, as the letters of a multiple-choice question do, run as one row, and
    all their letters are scored in one pass over the output layer. Only the positions of continuations are multiplied
    with it. Log-probabilities are float32 whatever the model's dtype. Generation is `HFLM`'s, and so is everything for
    a model whose loss cannot be fused, which a warning names.

    Example (a model and its tokenizer in memory)::

        from lm_eval import simple_evaluate
        from trace_unlearn.evaluation.suites.fused_lm import FusedLM

        simple_evaluate(model=FusedLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks=["mmlu"])
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        handle = fused_loss_of(self.model) if self.backend == "causal" else None
        ours = handle is None
        try:
            if self.backend != "causal":
                raise UserError("only causal models are fused")
            handle = handle or fuse_loss(self.model)
        except UserError as error:
            logger.warning("computing logits, which takes more memory: %s", error)
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        router_loss = getattr(self.model.config, "output_router_logits", None)
        if router_loss:
            self.model.config.output_router_logits = False  # its loss would be added to every position
        try:
            return self._fused(handle, requests, disable_tqdm, override_bs)
        finally:
            if ours:
                handle()
            if router_loss:
                self.model.config.output_router_logits = router_loss

    def _fused(
        self, handle: FusedLoss, requests: list[Request], disable_tqdm: bool, override_bs: int | None
    ) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            groups.setdefault((*context, *continuation[:-1]), []).append(number)
        ordered = sorted(groups.items(), key=lambda group: (-len(group[0]), group[0]))
        size = override_bs or self.batch_size
        if size == "auto":
            with handle.paused():  # it tries with logits, which need more than what follows
                size = self._detect_batch_size([requests[numbers[0]] for _, numbers in ordered], 0) if ordered else 1
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(ordered), int(size)):
                some = ordered[start : start + int(size)]
                self._score(handle, some, requests, answers)
                bar.update(sum(len(numbers) for _, numbers in some))
        return answers

    def _score(
        self,
        handle: FusedLoss,
        groups: list[tuple[tuple[int, ...], list[int]]],
        requests: list[Request],
        answers: list[tuple[float, bool]],
    ) -> None:
        rows = [list(row[-self.max_length :]) for row, _ in groups]
        lasts = [list(dict.fromkeys(requests[number][2][-1] for number in numbers)) for _, numbers in groups]
        longest, width = max(map(len, rows)), max(map(len, lasts))
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        targets = torch.full((len(rows), longest, width), IGNORE_INDEX)
        for i, (row, last, (_, numbers)) in enumerate(zip(rows, lasts, groups, strict=True)):
            scored = max(len(requests[number][2]) for number in numbers)
            if scored > len(row):
                raise UserError(f"a continuation of {scored} tokens, allowed are up to {len(row)} of this model")
            ids[i, : len(row)] = torch.tensor(row)
            targets[i, len(row) - scored : len(row) - 1, 0] = ids[i, len(row) - scored + 1 : len(row)]
            targets[i, len(row) - 1, : len(last)] = torch.tensor(last)
        log_probs, best = self._predict(handle, ids.to(self.device), targets.to(self.device))
        for i, (row, last, (_, numbers)) in enumerate(zip(rows, lasts, groups, strict=True)):
            end = len(row) - 1
            for number in numbers:
                name, _, continuation = requests[number]
                at = last.index(continuation[-1])
                before = slice(end + 1 - len(continuation), end)
                total = log_probs[i, before, 0].double().sum() + log_probs[i, end, at]
                greedy = bool((best[i, before] == targets[i, before, 0]).all() and best[i, end] == continuation[-1])
                answers[number] = (float(total), greedy)
                if name is not None:
                    self.cache_hook.add_partial("loglikelihood", name, answers[number])

    def _predict(self, handle: FusedLoss, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, S, K] of the targets, and the most likely token [B, S], on the CPU."""
        where = (targets != IGNORE_INDEX).any(dim=2)

        def score(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            rows, wanted = hidden[where.to(hidden.device)], targets[where].to(hidden.device)
            options["ignore_index"] = IGNORE_INDEX
            if wanted.shape[1] == 1:
                stats = tk.linear_token_stats(rows, weight, wanted[:, 0], **options)
                return stats.log_prob[:, None], torch.where(stats.is_top1, wanted[:, 0], -1)
            log_probs = tk.linear_log_prob(rows, weight, wanted, **options)
            negated = options["logit_scale"] < 0
            return log_probs, most_likely(rows, weight, options["bias"], negated=negated)

        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast, handle.per_token(score):
            found, top = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        log_probs = torch.zeros(targets.shape, dtype=found.dtype)
        best = torch.full(targets.shape[:2], -1)
        log_probs[where.cpu()], best[where.cpu()] = found.cpu(), top.cpu()
        return log_probs, best
