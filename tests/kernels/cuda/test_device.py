"""What conformance cases are too small for, on a device: several blocks and chunks, every product of the linear ops.

Without a GPU the products run on the CPU, and the blocks and chunks in test_emulation.py and test_kernels.py.
"""

import importlib

import blocks
import pytest
import torch
from no_label import no_label_problems

from trace_kernels.shared.chunks import addmm_float32, mm_float32
from trace_kernels.testing.cases import moved

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BACKENDS = [pytest.param(name, marks=gpu) for name in ("cuda", "triton")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def module(op, backend):
    return importlib.import_module(f"trace_kernels.ops.{op}.{backend}")


@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks_and_chunks_on_the_device(op, backend):
    if op == "linear_kl":
        blocks.linear_kls(module(op, backend), "cuda")
        blocks.slices_of_linear_kl(module(op, backend), "cuda")
        return
    blocks.linear_cross_entropies(module(op, backend), "cuda")
    with blocks.small_memory(rows=4):
        for dtype in (torch.bfloat16, torch.float16):
            linear = module(op, backend)
            assert no_label_problems(linear.forward, linear.backward, dtype, device="cuda") == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_on_the_device(dtype, device):
    """Hidden @ W^T, dz @ W and dz^T @ rows, of blocks of larger matrices, into blocks of larger ones, twice added."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, dz = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((40, 48), (100, 48), (40, 100))
    )
    rows, block = slice(3, 35), slice(64, 97)
    memory = torch.full((40, 128), 7.0, device=device)
    for a, b, out in (
        (hidden[rows], weight[block].T, memory[rows, : block.stop - block.start]),
        (dz[rows], weight, memory[rows, :48]),
        (dz[rows].T, hidden[rows], torch.empty(100, 48, device=device)),
    ):
        expected = a.double() @ b.double()
        bound = 1e-5 * expected.abs().max().item()
        mm_float32(a, b, out)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound)
        addmm_float32(out, a, b)
        torch.testing.assert_close(out.double(), 2 * expected, rtol=0, atol=2 * bound)
    assert (memory[:3] == 7).all()
    assert (memory[35:] == 7).all()


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=gpu)])
def test_strides_and_offsets_survive_the_move(device):
    storage = torch.arange(200.0)
    for tensor in (storage[1:101].view(10, 10), storage[3:].as_strided((4, 5), (20, 3), 7), storage[:1].expand(6)):
        there = moved(tensor, device)
        assert (there.stride(), there.storage_offset()) == (tensor.stride(), tensor.storage_offset())
        if device == "cuda":
            assert torch.equal(there.cpu(), tensor)
