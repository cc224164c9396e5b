"""What the host needs for a call of the routing ops, where the kernels do next to nothing.

    python -m benchmarks.host

On CPU tensors calls run; those of the GPU backends run on meta tensors, whose launches are recorded instead of made: a
launch itself takes 3 to 5 us more, or some 25 through Triton. The time is the thread's own, which other processes
disturb less; a quiet machine gives the figures that count. Beside it stands what one small operation of torch takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import trace_kernels as tk
from trace_kernels.runtime.recording import recording

T, E, K = 4, 128, 8
#: Microseconds that a call is meant to need.
GOALS = {
    "cpu record_routing_": 12,
    "cpu router_topk": 25,
    "cuda router_topk, forward with gradient": 60,
    "cuda router_topk, forward + backward": 140,
}


def microseconds(call: Callable[[], object], calls: int = 500, repeats: int = 10) -> float:
    """The least mean over `calls`."""
    for _ in range(calls // 5):
        call()
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - begin) / calls)
    return best * 1e6


def calls(device: str, backend: str) -> dict[str, Callable[[], object]]:
    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    recorded: dict[str, Any] = {
        "token_mask": tensor(T, dtype=torch.bool), "table": tensor(E), "token_score": tensor(T), "backend": backend,
    }  # fmt: skip
    counts, indices = tensor(E, dtype=torch.int64), tensor(T, K, dtype=torch.int64)
    logits, upstream = tensor(T, E), tensor(T, K)
    leaf = logits.clone().requires_grad_()

    def route(z: torch.Tensor) -> torch.Tensor:
        return tk.router_topk(z, K, counts=counts, **recorded)[0]

    return {
        "record_routing_": lambda: tk.record_routing_(indices, counts, **recorded),
        "router_topk": lambda: route(logits),
        "router_topk, forward with gradient": lambda: route(leaf),
        "router_topk, forward + backward": lambda: torch.autograd.grad(route(leaf), leaf, upstream),
    }


def main() -> None:
    torch.set_num_threads(1)
    one = torch.ones(4)
    print(f"{'one small torch operation':<45} {microseconds(lambda: one + one):>6.1f} us")
    for device, backend in (("cpu", "cpu"), ("meta", "cuda"), ("meta", "triton")):
        for name, call in calls(device, backend).items():
            if device == "cpu":
                spent = microseconds(call)
            else:
                with recording():
                    spent = microseconds(call)
            goal = GOALS.get(f"{backend} {name}")
            print(f"{backend + ' ' + name:<45} {spent:>6.1f} us" + (f", goal {goal}" if goal else ""))


if __name__ == "__main__":
    main()
