"""What the GPU backends launch and move at real sizes, recorded on meta tensors: counts, and the model's times."""

import contextlib
import importlib.util

import pytest
import torch

import trace_kernels as tk
from trace_kernels.ops.router_topk import op as router
from trace_kernels.runtime.recording import Product, recording
from trace_kernels.shared.chunks import PROCESSORS, block_columns, untuned, waves

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def nothing_but_launches(monkeypatch):
    """Calls go past the dispatcher, and no tensor is filled, which would be a launch of its own."""

    def refused(*args, **kwargs):
        raise AssertionError("a launch beside the kernel's own")

    monkeypatch.setattr(router, "_router_topk", refused)
    for name in ("zeros", "zeros_like", "full"):
        monkeypatch.setattr(torch, name, refused)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_router_is_one_launch_each_way(backend, gradient, nothing_but_launches):
    logits, counts, score = empty(4096, 128, dtype=torch.bfloat16), empty(128, dtype=torch.int64), empty(4096)
    logits.requires_grad_(gradient)
    with recording() as launches:
        weights, _ = tk.router_topk(
            logits, 8, counts=counts, table=empty(128), token_score=score, backend=backend,
            token_mask=empty(4096, dtype=torch.bool),
        )  # fmt: skip
        assert len(launches) == 1
        if gradient:
            torch.autograd.grad(weights, logits, empty(4096, 8, dtype=torch.bfloat16))
            assert len(launches) == 2
    assert counts._version == score._version == 1


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_recording_is_one_launch(backend, nothing_but_launches):
    with recording() as launches:
        tk.record_routing_(
            empty(4096, 8, dtype=torch.int64), empty(128, dtype=torch.int64), table=empty(128), token_score=empty(4096),
            gate=empty(dtype=torch.int32), backend=backend,
        )  # fmt: skip
    assert len(launches) == 1


def test_planned_times_are_within_their_goals_and_the_host_keeps_up():
    from benchmarks.traffic import GOALS, rows

    found = [row for row in rows() if row[0] in GOALS]
    assert len(found) >= 4 * 6
    assert [row[:3] for row in found if row[4].seconds > GOALS[row[0]] * row[3]] == []
    # Half of the planned time at the most.
    assert [row[:3] for row in found if row[4].host_seconds > 0.5 * row[4].seconds] == []


def test_every_product_is_counted():
    from benchmarks.traffic import MODELS, linear_calls

    for name, (_, passes, call) in linear_calls(MODELS[1]).items():
        with recording() as recorded:
            call()
        flops = sum(entry.flops for entry in recorded if isinstance(entry, Product))
        assert flops == passes * 2 * 8192 * MODELS[1].H * MODELS[1].V, name


def test_blocks_fill_the_device():
    assert waves(2048, 4096) == 2
    assert waves(2048, 4352) == 3
    for rows, num_classes in ((2048, 151936), (4096, 50304), (1408, 201088)):
        columns = block_columns(rows, num_classes, 8192, PROCESSORS)
        assert columns % 1024 == 0
        starts = range(0, num_classes, columns)
        total = sum(waves(rows, min(columns, num_classes - start)) for start in starts)
        assert total * PROCESSORS * 128 * 256 < 1.07 * rows * num_classes
    assert block_columns(16, 100, 1, PROCESSORS) == 1024


def test_tunable_op_is_off_for_float32_products_of_16_bits(monkeypatch):
    state = [True]
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: state[-1])
    monkeypatch.setattr(torch.cuda.tunable, "enable", state.append)
    with untuned():
        assert state == [True, False]
    assert state == [True, False, True]
    with contextlib.suppress(KeyError), untuned():
        raise KeyError
    assert state[-2:] == [False, True]
