"""The losses of hidden states and a head with few numbers, as the tests of laws call them."""

import pytest
import torch
import torch.nn.functional as F

import trace_kernels as tk

T, H, V = 7, 6, 11


def inputs(dtype=torch.float64, seed=0, t=T):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(V, (t,), generator=g)
    target[1::3] = -100
    token_weight = torch.randn(t, generator=g, dtype=torch.float64)
    token_weight[2] = 0
    return hidden, weight, target, token_weight


def linear_ce(hidden, weight, target, token_weight=None, **options):
    return tk.linear_cross_entropy(hidden, weight, target, token_weight, **options)


def ce(hidden, weight, target, token_weight=None, **options):
    return tk.cross_entropy(F.linear(hidden, weight), target, token_weight, **options)


def kl(hidden, weight, target, token_weight=None, **options):
    g = torch.Generator().manual_seed(5)
    ref_hidden = torch.randn(*hidden.shape[:-1], 4, generator=g).to(hidden.dtype)
    ref_weight = torch.randn(V, 4, generator=g).to(hidden.dtype)
    return tk.linear_kl(hidden, weight, ref_hidden, ref_weight, token_weight, mask=target != -100, **options)


LOSSES = pytest.mark.parametrize("loss", [linear_ce, ce, kl])
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
TRANSFORMS = pytest.mark.parametrize("transform", [{}, {"softcap": 2.0, "logit_scale": -0.7}], ids=["plain", "softcap"])
