"""Dropped rows on a GPU: which rows reach the products, and when the host must not ask."""

import torch

from trace_kernels.ops.linear_cross_entropy import chunked
from trace_kernels.runtime.recording import recording
from trace_kernels.shared.kept import kept_rows, spread
from trace_kernels.shared.linear import Call, Stats


def test_only_kept_rows_are_left():
    assert kept_rows(torch.tensor([True, False, True])).tolist() == [0, 2]
    assert kept_rows(torch.ones(3, dtype=torch.bool)) is None
    assert kept_rows(torch.zeros(0, dtype=torch.bool)) is None
    assert kept_rows(torch.zeros(3, dtype=torch.bool)).tolist() == [0]  # a dropped row, which gives 0


def test_nothing_is_asked_during_a_capture(monkeypatch):
    kept = torch.tensor([True, False])
    with recording():
        assert kept_rows(torch.empty(2, dtype=torch.bool, device="meta")) is None
    with recording(0.5):
        assert kept_rows(torch.empty(6, dtype=torch.bool, device="meta")).shape == (3,)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kept_rows(kept) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kept_rows(kept).tolist() == [0]


def test_results_go_back_to_their_rows():
    index = torch.tensor([0, 2])
    assert spread(torch.tensor([5.0, 7.0]), index, 4).tolist() == [5, 0, 7, 0]
    assert spread(torch.ones(2, 3), index, 4).sum(1).tolist() == [3, 0, 3, 0]
    assert spread(torch.empty(0, 3), index, 4).shape == (0, 3)


def test_only_kept_rows_reach_the_products(monkeypatch):
    seen = []

    def of_all(kernels, call, *rest):
        rows = len(call.hidden)
        seen.append((rows, call.target.tolist()))
        none = torch.empty(0)
        stats = Stats(torch.ones(rows, 1), torch.ones(rows), none.long(), none, none, none, call.hidden)
        return stats, torch.ones(7, 4), none

    monkeypatch.setattr(chunked, "_pass_of_all", of_all)
    hidden, target = torch.arange(12.0).view(3, 4), torch.tensor([5, -100, 6])
    for row_weight, kept in ((None, [0, 2]), (torch.tensor([0.0, 1.0, 2.0]), [2])):
        call = Call(hidden, torch.zeros(7, 4), None, target, row_weight, -100, None, 1.0)
        logp, lse, dhidden, dweight, _ = chunked.forward(None, call, True, True)
        assert seen.pop() == (len(kept), target[kept][:, None].tolist())
        there = torch.zeros(3).index_fill(0, torch.tensor(kept), 1.0)
        assert logp.tolist() == lse.tolist() == there.tolist()
        assert torch.equal(dhidden, hidden * there[:, None])
        assert dweight.shape == (7, 4)
