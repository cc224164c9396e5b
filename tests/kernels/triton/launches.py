"""The launches that the tests compile: every kernel's launcher, run on meta tensors, in the configurations it can meet.

What is compiled is what a call would launch: the launcher picks tiles and flags, and arguments are specialised
by the rules of Triton's just-in-time compiler.
"""

import torch

from trace_kernels.runtime.recording import recording
from trace_kernels.shared.triton_common import Launch

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
    from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
    from trace_kernels.ops.cross_entropy.triton import backward, forward

    T = 8192
    target, row = empty(T, dtype=torch.int64), empty(T)
    for dtype, V, softcap in (
        (BF16, 151936, None),
        (BF16, 256000, 30.0),
        (BF16, 50257, None),
        (BF16, 100, None),
        (FP32, 151936, None),
        (FP16, 32000, 30.0),
    ):
        logits, rows = empty(T, V, dtype=dtype), Rows(target, -100, softcap, 1.0)
        forward(logits, rows)
        for uniform in (None, row):
            backward(logits, rows, row, LogitGradient(row, uniform, row), True)


# (dtype, T, H, V) of the linear ops: a model's, in every dtype, and one smaller than any tile.
LINEAR = (
    (BF16, 8192, 2048, 151936),
    (FP32, 8192, 2048, 151936),
    (FP16, 8192, 4096, 32000),
    (BF16, 37, 24, 101),
)


def linear_cross_entropy():
    from trace_kernels.ops.linear_cross_entropy.triton import backward, forward, stats
    from trace_kernels.shared.linear import Call, Gradient

    for dtype, T, H, V in LINEAR:
        hidden, weight = empty(T, H, dtype=dtype), empty(V, H, dtype=dtype)
        row = empty(T)
        for bias, row_weight, softcap in ((None, None, None), (empty(V), row, 30.0)):
            call = Call(hidden, weight, bias, empty(T, dtype=torch.int64), row_weight, -100, softcap, 1.0)
            for gradient in (False, True) if dtype == BF16 else (True,):
                forward(call, gradient, gradient)
            for K, entropy in ((1, True), (4, False)):
                several = call._replace(target=empty(T, K, dtype=torch.int64))
                stats(several, True, entropy)
                backward(several, row, Gradient(row, row if entropy else None, empty(T, K)), True, True)


def linear_kl():
    from trace_kernels.ops.linear_kl.triton import backward_weight, forward
    from trace_kernels.shared.linear import Call

    for dtype, T, H, V in LINEAR:
        hidden, weight, row = empty(T, H, dtype=dtype), empty(V, H, dtype=dtype), empty(T)
        for row_weight, softcap in ((None, None), (row, 30.0)):
            call = Call(hidden, weight, None, None, row_weight, -100, softcap, 1.0)
            for gradient in (False, True) if dtype == BF16 else (True,):
                forward(call, call, gradient, gradient, None)
            call = call._replace(row_weight=row)
            backward_weight(call, call, row, row, empty(T, dtype=torch.int64), row)


def router_topk():
    from trace_kernels.ops.router_topk.rule import Rule
    from trace_kernels.ops.router_topk.triton import backward, forward

    T = 16384
    mask, lowest = empty(T, dtype=torch.bool), float("-inf")
    for dtype, E, k, function, renormalize, eps, groups, bias, keep in (
        # Qwen3-30B-A3B, Qwen3-Next, OLMoE, Mixtral, gpt-oss-20b, DeepSeek-V2-Lite, DeepSeek-V2, DeepSeek-V3, V4
        (BF16, 128, 8, "softmax", True, 0.0, (1, 1, "max", 0.0), False, True),
        (BF16, 512, 10, "softmax", True, 0.0, (1, 1, "max", 0.0), False, False),
        (BF16, 64, 8, "softmax", False, 0.0, (1, 1, "max", 0.0), False, True),
        (BF16, 8, 2, "softmax", True, 0.0, (1, 1, "max", 0.0), False, True),
        (BF16, 32, 4, "softmax_topk", False, 0.0, (1, 1, "max", 0.0), False, True),
        (FP32, 64, 6, "softmax", False, 0.0, (1, 1, "max", 0.0), False, True),
        (FP32, 160, 6, "softmax", False, 0.0, (8, 3, "max", 0.0), False, True),
        (FP32, 256, 8, "sigmoid", True, 1e-20, (8, 4, "sum_top2", lowest), True, True),
        (FP32, 256, 6, "sqrtsoftplus", True, 1e-20, (1, 1, "max", 0.0), True, True),
        # the limits, and what no model above has
        (FP32, 1024, 64, "softmax", True, 1e-20, (16, 4, "sum_top2", lowest), True, True),
        (BF16, 1024, 64, "sigmoid", True, 0.0, (1, 1, "max", 0.0), False, True),
        (FP16, 60, 6, "softmax", True, 0.0, (1, 1, "max", 0.0), True, True),
        (BF16, 256, 8, "sigmoid", True, 0.0, (8, 4, "sum_top2", lowest), True, False),
    ):
        rule = Rule(k, function, renormalize, 1.0, eps, *groups)
        logits, selection_bias = empty(T, E, dtype=dtype), empty(E) if bias else None
        recorded = empty(E, dtype=torch.int64), empty(T)
        outputs = forward(logits, rule, selection_bias, mask, empty(E), None, *recorded, dtype, keep)
        if keep:
            saved = logits if rule.dense_gradient else None
            backward(empty(T, k, dtype=dtype), saved, *outputs[1:4], rule, E, dtype)
    rule = Rule(8, "softmax", True, 1.0, 0.0, 1, 1, "max", 0.0)
    counts, given = empty(128, dtype=torch.int64), empty(T, 8, dtype=torch.int64)
    forward(empty(T, 128, dtype=BF16), rule, None, None, None, None, None, None, FP32, False)
    forward(empty(128, T, dtype=BF16).T, rule, None, None, None, None, counts, None, BF16, False)
    forward(empty(T, 128, dtype=BF16), rule, None, mask, empty(128), given, counts, empty(T), BF16, True)
    # Experts that are given: not narrow, every score function, and a rule with groups, which they do not need
    for dtype, function, keep in ((FP32, "softmax", True), (FP16, "sigmoid", True), (BF16, "softmax_topk", False)):
        rule = Rule(8, function, False, 1.0, 0.0, 8, 4, "sum_top2", lowest)
        forward(empty(T, 128, dtype=dtype), rule, empty(128), None, None, given, None, None, dtype, keep)
    rule = Rule(8, "sqrtsoftplus", True, 1.0, 1e-20, 1, 1, "max", 0.0)
    forward(empty(T, 128), rule, None, mask, None, given, counts, None, FP32, True)
    rule = Rule(12, "sigmoid", True, 1.0, 0.0, 8, 4, "sum_topk", lowest)
    forward(empty(T, 256), rule, empty(256), None, None, None, None, None, FP32, True)


OPS = {
    function.__name__: function
    for function in (
        record_routing,
        router_topk,
        cross_entropy,
        linear_cross_entropy,
        linear_kl,
    )
}

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
        if name in launch.kernel.do_not_specialize:
            signature[name] = "i32"
            continue
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
            key = (launch.kernel.__name__, repr(specialised(launch)), repr(launch.options))
            found.setdefault(key, launch)
    return list(found.values())
