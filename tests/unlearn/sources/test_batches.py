import json
import logging

import datasets
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import check_disjoint, collate, fingerprint, load_tokens, loss_bearing

WORDS = tiny.tokenizer()


def load(folder, name, content, tokenizer=WORDS, **options):
    (folder / name).write_text(content)
    return load_tokens(folder / name, tokenizer, **{"progress": False, **options})


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# fingerprint, disjointness, batches


def test_loss_bearing_needs_both_tokens():
    labels = torch.tensor([[3, 4, 5, 6, -100, 7]])
    assert loss_bearing(labels).tolist() == [[True, True, True, False, True, False]]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])
    assert loss_bearing(labels, mask).tolist() == [[False, True, False, False, True, False]]


def test_fingerprint_depends_on_rows_only(tmp_path):
    data = load(tmp_path, "a.jsonl", lines(*[f"w{i} w{i + 1}" for i in range(30)]))
    first = fingerprint(data)
    assert len(first) == 64
    assert fingerprint(load(tmp_path, "b.json", json.dumps([f"w{i} w{i + 1}" for i in range(30)]))) == first
    assert fingerprint(data.add_column("token_weight", [[1.0]] * 30)) == first
    assert fingerprint(data.select(range(30))) == first
    assert fingerprint(datasets.concatenate_datasets([data.select(range(7)), data.select(range(7, 30))])) == first
    assert fingerprint(data.select(range(29))) != first
    assert fingerprint(data.select([1, 0, *range(2, 30)])) != first
    split = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]})
    joined = datasets.Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2, 3]]})
    masked = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[-100, 2], [3]]})
    assert len({fingerprint(split), fingerprint(joined), fingerprint(masked)}) == 3


def test_forget_and_retain_must_differ(tmp_path, caplog):
    forget = load(tmp_path, "f.jsonl", lines("w1", "w2", "w3"))
    with caplog.at_level(logging.WARNING):
        assert check_disjoint(forget, load(tmp_path, "r.jsonl", lines("w4", "w5"))) == 0
    assert not caplog.records
    assert check_disjoint(forget, load(tmp_path, "r.jsonl", lines("w4", "w2", "w1"))) == 2
    assert "2 of 3 rows of the forget set are in the retain set too" in caplog.text
    with pytest.raises(UserError, match="the forget set equals the retain set"):
        check_disjoint(forget, load(tmp_path, "r.jsonl", lines("w3", "w1", "w2", "w2")))


def test_collate_token_weights_and_what_it_refuses():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "token_weight": [2.0, 0.5, 0.0]},
        {"input_ids": [8], "labels": [-100], "token_weight": [0.0]},
    ]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["token_weight"].dtype == torch.float32
    assert batch["token_weight"].tolist() == [[2.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"rows\[1\]\['token_weight'\]: none values for 1"):
        collate([rows[0], {"input_ids": [8], "labels": [-100]}], 9)
    with pytest.raises(ValueError, match=r"rows\[0\]\['labels'\]: 1 values for 2"):
        collate([{"input_ids": [8, 9], "labels": [-100]}], 9)
    with pytest.raises(ValueError, match="rows: got none"):
        collate([], 9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4))
def test_loss_bearing_counts_shifted_labels(batch):
    rows = [{"input_ids": [t for t, _ in row], "labels": [t if b else -100 for t, b in row]} for row in batch]
    tensors = collate(rows, pad_token_id=0)
    bearing = loss_bearing(tensors["labels"], tensors["attention_mask"])
    for i, row in enumerate(batch):
        expected = [bears for _, bears in row[1:]]
        assert bearing[i].tolist() == expected + [False] * (bearing.shape[1] - len(expected))
