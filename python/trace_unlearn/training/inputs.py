"""What TraceTrainer is given: which of it the objective uses, and whether that is enough."""

from __future__ import annotations

import dataclasses

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from trace_unlearn.calibration.weights import Calibration, attach_weights
from trace_unlearn.errors import UserError
from trace_unlearn.training.config import TraceConfig


def check_arguments(args: TrainingArguments, config: TraceConfig) -> None:
    """UserError for what would not do what the method says."""
    if config.anchor and not config.anchor_experts:
        raise UserError(f"anchor: got {config.anchor}, but no experts to anchor to")
    if config.best_forget_nll is not None:
        if (strategy := SaveStrategy(args.save_strategy)) not in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
            raise UserError(
                f"save_strategy: got {strategy.value!r}, allowed with best_forget_nll: steps, epoch: it chooses one of "
                "the checkpoints"
            )
        if args.load_best_model_at_end:
            raise UserError("load_best_model_at_end: got True with best_forget_nll; give one of the two rules")
    for name, reason in (
        ("auto_find_batch_size", "the documents of a step would depend on the memory; set the batch size"),
        ("label_smoothing_factor", "the loss is the method's own"),
        ("use_liger_kernel", "the model's loss is fused already, without logits"),
    ):
        if getattr(args, name):
            raise UserError(f"{name}: got {getattr(args, name)}, allowed is to leave it unset: {reason}")


def with_unit(config: TraceConfig, calibration: Calibration | None) -> TraceConfig:
    """The configuration with the calibration's unit, for the record; UserError where it asks for another."""
    if calibration is None or not config.routes_weigh:
        return config
    if config.unit is not None and config.unit != calibration.unit:
        raise UserError(
            f"unit: got {config.unit!r}, but the calibration was made with unit {calibration.unit!r}; calibrate again "
            f"with unit {config.unit!r}, or leave it unset to take what the calibration has"
        )
    return dataclasses.replace(config, unit=calibration.unit)


def used_sets(config: TraceConfig, **sets: datasets.Dataset | None) -> list[datasets.Dataset | None]:
    """The sets that the objective uses; the others are None whatever was given."""
    for name, given in sets.items():
        if config.needs[name] and given is None:
            raise UserError(f"{name}: got none, but objective {config.objective!r} needs it")
    return [given if config.needs[name] else None for name, given in sets.items()]


def weighted(retain: datasets.Dataset, config: TraceConfig, calibration: Calibration | None) -> datasets.Dataset:
    """The retain set with the weights that the configuration asks for, or without any."""
    if config.routes_weigh and config.weighting == "live" and calibration is None:
        raise UserError("calibration: weighting 'live' needs one")
    if not config.routes_weigh or config.weighting != "reference":
        return retain.remove_columns("token_weight") if "token_weight" in retain.column_names else retain
    if calibration is not None:
        return attach_weights(retain, calibration)
    if "token_weight" not in retain.column_names:
        raise UserError(
            "calibration: weighting 'reference' needs one (or a retain set with the column token_weight, from "
            "attach_weights); weighting 'uniform' needs none"
        )
    return retain


def held_out(
    retain: datasets.Dataset | None, given: datasets.Dataset | None, config: TraceConfig
) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
    """The retain documents to train on, and those to measure on, where the configuration measures any.

    Where none are given, a tenth of the retain set, `config.stop_documents` at most, is held out: every n-th document.
    """
    if not config.holds_out:
        if given is not None:
            raise UserError(
                "retain_eval: got documents, but nothing is measured on them; give stop_retain_increase, "
                "stop_retain_nll or best_forget_nll as well"
            )
        return retain, None
    assert retain is not None
    if given is not None:
        if len(given) == 0:
            raise UserError("retain_eval: got no document, allowed is at least one")
        return retain, given
    if len(retain) < 2:
        raise UserError("retain: got 1 document, allowed are two, of which one is held out, or one and retain_eval")
    step = len(retain) // min(config.stop_documents, max(1, len(retain) // 10))
    out = set(range(step - 1, len(retain), step)[: config.stop_documents])
    return retain.select([i for i in range(len(retain)) if i not in out]), retain.select(sorted(out))


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> int:
    """With what documents are padded."""
    for holder in (tokenizer, model.config):
        pad = getattr(holder, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0  # padded positions are masked and bear no loss
