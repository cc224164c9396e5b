"""What the trainers compute in place of open-unlearning's losses on logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

import trace_kernels as tk
from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.weights import attach_weights
from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning.documents import as_dataset, document_key, rows_of
from trace_unlearn.integrations.open_unlearning.fused import FusedTrainer, labels_of
from trace_unlearn.integrations.open_unlearning.hidden import fused_loss_of
from trace_unlearn.integrations.open_unlearning.versions import bridged
from trace_unlearn.routing.profile import profile_routing
from trace_unlearn.routing.statistics import DEFAULT_UNIT
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.training.objectives import ce_u, distance, dpo, npo, satimp, simnpo, undial, wga

METHODS = ("GradAscent", "GradDiff", "NPO", "DPO", "SimNPO", "WGA", "SatImp", "UNDIAL", "CEU", "RMU", "PDU")
_LOGITS = 1 << 25  # at a time, where the largest is looked for
_WITH_REFERENCE_MODEL = ("DPO", "UNDIAL", "RMU")


def trainer_class(base: type, method: str) -> type:
    """The class `Trace<method>`, of open-unlearning's class of that name."""
    mixin = {"GradAscent": _GradAscent, "CEU": _CEU, "RMU": _RMU, "PDU": _PDU}.get(method, _Trace)
    return type(f"Trace{method}", (mixin, bridged(base)), {"__module__": __name__, "method": method})


