"""What the GPU backends take beside results and the head's gradient, by their own host code on meta tensors."""

import pytest
import torch

from trace_kernels.ops.linear_cross_entropy import cuda as linear
from trace_kernels.ops.linear_kl import cuda as kl
from trace_kernels.runtime.recording import recording
from trace_kernels.shared.linear import Call

T, H, V = 8192, 2048, 151936
DHIDDEN = 2 * T * H  # a result


@pytest.fixture
def taken(monkeypatch):
    """Bytes of all that `torch.empty` is asked for; nothing of it is counted as freed."""
    sizes, empty = [], torch.empty

    def counted(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    monkeypatch.setattr(torch, "empty", counted)
    return sizes


def inputs():
    hidden, weight = (torch.zeros(rows, H, dtype=torch.bfloat16, device="meta") for rows in (T, V))
    return hidden, weight, torch.zeros(T, dtype=torch.int64, device="meta"), torch.zeros(T, device="meta")


@pytest.mark.parametrize("gradient, most", [(True, 0.7e9), (False, 0.14e9)])
def test_linear_cross_entropy(taken, gradient, most):
    hidden, weight, target, row = inputs()
    taken.clear()
    with recording():
        linear.forward(Call(hidden, weight, None, target, row, -100, None, 1.0), gradient, False)
    assert 0.5 * most < sum(taken) - (DHIDDEN if gradient else 0) <= most


def test_linear_kl(taken):
    hidden, weight, _, row = inputs()
    taken.clear()
    with recording():
        call = Call(hidden, weight, None, None, row, -100, None, 1.0)
        kl.forward(call, call, True, False, None)
    assert 1.2e9 < sum(taken) - DHIDDEN <= 1.28e9
