"""The launches that the tests compile: every kernel's launcher, run on meta tensors, in the configurations it can meet.

What is compiled is what a call would launch: the launcher picks tiles and flags, and arguments are specialised
by the rules of Triton's just-in-time compiler.
"""

import itertools

import torch

from trace_kernels.triton_common import Launch, recording

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def record_routing():
    from trace_kernels.ops.record_routing.triton import forward

    T = 16384
    flags = {"token_mask": empty(T, dtype=torch.bool), "table": empty(128), "token_score": empty(T)}
    gate = empty(dtype=torch.int32)
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64):
        forward(empty(T, 8, dtype=dtype), empty(128, dtype=torch.int64), *flags.values(), gate)
    for num_experts, k in ((8, 2), (60, 6), (512, 10), (1024, 64)):
        table = empty(num_experts)
        forward(
            empty(T, k, dtype=torch.int64),
            empty(num_experts, dtype=torch.int64),
            None,
            table,
            flags["token_score"],
            None,
        )
    forward(empty(T, 8, dtype=torch.int64), empty(128, dtype=torch.int64), None, None, None, None)
    strided = empty(2 * T, 24, dtype=torch.int64)[::2, ::3]
    forward(strided, empty(128, 3, dtype=torch.int64)[:, 0], *flags.values(), None)


def cross_entropy():
    from trace_kernels.ops.cross_entropy.triton import backward, forward

    T = 8192
    target, row = empty(T, dtype=torch.int64), empty(T)
    for dtype, V, softcap in itertools.product((FP32, BF16, FP16), (151936, 50257, 100), (None, 30.0)):
        logits = empty(T, V, dtype=dtype)
        forward(logits, target, -100, softcap, 1.0)
        backward(row, logits, target, row, -100, softcap, 1.0, True)


def linear_cross_entropy():
    from trace_kernels.ops.linear_cross_entropy.triton import backward_weight, forward

    for dtype, (T, H, V) in itertools.product((FP32, BF16, FP16), ((8192, 2048, 151936), (37, 24, 101))):
        hidden, weight = empty(T, H, dtype=dtype), empty(V, H, dtype=dtype)
        target, row = empty(T, dtype=torch.int64), empty(T)
        for bias, row_weight, softcap in ((None, None, None), (empty(V), row, 30.0)):
            for gradient in (False, True):
                forward(hidden, weight, bias, target, row_weight, -100, softcap, 1.0, gradient, gradient)
            backward_weight(hidden, weight, bias, target, row, row, -100, softcap, 1.0)


def linear_kl():
    from trace_kernels.ops.linear_kl.triton import backward_weight, forward

    for dtype, (T, H, V) in itertools.product((FP32, BF16, FP16), ((8192, 2048, 151936), (37, 24, 101))):
        hidden, weight, row = empty(T, H, dtype=dtype), empty(V, H, dtype=dtype), empty(T)
        for row_weight, softcap in ((None, None), (row, 30.0)):
            for gradient in (False, True):
                forward(hidden, weight, hidden, weight, row_weight, softcap, 1.0, gradient, gradient)
            backward_weight(hidden, weight, hidden, weight, row, row, row, softcap, 1.0)


OPS = {function.__name__: function for function in (record_routing, cross_entropy, linear_cross_entropy, linear_kl)}

TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.uint16: "u16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


def specialised(launch):
    """Signature, constants and attributes of a launch, as the just-in-time compiler would choose them."""
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.constants[name] if name in launch.constants else launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[position,] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[name] = "fp32"
            continue
        if isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "*" + TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        if aligned:
            attributes[position,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def unique_launches(op):
    """Those of the op that compile to different code, by a readable name."""
    with recording() as recorded:
        OPS[op]()
    found = {}
    for launch in recorded:
        if isinstance(launch, Launch):
            key = (launch.kernel.__name__, repr(specialised(launch)), launch.num_warps)
            found.setdefault(key, launch)
    return list(found.values())