class _Retain(FusedTrainer):
    """The retain loss, token-weighted.

    Args:
        weights: the rule of `trace_unlearn.calibration.calibrate`: "balance", "product", "ratio"; "uniform" for none.
        unit: whose routing a weight looks at, see there; None for what it does by itself.
        experts_per_layer, min_ess: see there.
        args, kwargs: of the class it stands before.
    """

    method: str
    # open-unlearning's.
    alpha: float
    gamma: float
    ref_model: Any
    retain_loss_type: str

    def __init__(
        self,
        *args: Any,
        weights: str = "balance",
        unit: str | None = None,
        experts_per_layer: int = 4,
        min_ess: float = 0.5,
        **kwargs: Any,
    ) -> None:
        allowed = ("NLL", "KL", "EMBED_DIFF") if self.method == "RMU" else ("NLL", "KL")
        kind = kwargs.get("retain_loss_type", "NLL")
        if kind not in allowed:
            raise UserError(f"retain_loss_type: got {kind!r}, allowed are {', '.join(allowed)}")
        self._weights: dict[bytes, torch.Tensor] = {}
        super().__init__(*args, **kwargs)
        retains = self.alpha or self.method == "PDU"  # which raises alpha as it goes
        if self.train_dataset is not None and weights != "uniform" and retains:
            self._weigh(weights, DEFAULT_UNIT if unit is None else unit, experts_per_layer, min_ess)

    def _prepare_ref_model(self, model: Any) -> Any:
        """None where one number a forget document takes its place, or nothing reads it."""
        self.refuse_sharded()
        if self.retain_loss_type != "KL" and self.method not in _WITH_REFERENCE_MODEL:
            return None
        if self.retain_loss_type == "KL" or self.method == "UNDIAL":
            head = self.model.get_output_embeddings()
            if head.bias is not None:
                raise UserError(f"open-unlearning: the output embedding of {type(self.model).__name__} has a bias")
        return super()._prepare_ref_model(model)  # type: ignore[misc]

    def compute_retain_loss(self, model: Any, retain_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """open-unlearning's, weighted; also for subclasses with a forget loss of their own.

        It divides by the number of tokens, as without weights, and not by their sum: that would bring a batch of one
        document to the weight 1, whatever it was given.
        """
        weight, mask = self._retain_weight(retain_inputs)
        if self.retain_loss_type == "NLL":

            def nll(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
                return tk.linear_cross_entropy(hidden, head, target, weight, normalizer=mask.sum(), **options)

            return self.ask(model, retain_inputs, nll)  # type: ignore[no-any-return]
        reference = self._reference_states(retain_inputs)
        # There the mean is over all positions: what has no weight, the prompt and the padding, keeps 1.
        weight = weight.where(mask, 1.0)

        def kl(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
            return tk.linear_kl(hidden, head, *reference, weight, normalizer=weight.numel(), **_of_logits(options))

        return self.ask(model, retain_inputs, kl)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _reference_states(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the reference model, [B, S, H] and its head [V, H]."""
        heads = []

        def keep(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
            heads.append(weight.detach())
            return hidden.clone()

        hidden = self.ask(self.ref_model, inputs, keep)
        return hidden.to(heads[0].dtype), heads[0]  # under autocast it came as float32

    def _retain_weight(self, retain: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S]: the weight of every position, 0 where it bears no loss, and whether it does."""
        mask = bearing(labels_of(retain))
        if not self._weights:
            return mask.float(), mask
        weight = torch.zeros(mask.shape, dtype=torch.float32)
        for row, (ids, labels) in enumerate(rows_of(retain)):
            # Where a document begins depends on the side of the padding; what it labels does not. Behind padding on the
            # left there is a position before its first token, too.
            places = mask[row].nonzero()[:, 0].cpu()
            values = look_up(self._weights, document_key(ids, labels, self.pad_token_id), "retain")
            weight[row, places] = values[len(values) - len(places) :]
        return weight.to(mask.device), mask

    def _weigh(self, rule: str, unit: str, experts_per_layer: int, min_ess: float) -> None:
        with torch.random.fork_rng(devices=[]):  # some data sets draw answers
            forget, retain = (as_dataset(getattr(self.train_dataset, name)) for name in ("forget", "retain"))
        stats = profile_routing(
            self.model,
            forget,
            retain,
            batch_size=self.args.train_batch_size,
            pad_token_id=self.pad_token_id,
            progress=self.accelerator.is_main_process and not self.args.disable_tqdm,
            unit=unit,
        )
        selected = select_experts(stats, experts_per_layer=experts_per_layer)
        self.calibration = calibrate(stats, selected, rule=rule, unit=unit, min_ess=min_ess)
        if self.accelerator.is_main_process:
            print(self.calibration.summary())
        for row in attach_weights(retain, self.calibration):
            labels, weight = torch.tensor(row["labels"]), torch.tensor(row["token_weight"], dtype=torch.float32)
            key = document_key(torch.tensor(row["input_ids"]), labels, self.pad_token_id)
            before = torch.cat([torch.ones(1), weight[:-1]])  # of each label, at the position before it
            self._weights[key] = before[labels != IGNORE_INDEX]


class _Trace(_Retain):
    """Both losses from hidden states; before one of open-unlearning's classes."""

    beta: float
    beta1: float
    beta2: float
    delta: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reference: dict[bytes, float] = {}
        if self.method == "NPO" and self.train_dataset is not None:
            self._ask_reference()

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """open-unlearning's loss of the same name. Its batches nest their labels, so `num_items_in_batch` is None."""
        loss = self.gamma * self._forget_loss(model, inputs["forget"])
        if self.alpha:
            loss = loss + self.alpha * self.compute_retain_loss(model, inputs["retain"])
        return (loss, {"loss": loss}) if return_outputs else loss

    def _forget_loss(self, model: Any, forget: Mapping[str, Any]) -> torch.Tensor:
        if self.method == "GradDiff":
            return -self.ask(model, forget, tk.linear_cross_entropy)  # type: ignore[no-any-return]
        if self.method == "DPO":
            return self._preference(model, forget["original"], forget["alternate"])
        mask = bearing(labels_of(forget))
        if self.method == "UNDIAL":
            return undial(*self._divergence(model, forget), mask, mask.sum(), self.beta)
        log_probs = self.log_probs(model, forget)
        if self.method == "WGA":
            return wga(log_probs, mask, mask.sum(), self.beta)
        if self.method == "SatImp":
            return satimp(log_probs, mask, mask.sum(), self.beta1, self.beta2)
        if self.method == "NPO":
            keys = [document_key(ids, labels, self.pad_token_id) for ids, labels in rows_of(forget)]
            reference = log_probs.new_tensor([look_up(self._reference, key, "forget") for key in keys])
            # There a document without a label counts, too: with the loss of one that has not changed.
            return npo(log_probs, torch.ones_like(mask), reference, len(mask), self.beta)
        documents = mask.any(-1).sum()
        # There a document's length counts a labelled first token, which has no loss.
        length = (labels_of(forget) != IGNORE_INDEX).sum(-1, keepdim=True).clamp(min=1)
        log_probs = log_probs * (mask.sum(-1, keepdim=True) / length)
        return simnpo(log_probs, mask, documents, self.beta, self.delta)

    def _preference(
        self, model: Any, original: Mapping[str, torch.Tensor], alternate: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Both answers are asked of the reference model at every step: the alternate may be drawn anew."""
        original_log_probs, alternate_log_probs = (self.log_probs(model, answer) for answer in (original, alternate))
        with torch.no_grad():
            reference, of_alternate = (
                self.log_probs(self.ref_model, answer).sum(-1) for answer in (original, alternate)
            )
        gain = alternate_log_probs.sum(-1) - of_alternate
        everywhere = torch.ones_like(original_log_probs, dtype=torch.bool)  # as for NPO
        return dpo(original_log_probs, everywhere, reference, gain, len(everywhere), self.beta)

    def _divergence(
        self, model: Any, forget: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, S] each: log p of the next tokens, KL(reference || model), log p by the reference."""
        ref_hidden, ref_head = self._reference_states(forget)

        def all_of(
            hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, ignore_index: int, **options: Any
        ) -> tuple[torch.Tensor, ...]:
            kept = _of_logits(options)
            mask = target != ignore_index
            log_probs = tk.linear_log_prob(hidden, head, target, ignore_index=ignore_index, **kept)
            kl = tk.linear_kl(hidden, head, ref_hidden, ref_head, mask=mask, reduction="none", **kept)
            with torch.no_grad():
                reference = tk.linear_log_prob(ref_hidden, ref_head, target, ignore_index=ignore_index, **kept)
            return log_probs, kl, reference

        return self.ask(model, forget, all_of)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _ask_reference(self) -> None:
        """The original model's log-probability of each forget document."""
        documents, size = self.train_dataset.forget, self.args.train_batch_size
        training = self.model.training
        self.model.train(False)
        with torch.random.fork_rng(devices=[]):
            rows = [documents[i] for i in range(len(documents))]
        for start in range(0, len(documents), size):
            batch = self.data_collator(rows[start : start + size])
            batch = {name: value.to(self.args.device) for name, value in batch.items()}
            with self.accelerator.autocast():
                log_probs = self.log_probs(self.model, batch)
            for (ids, labels), value in zip(rows_of(batch), log_probs.sum(-1).tolist(), strict=True):
                self._reference[document_key(ids, labels, self.pad_token_id)] = value
        self.model.train(training)


class _ForgetOnly(FusedTrainer):
    """Without a retain loss there is nothing to weigh."""

    method: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [name for name in ("weights", "unit", "experts_per_layer", "min_ess") if name in kwargs]
        if given:
            raise UserError(
                f"{given[0]}: got {kwargs[given[0]]!r} for Trace{self.method}, which has no retain loss to weigh; "
                "allowed is TraceGradDiff, which ascends the forget set and has one"
            )
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._forget_loss(model, inputs["forget"])
        return (loss, {"loss": loss}) if return_outputs else loss

    def _forget_loss(self, model: Any, forget: Mapping[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


class _GradAscent(_ForgetOnly):
    def _forget_loss(self, model: Any, forget: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return -self.ask(model, forget, tk.linear_cross_entropy)  # type: ignore[no-any-return]


class _CEU(_ForgetOnly):
    ignore_first_n_answer_tokens: int

    def _forget_loss(self, model: Any, forget: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """open-unlearning's, less the entropy of its target, which has no gradient."""
        labelled = labels_of(forget) != IGNORE_INDEX
        first = labelled & (labelled.cumsum(-1) <= self.ignore_first_n_answer_tokens)
        labels = labels_of(forget).masked_fill(first, IGNORE_INDEX)
        mask = bearing(labels)
        return ce_u(self.log_probs(model, {**forget, "labels": labels}), mask, mask.sum())


class _PDU(_Retain):
    """Primal-dual: the largest logit is drawn to the mean one, and alpha grows while the retain loss is too high."""

    final_loss_value: Any

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        forget = inputs["forget"]
        labelled = labels_of(forget) != IGNORE_INDEX  # there the labelled positions count, not those before them

        def flatness(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
            if options["softcap"] is not None:
                raise UserError("TracePDU: this model caps its logits, whose mean then takes all of them: use PDU")
            rows = hidden[labelled.to(hidden.device)].float()
            above = largest_less_mean(rows, head, options["bias"]) * options["logit_scale"]
            return torch.as_tensor(above.square().sum() / max(len(rows), 1))

        losses = [self.ask(model, forget, flatness), self.compute_retain_loss(model, inputs["retain"])]
        loss = self.final_loss_value(losses)
        return (loss, {"loss": loss}) if return_outputs else loss


class _RMU(_Retain):
    """RMU's own losses on a layer's output; neither logits nor a loss on them is computed beside.

    Args:
        document_mean: whether a document's distances are divided by its own length. See `_mean`.
    """

    def __init__(self, *args: Any, document_mean: bool = False, **kwargs: Any) -> None:
        self.document_mean = document_mean
        _check_trained(kwargs["model"], list(kwargs.get("trainable_params_regex") or [".*"]))
        super().__init__(*args, **kwargs)

    model_module: Any
    ref_module: Any

    def forward_with_cache(
        self, model: Any, inputs: Mapping[str, torch.Tensor], module: Any, no_grad: bool = True
    ) -> Any:
        handle = fused_loss_of(self.accelerator.unwrap_model(model))
        assert handle is not None
        with handle.per_token(lambda hidden, *head, **options: hidden.new_zeros(())):
            return super().forward_with_cache(model, inputs, module, no_grad)  # type: ignore[misc]

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs)  # type: ignore[misc]

    def compute_retain_loss(self, model: Any, retain_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.retain_loss_type != "EMBED_DIFF":
            return super().compute_retain_loss(model, retain_inputs)
        hidden, _ = self.forward_with_cache(model, retain_inputs, self.model_module, no_grad=False)
        reference, _ = self.forward_with_cache(self.ref_model, retain_inputs, self.ref_module)
        weight, mask = self._retain_weight(retain_inputs)
        # There the labelled positions count, not those before them.
        labelled = retain_inputs["labels"] != IGNORE_INDEX
        return self._mean(distance(hidden, reference.to(hidden.device)), weight.where(mask, 1.0), labelled)

    def compute_activation_loss(
        self, activation1: torch.Tensor, activation2: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        distances = distance(activation1, activation2)
        return self._mean(distances, torch.ones_like(distances), mask)

    def _mean(self, distances: torch.Tensor, weight: torch.Tensor, labelled: torch.Tensor) -> torch.Tensor:
        """Of [B, S] distances over the labelled positions of each document, then over the documents.

        open-unlearning divides sums [B] by lengths [B, 1], which divides every sum by every length: the two are the
        same where all documents are of one length.
        """
        lengths = labelled.sum(-1)
        sums = (distances * weight).where(labelled, 0.0).sum(-1)[lengths > 0]
        lengths = lengths[lengths > 0]
        if len(lengths) == 0:
            return sums.sum()
        mean: torch.Tensor = (sums / lengths).mean() if self.document_mean else sums.mean() * (1 / lengths).mean()
        return mean


def largest_less_mean(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[N] float32: by how much the largest logit of each row is above the mean of its logits. Rows [N, H], head [V, H].

    The logits of a part of the rows at a time exist, to find the largest.
    """
    with torch.no_grad():
        part = max(1, _LOGITS // len(head))
        logits = (torch.nn.functional.linear(rows.to(head.dtype), head, bias) for rows in torch.split(hidden, part))
        index = torch.cat([found.argmax(-1) for found in logits] or [hidden.new_zeros(0, dtype=torch.long)])
    above = (hidden * (head[index].float() - head.float().mean(0))).sum(-1)
    return above if bias is None else above + bias[index].float() - bias.float().mean()


def bearing(labels: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: which positions bear loss, all whose next token is labelled."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return mask


def look_up(table: Mapping[bytes, Any], key: bytes, name: str) -> Any:
    if key not in table:
        raise UserError(f"open-unlearning: a {name} document of this batch was not in the data before training")
    return table[key]


def _of_logits(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("softcap", "logit_scale")}


def _check_trained(model: Any, patterns: list[str]) -> None:
    """UserError where RMU would train nothing, as it does without a word."""
    names = [name for name, _ in model.named_parameters()]
    if not any(re.fullmatch(pattern, name) for pattern in patterns for name in names):
        some = [name for name in names if "down_proj" in name] or [name for name in names if "mlp" in name]
        raise UserError(
            f"trainable_params_regex: {', '.join(patterns)} matches no parameter of {type(model).__name__}, which has "
            f"such as {', '.join(some[:3])}; a pattern must match a whole name, as "
            r"'model\.layers\.(5|6|7)\.mlp\.experts.*down_proj.*' does"
        )
