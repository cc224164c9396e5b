"""What the weights fall on."""

from __future__ import annotations

import dataclasses

import datasets
import pytest
import tiny
import torch
from made_statistics import statistics

from trace_unlearn.calibration.calibrate import calibrate
from trace_unlearn.calibration.fallen import avoided, heaviest_documents, table_of_kinds, weight_by_kind
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import fingerprint


@pytest.fixture
def fallen():
    """Three documents of 4 counted tokens: 6 x the, 3 x w1, 1 x w2, 2 x w3 with a digit in its text."""
    tokenizer = tiny.tokenizer(["the", "red", "blue", "w3"])
    the, red, blue, w3 = (tokenizer.convert_tokens_to_ids(word) for word in ("the", "red", "blue", "w3"))
    rows = [[blue, the, the, red, w3], [blue, the, the, red, blue], [blue, the, the, red, w3]]
    retain = datasets.Dataset.from_list(
        [{"input_ids": ids, "labels": [-100, *ids[1:]], "answer": "x" if i == 2 else ""} for i, ids in enumerate(rows)]
    )
    found = calibrate(statistics(N=12, D=3), rule="uniform")
    weight = torch.tensor([1.0, 1, 2, 0, 1, 1, 3, 2, 0, 0, 1, 0])
    found = dataclasses.replace(
        found, token_weight=weight, retain_offsets=torch.tensor([0, 4, 8, 12]), retain_fingerprint=fingerprint(retain)
    )
    return found, retain, tokenizer


def test_mean_weight_by_kind(fallen):
    found, retain, tokenizer = fallen
    kinds = {kind.name: kind for kind in weight_by_kind(found, retain, tokenizer)}
    assert list(kinds) == ["function words", "rare words", "other words", "digits", "answers", "all but answers"]
    assert kinds["function words"].weight == pytest.approx(4 / 6)  # the
    assert kinds["rare words"].weight == pytest.approx(2)  # blue
    assert kinds["other words"].weight == pytest.approx(6 / 3)  # red
    assert kinds["digits"].weight == 0  # w3
    assert kinds["digits"].share == pytest.approx(2 / 12)
    assert kinds["answers"].weight == pytest.approx(1 / 4)
    assert kinds["all but answers"].weight == pytest.approx(11 / 8)
    total = sum(kind.share * kind.weight for name, kind in kinds.items() if "answers" not in name)
    assert total == pytest.approx(found.token_weight.mean().item())
    assert "avoid the tokens that are scored: answers have a mean weight of 0.25, all other tokens 1.38" in str(
        table_of_kinds(list(kinds.values()))
    )
    scored = torch.tensor([False, False, True, False] * 3)  # what an evaluation looks at
    assert avoided(weight_by_kind(found, retain, tokenizer, scored)) is None
    assert "answers" not in {kind.name for kind in weight_by_kind(found, retain, tokenizer, torch.ones(12).bool())}


def test_heaviest_documents(fallen):
    found, retain, tokenizer = fallen
    heavy = heaviest_documents(found, retain, tokenizer, 2)
    assert [(d.document, d.weight) for d in heavy] == [(1, 1.75), (0, 1.0)]
    assert str(heavy[0]) == "    1.75  document 1: blue the the red blue"
    with pytest.raises(UserError, match="not what the calibration was made for"):
        heaviest_documents(found, retain.select([0]), tokenizer)
