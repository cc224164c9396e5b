"""Routes on disk: one .npy file that grows while a model runs and is then read as a memory map."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from trace_unlearn.errors import UserError


class RoutesFile:
    """Appends [n, L, k] expert indices to a new .npy file, uint8 for up to 255 experts, else uint16.

    The largest number of the dtype is a slot without a routed expert. Memory is bounded by one batch.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "routes.npy"
        >>> file = RoutesFile(path, num_experts=4)
        >>> file.append(torch.tensor([[[0, 3]], [[2, -1]]]))
        >>> file.close()
        >>> np.load(path, mmap_mode="r").tolist()
        [[[0, 3]], [[2, 255]]]
    """

    def __init__(self, path: str | os.PathLike[str], num_experts: int) -> None:
        if Path(path).exists():
            raise UserError(f"store_routes: {path} exists already; remove it or choose another name")
        self._dtype = np.dtype(np.uint8 if num_experts <= 255 else np.uint16)
        self._empty = 2 ** (8 * self._dtype.itemsize) - 1
        self._num_experts = num_experts
        self._shape = (0, 0, 0)
        try:
            self._file = open(path, "w+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise UserError(f"store_routes: cannot write {path}: {error.strerror}") from error
        self._write_header()

    def append(self, routes: torch.Tensor) -> None:
        n, L, k = routes.shape
        if self._shape[0] and (L, k) != self._shape[1:]:
            raise ValueError(f"routes: got [n, {L}, {k}], allowed is [n, {self._shape[1]}, {self._shape[2]}]")
        outside = (routes < 0) | (routes >= self._num_experts)
        values = routes.masked_fill(outside, self._empty).cpu().numpy().astype(self._dtype)
        self._file.write(values.tobytes())
        self._shape = (self._shape[0] + n, L, k)

    def close(self) -> None:
        """Writes how many there are; a second call does nothing."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def _write_header(self) -> None:
        # Version 1.0 of the format, padded to 128 bytes: the shape is written over once it is known.
        text = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': {self._shape}, }}"
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n")
