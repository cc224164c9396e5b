"""What the trainers compute in place of open-unlearning's losses on logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch

from trace_unlearn.calibrate import calibrate, select_experts
from trace_unlearn.encoding import IGNORE_INDEX
from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_loss
from trace_unlearn.objectives import grad_diff, npo, simnpo, weighted_nll
from trace_unlearn.profile import profile_routing
from trace_unlearn.weights import attach_weights

METHODS = ("GradDiff", "NPO", "SimNPO")


def trainer_class(base: type, method: str) -> type:
    """The class `Trace<method>`, of open-unlearning's class of that name."""
    return type(f"Trace{method}", (_Trace, base), {"__module__": __name__, "method": method})


class _Trace:
    """Losses from hidden states, token-weighted on the retain side; before one of open-unlearning's classes.

    Args:
        weights: the rule of `trace_unlearn.calibrate`: "balance", "product", "ratio"; "uniform" for none.
        experts_per_layer, min_ess: see there.
        args, kwargs: of the class it stands before.
    """

    method: str
    # Trainer's and open-unlearning's.
    model: Any
    args: Any
    alpha: float
    gamma: float
    beta: float
    delta: float
    train_dataset: Any
    data_collator: Any
    accelerator: Any
    retain_loss_type: str

    def __init__(
        self, *args: Any, weights: str = "balance", experts_per_layer: int = 4, min_ess: float = 0.5, **kwargs: Any
    ) -> None:
        if kwargs.get("retain_loss_type", "NLL") != "NLL":
            raise UserError(
                f"retain_loss_type: got {kwargs['retain_loss_type']!r}, allowed is 'NLL'; "
                "for KL without logits use trace-unlearn with retain_loss: kl"
            )
        takes = inspect.signature(_trainer_init(type(self))).parameters
        if "tokenizer" in kwargs and "tokenizer" not in takes:  # transformers 5 named it anew
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(*args, **kwargs)
        if _sharded(self):
            raise UserError(
                "open-unlearning: the model is sharded (DeepSpeed, FSDP), and TRACE reads the whole one before "
                "training; run trace-unlearn, whose trainer takes sharded models"
            )
        self.tokenizer_pad = int(_pad_token_id(self))
        self._fused = fuse_loss(self.model)
        self._weights: dict[bytes, torch.Tensor] = {}
        self._reference: dict[bytes, float] = {}
        if self.train_dataset is None:
            return
        if weights != "uniform":
            self._weigh(weights, experts_per_layer, min_ess)
        if self.method == "NPO":
            self._ask_reference()

    def _prepare_ref_model(self, model: Any) -> None:
        """None: one number a forget document takes its place."""

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """open-unlearning's loss of the same name. Its batches nest their labels, so `num_items_in_batch` is None."""
        forget, retain = inputs["forget"], inputs["retain"]
        log_probs, mask = self._log_probs(model, forget)
        count = mask.any(-1).sum()
        if self.method == "GradDiff":
            forget_loss = grad_diff(log_probs, mask, mask.sum())
        elif self.method == "NPO":
            keys = [_key(ids, labels) for ids, labels in _rows(forget)]
            reference = log_probs.new_tensor([self._lookup(self._reference, key, "forget") for key in keys])
            forget_loss = npo(log_probs, mask, reference, count, self.beta)
        else:
            forget_loss = simnpo(log_probs, mask, count, self.beta, self.delta)
        retain_log_probs, retain_mask = self._log_probs(model, retain)
        weight = self._retain_weight(retain, retain_mask)
        loss = self.gamma * forget_loss + self.alpha * weighted_nll(retain_log_probs, weight, weight.sum())
        return (loss, {"loss": loss}) if return_outputs else loss

    def compute_retain_loss(self, model: Any, retain_inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """For subclasses with a forget loss of their own."""
        log_probs, mask = self._log_probs(model, retain_inputs)
        weight = self._retain_weight(retain_inputs, mask)
        return weighted_nll(log_probs, weight, weight.sum())

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As before: evaluation code reads logits of batches that have labels."""
        with self._fused.paused():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _log_probs(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log p of every next token [B, S], and which of them bear loss: all that are labelled."""
        given: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        if getattr(self.model.config, "output_router_logits", False):
            given["output_router_logits"] = False  # the auxiliary loss would be ascended, too
        with self._fused.log_probs():
            found = model(**given, use_cache=False).loss
        mask = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        mask[:, :-1] = inputs["labels"][:, 1:] != IGNORE_INDEX
        return found, mask

    def _retain_weight(self, retain: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        if not self._weights:
            return mask.float()
        weight = torch.zeros(mask.shape)
        for row, (ids, labels) in enumerate(_rows(retain)):
            found = self._lookup(self._weights, _key(ids, labels), "retain")
            # Where a document begins depends on the side of the padding; what it labels does not.
            weight[row, mask[row].cpu()] = found
        return weight.to(mask.device)

    def _lookup(self, table: Mapping[bytes, Any], key: bytes, name: str) -> Any:
        if key not in table:
            raise UserError(f"open-unlearning: a {name} document of this batch was not in the data before training")
        return table[key]

    def _weigh(self, rule: str, experts_per_layer: int, min_ess: float) -> None:
        forget, retain = (_dataset(getattr(self.train_dataset, name)) for name in ("forget", "retain"))
        stats = profile_routing(
            self.model,
            forget,
            retain,
            batch_size=self.args.train_batch_size,
            pad_token_id=self.tokenizer_pad,
            progress=not self.args.disable_tqdm,
        )
        selected = select_experts(stats, experts_per_layer=experts_per_layer)
        self.calibration = calibrate(stats, selected, rule=rule, min_ess=min_ess)
        if self.accelerator.is_main_process:
            print(self.calibration.summary())
        for row in attach_weights(retain, self.calibration):
            labels, weight = torch.tensor(row["labels"]), torch.tensor(row["token_weight"])
            self._weights[_key(torch.tensor(row["input_ids"]), labels)] = weight[:-1][labels[1:] != IGNORE_INDEX]

    @torch.no_grad()
    def _ask_reference(self) -> None:
        """The original model's log-probability of each forget document."""
        documents, size = self.train_dataset.forget, self.args.train_batch_size
        training = self.model.training
        self.model.train(False)
        for start in range(0, len(documents), size):
            batch = self.data_collator([documents[i] for i in range(start, min(start + size, len(documents)))])
            batch = {name: value.to(self.args.device) for name, value in batch.items()}
            with self.accelerator.autocast():
                log_probs, mask = self._log_probs(self.model, batch)
            sums = log_probs.where(mask, 0.0).sum(-1).tolist()
            for (ids, labels), value in zip(_rows(batch), sums, strict=True):
                self._reference[_key(ids, labels)] = value
        self.model.train(training)


def _trainer_init(cls: type) -> Callable[..., Any]:
    """Of transformers' Trainer, which open-unlearning's classes pass their keywords on to."""
    trainer = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    found: Callable[..., Any] = inspect.unwrap(vars(trainer)["__init__"])
    return found


def _sharded(trainer: Any) -> bool:
    return bool(trainer.is_deepspeed_enabled or getattr(trainer, "is_fsdp_enabled", False))


def _pad_token_id(trainer: Any) -> int:
    tokenizer = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise UserError("open-unlearning: the tokenizer has no padding token")
    return int(tokenizer.pad_token_id)  # type: ignore[union-attr]


def _rows(batch: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(batch["input_ids"].cpu(), batch["labels"].cpu(), strict=True))


def _key(ids: torch.Tensor, labels: torch.Tensor) -> bytes:
    """The same for a document and for its padded row: what it is up to its last label."""
    labelled = (labels != IGNORE_INDEX).nonzero()
    end = int(labelled[-1]) + 1 if len(labelled) else 0
    return ids[:end].to(torch.int64).numpy().tobytes() + labels[:end].to(torch.int64).numpy().tobytes()


def _dataset(documents: Any) -> datasets.Dataset:
    rows = [documents[i] for i in range(len(documents))]
    return datasets.Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in ("input_ids", "labels")})
