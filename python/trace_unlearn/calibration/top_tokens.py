"""The retain tokens with the largest weights, as text: what the calibration takes for near to the forget data."""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import torch

from trace_unlearn.calibration.fallen import HeavyDocument, Kind, heaviest_documents, weight_by_kind
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import fingerprint, load_tokens
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.sources.model import load_tokenizer

_CONTEXT = 12  # tokens shown before the one that is predicted


class HeavyToken(NamedTuple):
    """A token with a large weight: the number of its document, and the text up to it, the token itself in brackets."""

    weight: float
    document: int
    text: str

    def __str__(self) -> str:
        return f"{self.weight:8.2f}  document {self.document}: {self.text}"


def heaviest_tokens(
    calibration: Calibration, retain: datasets.Dataset, tokenizer: Any, count: int = 10
) -> list[HeavyToken]:
    """The `count` tokens with the largest weights, the heaviest first.

    The weight of a position multiplies the loss of the token after it, which is the one in brackets.

    Raises:
        UserError: the calibration was made for other data.
    """
    if fingerprint(retain) != calibration.retain_fingerprint:
        raise UserError("retain: the data is not what the calibration was made for")
    weights = calibration.token_weight
    best = weights.sort(descending=True, stable=True).indices[:count]
    document = torch.searchsorted(calibration.retain_offsets, best, right=True) - 1
    found = []
    for token, number in zip(best.tolist(), document.tolist(), strict=True):
        row = retain[number]
        bearing = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != IGNORE_INDEX]
        at = bearing[token - int(calibration.retain_offsets[number])] + 1
        before = tokenizer.decode(row["input_ids"][max(0, at - _CONTEXT) : at])
        next_token = tokenizer.decode(row["input_ids"][at : at + 1])
        text = " ".join(f"{before} [{next_token}]".split())
        found.append(HeavyToken(float(weights[token]), number, text))
    return found


class Shown(NamedTuple):
    """What the weights fall on."""

    kinds: list[Kind]
    documents: list[HeavyDocument]
    tokens: list[HeavyToken]


def heaviest_of_profile(calibration: Calibration, meta: dict[str, Any], count: int) -> Shown:
    """What the weights fall on, from the data and with the tokenizer that the profile's `meta` names.

    Raises:
        UserError: the profile was not made by the verb, or its data is no longer there or another.
    """
    source = meta.get("source")
    if not isinstance(source, dict):
        raise UserError("show_tokens: the profile does not say where its data came from; make it with the verb profile")
    tokenizer = load_tokenizer(source["model"])
    retain = load_tokens(
        source["retain"],
        tokenizer,
        max_length=source["max_length"],
        limit=source["retain_limit"],
        question_template=source.get("question_template"),
    )
    return Shown(
        weight_by_kind(calibration, retain, tokenizer),
        heaviest_documents(calibration, retain, tokenizer, count),
        heaviest_tokens(calibration, retain, tokenizer, count),
    )
