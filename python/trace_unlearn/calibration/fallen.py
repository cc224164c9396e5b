"""What the weights fall on: mean weight by kind of position, and the documents that weigh most."""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import fingerprint
from trace_unlearn.sources.encoding import IGNORE_INDEX

_FREQUENT = 0.5  # of all occurrences are of the token types called function words
_RARE = 0.1  # are of those called rare words
_SHOWN = 200  # characters of a document


class Kind(NamedTuple):
    """A kind of position: its name, the share of the counted tokens that are of it, and their mean weight."""

    name: str
    share: float
    weight: float


class HeavyDocument(NamedTuple):
    """A document with a large mean weight, its number, and how it begins."""

    weight: float
    document: int
    text: str

    def __str__(self) -> str:
        return f"{self.weight:8.2f}  document {self.document}: {self.text}"


def weight_by_kind(
    calibration: Calibration, retain: datasets.Dataset, tokenizer: Any, scored: torch.Tensor | None = None
) -> list[Kind]:
    """The mean weight of each kind of position, by the token whose prediction the weight multiplies.

    Kinds follow from the retain set alone, for any tokenizer: "digits" are tokens whose text holds a digit. The other
    token types are ordered by how often they are predicted, ties by their id: the most frequent ones that make up half
    of these occurrences at most, and one at least, are "function words", the least frequent ones that make up a tenth
    at most are "rare words", what lies between is "other words". Where `scored` is given, or some rows are answers to
    questions and others not, the answers and the rest are kinds as well.

    Args:
        calibration: of this retain set.
        retain: as it was profiled.
        tokenizer: the model's.
        scored: [N] bool, the counted tokens that an evaluation looks at, such as the answers; by default those of rows
            with an answer.

    Raises:
        UserError: the calibration was made for other data.
    """
    weights = calibration.token_weight.double().numpy()
    predicted = _predicted(calibration, retain)
    types, which, counts = np.unique(predicted, return_inverse=True, return_counts=True)
    digits = np.array([any(c.isdigit() for c in tokenizer.decode([int(t)])) for t in types])
    order = np.lexsort((types, -counts))
    order = order[~digits[order]]
    total = counts[order].sum()
    kind = np.full(len(types), 2)
    kind[digits] = 3
    if len(order):
        upto = counts[order].cumsum()
        kind[order[(upto <= _FREQUENT * total) | (np.arange(len(order)) == 0)]] = 0
        rare = (total - upto + counts[order] <= _RARE * total) & (kind[order] == 2)
        kind[order[rare]] = 1
    names = ("function words", "rare words", "other words", "digits")
    kinds = [_kind(name, kind[which] == number, weights) for number, name in enumerate(names)]
    if scored is None and "answer" in retain.column_names:
        sizes = calibration.retain_offsets.diff()
        scored = torch.repeat_interleave(torch.tensor([bool(answer) for answer in retain["answer"]]), sizes)
    if scored is not None and 0 < int(scored.sum()) < len(scored):
        kinds += [_kind("answers", scored.numpy(), weights), _kind("all but answers", ~scored.numpy(), weights)]
    return [found for found in kinds if found.share > 0]


def avoided(kinds: list[Kind]) -> str | None:
    """A sentence where the weights avoid the tokens that are scored."""
    weight = {kind.name: kind.weight for kind in kinds}
    if "answers" not in weight or weight["answers"] >= weight["all but answers"]:
        return None
    return (
        f"The weights avoid the tokens that are scored: answers have a mean weight of {weight['answers']:.2f}, all "
        f"other tokens {weight['all but answers']:.2f}."
    )


def heaviest_documents(
    calibration: Calibration, retain: datasets.Dataset, tokenizer: Any, count: int = 10
) -> list[HeavyDocument]:
    """The `count` documents with the largest mean weight, the heaviest first, as text.

    Raises:
        UserError: the calibration was made for other data.
    """
    _check(calibration, retain)
    sizes = calibration.retain_offsets.diff()
    document = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    sums = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, document, calibration.token_weight.double())
    mean = torch.where(sizes > 0, sums / sizes.clamp(min=1), -1.0)
    found = []
    for number in mean.sort(descending=True, stable=True).indices[:count].tolist():
        if sizes[number]:
            text = " ".join(tokenizer.decode(retain[number]["input_ids"]).split())
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
            found.append(HeavyDocument(float(mean[number]), number, shown))
    return found


def table_of_kinds(kinds: list[Kind]) -> str:
    """For a terminal."""
    lines = ["mean weight by kind of the token that is predicted:"]
    lines += [f"{kind.weight:8.2f}  {kind.name} ({kind.share:.0%} of the tokens)" for kind in kinds]
    sentence = avoided(kinds)
    return "\n".join(lines if sentence is None else [*lines, sentence])


def _kind(name: str, chosen: np.ndarray[Any, np.dtype[np.bool_]], weights: np.ndarray[Any, Any]) -> Kind:
    return Kind(name, float(chosen.mean()), float(weights[chosen].mean()) if chosen.any() else 0.0)


def _predicted(calibration: Calibration, retain: datasets.Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[N]: the label of each counted token."""
    _check(calibration, retain)
    rows = [np.asarray(labels[1:], dtype=np.int64) for labels in retain["labels"]]
    return np.concatenate([row[row != IGNORE_INDEX] for row in rows])


def _check(calibration: Calibration, retain: datasets.Dataset) -> None:
    if fingerprint(retain) != calibration.retain_fingerprint:
        raise UserError("retain: the data is not what the calibration was made for")
