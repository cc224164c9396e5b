import datasets
import pytest
import torch

from trace_unlearn.errors import UserError
from trace_unlearn.training.pairs import PairCollator, PairDataset, PositionSampler, split_batch


def documents(count, weights=False):
    rows = {"input_ids": [[i, 7, 8][: 2 + i % 2] for i in range(count)], "prompt": [""] * count}
    rows["labels"] = rows["input_ids"]
    if weights:
        rows["token_weight"] = [[0.5] * len(ids) for ids in rows["input_ids"]]
    return datasets.Dataset.from_dict(rows)


def pairs(**options):
    return PairDataset(documents(5), documents(7), **{"retain_per_forget": 2, "seed": 3, **options})


def test_every_pass_holds_every_document_once_in_another_order():
    dataset = pairs()
    forget = [dataset.forget_index(p) for p in range(20)]
    retain = [i for p in range(14) for i in dataset.retain_indices(p)]
    passes = [forget[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert all(sorted(retain[i : i + 7]) == list(range(7)) for i in range(0, 28, 7))
    assert retain[:7] != retain[7:14]


def test_positions_depend_on_the_seed_alone():
    assert [pairs()[p] for p in (11, 3, 11)] == [pairs(step_size=4)[p] for p in (11, 3, 11)]
    assert [pairs().retain_indices(p) for p in range(9)] != [pairs(seed=4).retain_indices(p) for p in range(9)]


def test_epochs_are_whole_steps_and_follow_each_other():
    dataset = pairs(step_size=4)
    sampler = PositionSampler(dataset)
    assert len(dataset) == len(sampler) == 8
    assert list(sampler) == list(range(8))
    sampler.set_epoch(2)
    assert list(sampler) == list(range(16, 24))


def test_a_batch_is_forget_then_retain():
    dataset = PairDataset(documents(5), documents(7, weights=True), retain_per_forget=2)
    batch = PairCollator(pad_token_id=9)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape == (6, 3)
    assert (batch["forget_index"] >= 0).tolist() == [True] * 2 + [False] * 4
    order = [dataset.forget_index(0), dataset.forget_index(1), *dataset.retain_indices(0), *dataset.retain_indices(1)]
    assert batch["input_ids"][:, 0].tolist() == order
    assert batch["token_weight"][:2].eq(0).all()
    assert batch["token_weight"][2:, :2].eq(0.5).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_weight", "forget_index", "retain_index"}
    indices = [i for p in (0, 1) for i in dataset.retain_indices(p)]
    assert batch["retain_index"].tolist() == [-1, -1, *indices]


def test_alternates_follow_their_forget_documents():
    other = documents(5).map(lambda row: {"input_ids": [row["input_ids"][0] + 20, 1], "labels": [-100, 1]})
    dataset = PairDataset(documents(5), documents(7, weights=True), alternate=other)
    batch = PairCollator(pad_token_id=9)([dataset[0], dataset[3]])
    forget = [dataset.forget_index(0), dataset.forget_index(3)]
    assert batch["input_ids"][:4, 0].tolist() == [*forget, *(i + 20 for i in forget)]
    assert batch["forget_index"].tolist() == [*forget, -1, -1, -1, -1]
    assert (batch["retain_index"] >= 0).tolist() == [False] * 4 + [True] * 2
    with pytest.raises(UserError, match="alternate: got 4 documents, allowed is one for each of the 5"):
        PairDataset(documents(5), documents(7), alternate=documents(4))


def test_one_set_alone():
    retain = PairDataset(None, documents(7), retain_per_forget=2, step_size=3)
    assert len(retain) == 6
    batch = PairCollator(pad_token_id=9)([retain[0], retain[1]])
    assert batch["forget_index"].tolist() == [-1] * 4
    assert sorted(i for p in range(7) for i in retain.retain_indices(p)) == sorted([*range(7)] * 2)
    forget = PairDataset(documents(5), None)
    batch = PairCollator(pad_token_id=9)([forget[0], forget[1]])
    assert batch["retain_index"].tolist() == [-1, -1]
    assert (batch["forget_index"] >= 0).all()


def test_empty_sets_are_refused():
    with pytest.raises(UserError, match="retain: got no document"):
        PairDataset(documents(2), documents(0))


def test_parts_of_a_batch():
    long = documents(7, weights=True).map(lambda row: {n: row[n] + row[n][-1:] * 2 for n in row})
    dataset = PairDataset(documents(5), long, alternate=documents(5), retain_per_forget=2)
    batch = PairCollator(pad_token_id=9)([dataset[0], dataset[1]])
    parts = split_batch(batch, 3)
    assert [len(part["labels"]) for part in parts] == [4, 3, 1]
    assert [(part["retain_index"] >= 0).tolist() for part in parts] == [[False] * 4, [True] * 3, [True]]
    for part in parts:
        assert part["attention_mask"].sum(-1).max() == part["input_ids"].shape[1] == part["token_weight"].shape[1]
    assert parts[0]["input_ids"].shape[1] < parts[1]["input_ids"].shape[1]
    for name in ("forget_index", "retain_index"):
        assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    for name in ("input_ids", "labels", "token_weight"):
        rows = [
            row[row_mask.bool()].tolist()
            for p in parts
            for row, row_mask in zip(p[name], p["attention_mask"], strict=True)
        ]
        assert rows == [row[m.bool()].tolist() for row, m in zip(batch[name], batch["attention_mask"], strict=True)]
