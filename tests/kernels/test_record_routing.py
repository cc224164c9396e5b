"""Laws of `record_routing_`: counts and scores by hand, gate, mask, sentinels, bad input, compile."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import trace_kernels as tk
from trace_kernels.runtime.backends import BackendError

BACKENDS = ["reference", "cpu"]


@st.composite
def calls(draw):
    E, k, T = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 6))
    rows = draw(st.lists(st.lists(st.integers(-2, E + 2), min_size=k, max_size=k), min_size=T, max_size=T))
    mask = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=T, max_size=T)))
    return E, k, rows, mask, draw(st.sampled_from([None, 0, 1, -3]))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_counts_and_scores_by_hand(backend, call):
    E, k, rows, mask, gate = call
    T = len(rows)
    counts, score = torch.arange(E), torch.arange(T, dtype=torch.float32)
    table = torch.tensor([2.0**e for e in range(E)])
    tk.record_routing_(
        torch.tensor(rows, dtype=torch.int64).reshape(T, k),
        counts,
        token_mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        table=table,
        token_score=score,
        gate=None if gate is None else torch.tensor(gate, dtype=torch.int32),
        backend=backend,
    )
    on = gate != 0
    counting = [row for t, row in enumerate(rows) if mask is None or mask[t]]
    assert counts.tolist() == [e + on * sum(row.count(e) for row in counting) for e in range(E)]
    assert score.tolist() == [t + on * sum(2.0**e for e in row if 0 <= e < E) for t, row in enumerate(rows)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_does_not_depend_on_threads(backend):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-1, 65, (30011, 8), generator=generator)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        counts, score = torch.zeros(64, dtype=torch.int64), torch.zeros(30011)
        tk.record_routing_(indices, counts, table=torch.linspace(-1, 1, 64), token_score=score, backend=backend)
        results.append((counts, score))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["aot_eager", "inductor"])
def test_one_compiled_graph_obeys_the_gate(backend, kind):
    torch._dynamo.reset()
    gate = torch.tensor(1, dtype=torch.int32)
    counts, score = torch.zeros(4, dtype=torch.int64), torch.zeros(2)

    @torch.compile(fullgraph=True, backend=kind)
    def step(indices):
        tk.record_routing_(indices * 1, counts, table=torch.ones(4), token_score=score, gate=gate, backend=backend)
        return indices + 1

    indices = torch.tensor([[0, 2], [2, 3]])
    for value, expected in ((1, [1, 0, 2, 1]), (0, [1, 0, 2, 1]), (1, [2, 0, 4, 2])):
        gate.fill_(value)
        step(indices)
        assert counts.tolist() == expected
    assert score.tolist() == [4.0, 4.0]


def test_checkpointing_counts_once_with_a_gate():
    gate, counts = torch.tensor(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)

    def layer(x):
        tk.record_routing_(torch.tensor([[0, 1], [1, 3]]), counts, gate=gate)
        return x.square()

    x = torch.ones(2, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    gate.fill_(0)
    y.sum().backward()
    assert counts.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    torch.library.opcheck(
        torch.ops.trace_kernels.record_routing_.default,
        (torch.tensor([[0, 2], [2, 5]]), torch.zeros(4, dtype=torch.int64), torch.tensor([True, False]), torch.ones(4),
         torch.zeros(2), torch.tensor(1, dtype=torch.int32), backend),
    )  # fmt: skip


I = torch.zeros(5, 2, dtype=torch.int64)  # noqa: E741
C = torch.zeros(8, dtype=torch.int64)
BAD = [
    ({"indices": [[1]]}, TypeError, "indices: got list, allowed is a torch.Tensor"),
    ({"indices": I.float()}, TypeError, "indices: got dtype float32, allowed: uint8, int8, uint16, int16, int32"),
    ({"indices": I[0]}, ValueError, r"indices: got shape \[2\], allowed is \[T, k\]"),
    ({"counts": C.int()}, TypeError, "counts: got dtype int32, allowed: int64"),
    ({"counts": C[None]}, ValueError, r"counts: got shape \[1, 8\], allowed is \[E\]"),
    ({"counts": C.to("meta")}, ValueError, "counts: is on meta, allowed is cpu, the device of indices"),
    ({"token_mask": torch.ones(5)}, TypeError, "token_mask: got dtype float32, allowed: bool"),
    ({"token_mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"token_mask: got shape \[6\], allowed is \[T\]"),
    ({"table": torch.zeros(8)}, ValueError, "token_score: got None, allowed is a tensor"),
    ({"token_score": torch.zeros(5)}, ValueError, "table: got None, allowed is a tensor"),
    ({"table": torch.zeros(8).half(), "token_score": torch.zeros(5)}, TypeError, "table: got dtype float16"),
    ({"table": torch.zeros(7), "token_score": torch.zeros(5)}, ValueError, r"table: got shape \[7\]"),
    ({"table": torch.zeros(8), "token_score": torch.zeros(4)}, ValueError, r"token_score: got shape \[4\]"),
    (
        {"table": torch.tensor([0.0, math.inf] * 4), "token_score": torch.zeros(5)},
        ValueError,
        "table: 4 of 8 entries are NaN or infinite",
    ),
    ({"gate": torch.tensor(1)}, TypeError, "gate: got dtype int64, allowed: int32"),
    ({"gate": torch.ones(1, dtype=torch.int32)}, ValueError, r"gate: got shape \[1\], allowed is a 0-d tensor"),
    ({"backend": "gpu"}, BackendError, "backend: got 'gpu', allowed are 'auto'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message.split(",")[0] for _, _, message in BAD])
def test_bad_input(change, error, message):
    counts = change.get("counts", C.clone())
    with pytest.raises(error, match=message):
        tk.record_routing_(**{"indices": I, "counts": counts, **change})
    if counts.device.type == "cpu":
        assert not counts.any()
