"""The card that results were measured on, and what it delivers: the floors that timings are compared with."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import torch

from trace_kernels.shared.chunks import mm_float32

FIELDS = (
    "name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "power.draw", "power.limit", "temperature.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip


def card() -> dict[str, str]:
    """What nvidia-smi says of the first card: model, driver, clocks, power; what it does not know is left out."""
    found = {}
    for field in FIELDS:  # one by one: an older nvidia-smi refuses a query with a name that it does not know
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if result.returncode == 0:
            found[field] = result.stdout.strip()
    return found


def floors(device: torch.device) -> dict[str, float]:
    """Measured now: bytes per second of a copy (read plus written), FLOPs per second of a bf16 product into float32."""
    large = device.type == "cuda"
    source = torch.ones((2**30 if large else 2**16) // 4, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(size, size, device=device)
    return {
        "bytes_per_second": 2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
        "flops_per_second": 2 * size**3 / _fastest(lambda: mm_float32(a, b, out), device),
    }


def _fastest(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
