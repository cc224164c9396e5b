"""What the Triton backend plans to move and compute for real models, beside the floor. No GPU is used.

    python -m benchmarks.traffic

The launchers run on meta tensors, which records every kernel launch, matrix product and torch operation with its
bytes and FLOPs. A planned time is the sum over all of them of the larger of bytes / bandwidth and the time of the
product's waves of tiles, and of a gap for each launch; the floor is bytes / bandwidth and FLOPs / peak of the op's
`cases.traffic`. Both are models of an H200, not measurements. A product with few tiles and a long sum is assumed to be
split along it by the library where that fills the card; a block of logits that fits the L2 cache is assumed to stay
there until the kernel after the product has read it. Where half of the rows are ignored, as prompts and padding are,
`floor` is the planned time of the same call with all of them, and the wait for their number counts. `host` is what the
host needs for the launches of a call by what one took on a CPU: where it is above the planned time, the device waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trace_kernels.runtime.recording import Product, cdiv, recording, size_of
from trace_kernels.shared.chunks import PROCESSORS, TILE_COLUMNS, TILE_ROWS
from trace_kernels.shared.triton_common import Launch
from trace_kernels.testing.cases import Case
from trace_kernels.testing.conformance import discover

TOKENS = 8192
#: What dense bfloat16 products and memory deliver on an H200, per second.
FLOPS, BANDWIDTH = 788e12, 4.3e12
#: What its L2 cache delivers to a kernel whose input the kernel before has left there, and what fits; assumptions.
CACHE_BANDWIDTH, CACHE_BYTES = 5.5e12, 40e6
#: Seconds from the end of a launch to the start of the next, and those that the host needs for one.
GAP, HOST = 1e-6, 22e-6
#: Seconds until the host knows how many rows take part.
WAIT = 20e-6
#: Planned over floor. The row ops take a few microseconds, of which a launch is most.
GOALS = {"linear": 1.25, "KL": 1.35, "half": 0.55}

#: Calls that are also planned with half of the rows ignored.
HALF = {
    "frozen head, any weights": "frozen head, half ignored",
    "trainable head, known weights": "trainable head, half ignored",
    "KL, frozen head": "KL, half ignored",
}


@dataclass(frozen=True)
class Model:
    """The sizes that matter: hidden width, vocabulary, experts, experts per token."""

    name: str
    H: int
    V: int
    E: int
    k: int


MODELS = (
    Model("Qwen3-30B-A3B", 2048, 151936, 128, 8),
    Model("OLMoE", 2048, 50304, 64, 8),
    Model("Mixtral", 4096, 32000, 8, 2),
    Model("gpt-oss-20b", 2880, 201088, 32, 4),
)


class TorchOperations(TorchDispatchMode):
    """Bytes of what the launchers ask of torch itself: fills, casts, small products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if moved := size_of(*tensors):
            self.bytes.append(moved)
        return result


@dataclass
class Plan:
    """What a call does: seconds by the model, those that are not matrix products, launches, and what they compute."""

    seconds: float
    other_seconds: float
    launches: int
    flops: float

    @property
    def host_seconds(self) -> float:
        return self.launches * HOST


def product_seconds(product: Product) -> float:
    """Of a library product whose tiles run in waves, as split along its sum as fills the card best."""
    tile = 2 * TILE_ROWS * TILE_COLUMNS * product.terms / (FLOPS / PROCESSORS)
    tiles = cdiv(product.rows, TILE_ROWS) * cdiv(product.columns, TILE_COLUMNS)
    splits = [parts for parts in (1, 2, 4, 8) if parts == 1 or product.terms >= 4096 * parts]
    moved = product.bytes / BANDWIDTH

    def seconds(parts: int) -> float:
        partial = 0 if parts == 1 else 8 * parts * product.rows * product.columns / BANDWIDTH
        return max(cdiv(tiles * parts, PROCESSORS) * tile / parts, moved) + partial

    return min(map(seconds, splits))


