"""What a result was made with."""

from __future__ import annotations

import platform

import torch
import transformers

import trace_kernels


def versions() -> dict[str, str]:
    """The versions that a record keeps beside its result.

    >>> sorted(versions())
    ['python', 'torch', 'trace_kernels', 'transformers']
    """
    return {
        "trace_kernels": trace_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
