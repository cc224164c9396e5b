"""What TraceTrainer is given: which of it the objective uses, and whether that is enough."""

from __future__ import annotations

import datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trace_unlearn.config import TraceConfig
from trace_unlearn.errors import UserError
from trace_unlearn.weights import Calibration, attach_weights


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


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> int:
    """With what documents are padded."""
    for holder in (tokenizer, model.config):
        pad = getattr(holder, "pad_token_id", None)
        if isinstance(pad, int) and pad >= 0:
            return pad
    return 0  # padded positions are masked and bear no loss
