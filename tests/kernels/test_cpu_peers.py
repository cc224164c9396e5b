"""The peers that benchmarks.cpu times compute the same loss and gradient; those that are not installed are skipped."""

import importlib.util

import pytest
import torch

import trace_kernels as tk
from benchmarks.cpu_peers import PEERS


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_the_same(name):
    loss, package = PEERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=generator), torch.randn(500, 16, generator=generator)
    target, token_weight = torch.randint(500, (40,), generator=generator), torch.rand(40, generator=generator)
    found = []
    for function in (loss, tk.linear_cross_entropy):
        leaf = hidden.clone().requires_grad_()
        value = function(leaf, weight, target, token_weight)
        value.backward()
        found.append((value.detach().float(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
