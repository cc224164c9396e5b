"""The linear ops of a GPU backend's module where several blocks of columns and chunks of rows make a call.

Without a GPU the kernels run in Triton's interpreter or in emulation.h's; the checks take a device, too.
"""

import contextlib
import os

import torch

from trace_kernels.ops.linear_cross_entropy import reference as linear_reference
from trace_kernels.ops.linear_kl import chunked as kl_chunks
from trace_kernels.ops.linear_kl import reference as kl_reference
from trace_kernels.shared import chunks as chunk_memory
from trace_kernels.shared.linear import Call, Gradient
from trace_kernels.shared.losses import NO_LABEL

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(got, expected, dtype=None):
    """Within the rounding of `dtype` or the output's, relative to the largest entry."""
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if not other.is_floating_point():
            assert torch.equal(one, other)
        elif other.numel():
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype or one.dtype] * max(scale, 1e-6))


def inputs(dtype, device="cpu", T=9, H=16, V=4400):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    # A maximum that grows by more than the reference may lag, twice in a row and in the last block.
    weight[1500] *= 30
    weight[4399] *= 90
    target = torch.randint(V, (T,), generator=generator)
    target[2], target[5], target[6] = -100, 4399, 0
    row_weight = torch.randn(T, generator=generator)
    row_weight[3] = 0
    hidden[2:4] = float("nan")  # rows that do not count may hold anything
    made = hidden, weight, target, row_weight, torch.randn(V, generator=generator)
    return tuple(tensor.to(device) for tensor in made)


@contextlib.contextmanager
def small_memory(rows):
    """Blocks of 2048 columns, and chunks of so many rows of 4400 columns of a 16-bit dz."""
    before = chunk_memory.BLOCK_BYTES
    chunk_memory.BLOCK_BYTES = 1
    os.environ["TRACE_KERNELS_CHUNK_BYTES"] = str(2 * 4416 * rows)
    try:
        yield
    finally:
        chunk_memory.BLOCK_BYTES = before
        del os.environ["TRACE_KERNELS_CHUNK_BYTES"]


def linear_cross_entropy(linear, dtype, bias, softcap, device="cpu"):
    hidden, weight, target, row_weight, offset = inputs(dtype, device)
    call = Call(hidden, weight, offset if bias else None, target, row_weight, -100, softcap, 0.7)
    expected = linear_reference.forward(call, True, True)
    got = linear.forward(call, True, True)
    close(got[:4], expected[:4])
    if bias:  # sums a rounded dz
        close(got[4:], expected[4:], dtype)
    close(linear.forward(call, False, False), linear_reference.forward(call, False, False))
    # Several targets, of which some are the same class, another slice's or ignored; and the entropy of one.
    target = torch.stack([target, target.roll(1), torch.where(target % 2 == 0, target, NO_LABEL)], dim=1)
    target[2] = -100  # as a whole: its hidden states are NaN
    for targets, entropy in ((target, False), (target[:, :1].contiguous(), True)):
        several = call._replace(target=targets)
        found, expected = linear.stats(several, True, entropy), linear_reference.stats(several, True, entropy)
        finite = torch.isfinite(expected.logp)
        assert torch.equal(torch.isfinite(found.logp), finite)
        close([found.logp[finite], *found[1:]], [expected.logp[finite], *expected[1:]])
        repeated = (targets == targets[:, :1]) & (targets != -100)
        distinct = torch.where(repeated, NO_LABEL, targets)
        distinct[:, 0] = targets[:, 0]
        gradient = Gradient(row_weight, row_weight.flip(0) if entropy else None, distinct.float().sin())
        several = call._replace(target=distinct)
        got = linear.backward(several, expected.lse, gradient, True, True)
        wanted = linear_reference.backward(several, expected.lse, gradient, True, True)
        close(got[:2], wanted[:2])
        if bias:
            close(got[2:], wanted[2:], dtype)


def linear_kl(kl, dtype, softcap, device="cpu"):
    hidden, weight, _, row_weight, _ = inputs(dtype, device)
    weight[1500] /= 20
    weight[4399] /= 60
    row_weight[2] = 0
    policy = Call(hidden, weight, None, None, row_weight, -100, softcap, 0.7)
    ref = policy._replace(hidden=hidden.flip(1), weight=weight.flip(1) * 0.5)
    expected = kl_reference.forward(policy, ref, True, True, None)
    close(kl.forward(policy, ref, True, True, None), expected)
    # With a gradient one block has all columns.
    close(kl.forward(policy, ref, False, False, None)[:5], expected[:5])
    known = expected[1:5]
    close([kl.backward_weight(policy, ref, *known)], [kl_reference.backward_weight(policy, ref, *known)])


def linear_cross_entropies(linear, device="cpu"):
    with small_memory(rows=4):
        linear_cross_entropy(linear, torch.bfloat16, True, None, device)
        linear_cross_entropy(linear, torch.float32, False, 30.0, device)
        linear_cross_entropy(linear, torch.float16, False, 30.0, device)


def linear_kls(kl, device="cpu"):
    with small_memory(rows=20):
        linear_kl(kl, torch.bfloat16, None, device)
        linear_kl(kl, torch.float32, 30.0, device)


def slices_of_linear_kl(kl, device="cpu"):
    """Two slices of the vocabulary, each told the sums of the whole one after every chunk of rows."""
    hidden, weight, _, row_weight, _ = inputs(torch.bfloat16, device)
    weight[1500] /= 20
    weight[4399] /= 60
    row_weight[2] = 0
    policy = Call(hidden, weight, None, None, row_weight, -100, 30.0, 0.7)
    ref = policy._replace(hidden=hidden.flip(1), weight=weight.flip(1) * 0.5)
    whole = kl_reference.forward(policy, ref, True, False, None)
    outer = []
    kl_reference.forward(policy, ref, False, False, lambda *rows: outer.extend(values.clone() for values in rows))
    before, kl_chunks.SPLIT_ROWS = kl_chunks.SPLIT_ROWS, 4
    parts, seen = [], []
    try:
        for part in (slice(0, 2500), slice(2500, 4400)):
            start = 0

            def exchange(*rows):
                nonlocal start
                here = slice(start, start + len(rows[0]))
                for logp, lse, all_rows in zip(rows[3:], rows[1:3], outer[1:3], strict=True):
                    logp += lse - all_rows[here]  # the slice's share
                for mine, all_rows in zip(rows[:3], outer[:3], strict=True):
                    mine.copy_(all_rows[here])
                start = here.stop

            slices = [call._replace(weight=call.weight[part]) for call in (policy, ref)]
            with small_memory(rows=4):
                parts.append(kl.forward(*slices, True, False, exchange)[5].float())
            seen.append(start)
    finally:
        kl_chunks.SPLIT_ROWS = before
    assert seen == [9, 9]
    close([sum(parts)], [whole[5].float()], torch.bfloat16)