def plan(call: Callable[[], object], share: float | None = None) -> Plan:
    """share: of the rows, those that take part; None: all, and the host does not ask."""
    with recording(share) as recorded, TorchOperations() as torch_operations:
        call()
    products = [entry for entry in recorded if isinstance(entry, Product)]
    in_products = sum(map(product_seconds, products))
    # Everything passes through the L2 cache; what is not already there also comes from memory.
    kernels = [
        max((entry.bytes - entry.cached * (entry.cached <= CACHE_BYTES)) / BANDWIDTH, entry.bytes / CACHE_BANDWIDTH)
        for entry in recorded
        if isinstance(entry, Launch)
    ]
    other_seconds = sum(kernels) + sum(torch_operations.bytes) / BANDWIDTH
    launches = len(products) + len(kernels) + len(torch_operations.bytes)
    other_seconds += GAP * launches + (0.0 if share is None else WAIT)
    return Plan(in_products + other_seconds, other_seconds, launches, sum(product.flops for product in products))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_calls(model: Model) -> dict[str, tuple[str, int, Callable[[], object]]]:
    """By what is computed: the op, the products that the floor counts, the call."""
    from trace_kernels.ops.linear_cross_entropy import triton as linear
    from trace_kernels.ops.linear_kl import triton as kl
    from trace_kernels.shared.linear import Call, Gradient
    from trace_kernels.shared.triton_common import scaled_rows

    T = TOKENS
    hidden, weight = empty(T, model.H), empty(model.V, model.H)
    target, row = empty(T, dtype=torch.int64), empty(T, dtype=torch.float32)

    call = Call(hidden, weight, None, target, row, -100, None, 1.0)
    divergent = Call(hidden, weight, None, None, row, -100, None, 1.0)
    one = call._replace(target=target[:, None])

    def scaled(*stash: torch.Tensor) -> None:
        for gradient in stash:
            if gradient.numel():
                scaled_rows(gradient, empty(gradient.shape[0], dtype=torch.float32), gradient)

    def cross_entropy(dhidden: bool, dweight: bool) -> None:
        scaled(*linear.forward(call, dhidden, dweight)[2:4])

    def unknown_gradient() -> None:
        cross_entropy(True, False)
        linear.backward(one, row, Gradient(row, None, row[:, None]), False, True)

    def token_stats(gradient: bool) -> None:
        scaled(linear.stats(one, gradient, True).others)

    def divergence(dweight: bool) -> None:
        scaled(*kl.forward(divergent, divergent, True, dweight, None)[5:7])

    return {
        "log-probabilities only": ("linear_log_prob", 1, lambda: cross_entropy(False, False)),
        "frozen head, any weights": ("linear_cross_entropy", 2, lambda: cross_entropy(True, False)),
        "trainable head, known weights": ("linear_cross_entropy", 3, lambda: cross_entropy(True, True)),
        "trainable head, unknown weights": ("linear_log_prob", 4, unknown_gradient),
        "token statistics only": ("linear_log_prob", 1, lambda: token_stats(False)),
        "token statistics, frozen head": ("linear_cross_entropy", 2, lambda: token_stats(True)),
        "KL, frozen head": ("linear_kl", 3, lambda: divergence(False)),
        "KL, trainable head": ("linear_kl", 4, lambda: divergence(True)),
    }


