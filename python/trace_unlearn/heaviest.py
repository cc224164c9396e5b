"""The retain tokens with the largest weights, as text: what the calibration takes for near to the forget data."""

from __future__ import annotations

from typing import Any

import datasets
import torch

from trace_unlearn.data import fingerprint, load_tokens
from trace_unlearn.encoding import IGNORE_INDEX
from trace_unlearn.errors import UserError
from trace_unlearn.model import load_tokenizer
from trace_unlearn.weights import Calibration

_CONTEXT = 12  # tokens shown before the one that is predicted


def heaviest_tokens(calibration: Calibration, retain: datasets.Dataset, tokenizer: Any, count: int = 10) -> list[str]:
    """One line for each of the `count` tokens with the largest weights: weight, document, and the text up to it.

    The weight of a position multiplies the loss of the token after it, which is shown in brackets.

    Raises:
        UserError: the calibration was made for other data.
    """
    if fingerprint(retain) != calibration.retain_fingerprint:
        raise UserError("retain: the data is not what the calibration was made for")
    weights = calibration.token_weight
    best = weights.sort(descending=True, stable=True).indices[:count]
    document = torch.searchsorted(calibration.retain_offsets, best, right=True) - 1
    lines = []
    for token, number in zip(best.tolist(), document.tolist(), strict=True):
        row = retain[number]
        bearing = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != IGNORE_INDEX]
        at = bearing[token - int(calibration.retain_offsets[number])] + 1
        before = tokenizer.decode(row["input_ids"][max(0, at - _CONTEXT) : at])
        next_token = tokenizer.decode(row["input_ids"][at : at + 1])
        text = " ".join(f"{before} [{next_token}]".split())
        lines.append(f"{float(weights[token]):8.2f}  document {number}: {text}")
    return lines


def describe_heaviest(calibration: Calibration, meta: dict[str, Any], count: int) -> str:
    """The lines of `heaviest_tokens`, from the data and the model that the profile's `meta` names.

    Raises:
        UserError: the profile was not made by the verb, or its data is no longer there or another.
    """
    source = meta.get("source")
    if not isinstance(source, dict):
        raise UserError("show_tokens: the profile does not say where its data came from; make it with the verb profile")
    tokenizer = load_tokenizer(source["model"])
    retain = load_tokens(source["retain"], tokenizer, max_length=source["max_length"], limit=source["retain_limit"])
    lines = heaviest_tokens(calibration, retain, tokenizer, count)
    return "\n".join([f"the {len(lines)} retain tokens with the largest weights, in brackets:", *lines])
