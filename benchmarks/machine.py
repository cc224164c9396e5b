"""What a row of results must say about where it was measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

import trace_kernels

ROOT = Path(__file__).parent.parent


def describe(device: torch.device) -> dict[str, str]:
    """Commit, device and versions, as the columns of a row."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    return {
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "trace_kernels": trace_kernels.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The short commit, with a + when the tree differs from it; 'unknown' outside a checkout."""
    try:
        revision = _git("rev-parse", "--short", "HEAD")
        return revision + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """The processor's name, with the vector extensions that the kernels care about."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    flags = set(next((line.split(":")[1] for line in text.splitlines() if line.startswith("flags")), "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({' '.join(known)})"