def row_calls(model: Model) -> dict[str, tuple[str, Case, Callable[[], object]]]:
    """By what is computed: the op, the case of its floor, the call."""
    from trace_kernels.ops.cross_entropy import triton as cross_entropy
    from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
    from trace_kernels.ops.record_routing import triton as record_routing
    from trace_kernels.ops.router_topk import triton as router
    from trace_kernels.ops.router_topk.rule import Rule

    T, E, k = TOKENS, model.E, model.k
    target, row, mask = empty(T, dtype=torch.int64), empty(T, dtype=torch.float32), empty(T, dtype=torch.bool)
    counts, table = empty(E, dtype=torch.int64), empty(E, dtype=torch.float32)
    logits = empty(T, model.V)
    rule = Rule(k, "softmax", True, 1.0, 0.0, 1, 1, "max", 0.0)

    def loss() -> None:
        rows = Rows(target, -100, None, 1.0)
        cross_entropy.forward(logits, rows)
        cross_entropy.backward(logits, rows, row, LogitGradient(row, None, row), True)

    def route(keep: bool) -> None:
        _, indices, chosen, stats = router.forward(
            empty(T, E), rule, None, mask, table, None, counts, row, torch.bfloat16, keep
        )
        if keep:
            router.backward(empty(T, k), None, indices, chosen, stats, rule, E, torch.bfloat16)

    def record() -> None:
        record_routing.forward(empty(T, k, dtype=torch.int64), counts, mask, table, row, None)

    def case(name: str, **sizes: int) -> Case:
        return Case(name, {"T": T, **sizes}, lambda *_: NotImplemented, torch.bfloat16)

    routed = {"E": E, "k": k}
    return {
        "cross-entropy, in place": ("cross_entropy", case("bench", V=model.V), loss),
        "router, forward": ("router_topk", case("bench", **routed), lambda: route(False)),
        "router, forward + backward": ("router_topk", case("bench_backward", **routed), lambda: route(True)),
        "record routing": ("record_routing_", case("bench", **routed), record),
    }


def floor(op: str, case: Case, passes: int | None = None) -> float:
    traffic = discover()[op].traffic(case)
    flops = traffic.flops if passes is None else 2.0 * TOKENS * case.sizes["H"] * case.sizes["V"] * passes
    return max(traffic.bytes / BANDWIDTH, flops / FLOPS)


def rows() -> list[tuple[str, str, str, float, Plan]]:
    """Kind, model, what is computed, floor in seconds, plan."""
    found = []
    for model in MODELS:
        for name, (op, passes, call) in linear_calls(model).items():
            case = Case("bench_frozen", {"T": TOKENS, "H": model.H, "V": model.V}, lambda *_: NotImplemented)
            kind, whole = "KL" if "KL" in name else "linear", plan(call)
            found.append((kind, model.name, name, floor(op, case, passes), whole))
            if name in HALF:
                found.append(("half", model.name, HALF[name], whole.seconds, plan(call, 0.5)))
    for model in MODELS:
        for name, (op, case, call) in row_calls(model).items():
            # Their FLOPs never bind: element-wise work is not done at the products' peak.
            found.append(("row", model.name, name, discover()[op].traffic(case).bytes / BANDWIDTH, plan(call)))
    return found


def verdict(kind: str, ratio: float) -> str:
    if kind not in GOALS:
        return ""
    return "met" if ratio <= GOALS[kind] else f">{GOALS[kind]}"


def main() -> None:
    print(
        f"A model, not a measurement: {TOKENS} tokens, bfloat16, {FLOPS / 1e12:.0f} TFLOP/s, "
        f"memory {BANDWIDTH / 1e12:.1f} TB/s, L2 {CACHE_BANDWIDTH / 1e12:.1f} TB/s"
    )
    print(
        f"{'model':<15} {'call':<33} {'floor':>10} {'planned':>10} {'ratio':>6} {'goal':>6} {'launches':>9} "
        f"{'rows':>6} {'host':>10}"
    )
    for kind, model, name, seconds, planned in rows():
        ratio = planned.seconds / seconds
        share = planned.other_seconds / planned.seconds
        print(
            f"{model:<15} {name:<33} {seconds * 1e6:>7.1f} us {planned.seconds * 1e6:>7.1f} us {ratio:>6.2f} "
            f"{verdict(kind, ratio):>6} {planned.launches:>9} {share:>6.0%} "
            f"{planned.host_seconds * 1e6:>7.1f} us"
        )


if __name__ == "__main__":
    main()
