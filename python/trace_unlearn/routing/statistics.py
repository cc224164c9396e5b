"""Routing statistics: what `profile` saw of both data sets, and the folder it lies in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trace_unlearn import files
from trace_unlearn.errors import UserError

TENSORS, META, ROUTES, PROMPT_ROUTES = "routing.safetensors", "routing.json", "routes.npy", "prompt_routes.npy"
#: Whose routing the weight of a retain token looks at.
UNITS = ("token", "context", "document")
DEFAULT_UNIT = "token"
_FORMAT = 3
_TENSOR_FIELDS = (
    "forget_counts",
    "retain_counts",
    "retain_offsets",
    "forget_design_effect",
    "retain_design_effect",
)


_CONTEXT_FIELDS = ("counted", "forget_sums", "retain_sums", "forget_design_effect", "retain_design_effect")


@dataclass(frozen=True)
class Contexts:
    """What the losses of counted tokens read: the context of a token is it and the positions before it.

    P is the number of retain positions that some counted token reads, prompts among them, and ends of documents that
    nothing reads not.

    Attributes:
        counted: [P] bool, in the order of the data set: which of them are counted. A document's last one is.
        prompt_routes: [P - N, L, k], as retain_routes, of those that are not.
        forget_sums: [L, E] float64, over the counted forget tokens: the sum of their contexts' mean hits.
        retain_sums: [L, E] float64, likewise.
        window: the positions that attention reads at most, the token's own among them; None for all.
        forget_design_effect: [L, E] float32, as that of the statistics, of the mean of these means.
        retain_design_effect: [L, E] float32, likewise.
    """

    counted: torch.Tensor
    prompt_routes: torch.Tensor
    forget_sums: torch.Tensor
    retain_sums: torch.Tensor
    window: int | None = None
    forget_design_effect: torch.Tensor | None = None
    retain_design_effect: torch.Tensor | None = None


@dataclass(frozen=True)
class RoutingStatistics:
    """What `profile_routing` saw. Tokens here are loss-bearing ones only.

    L is the number of MoE layers, E of experts, k of experts a token activates in a layer, N of retain tokens, D of
    retain documents.

    Attributes:
        forget_counts: [L, E] int64, how many forget tokens activated an expert.
        retain_counts: [L, E] int64.
        forget_tokens: how many forget tokens there are.
        retain_tokens: N.
        top_k: k.
        retain_routes: [N, L, k] uint8 or uint16, the experts of each retain token in the order of the data set; an
            entry of E or more is a slot without a routed expert. It may be a memory map of a file.
        retain_offsets: [D + 1] int64; the tokens of document d are retain_offsets[d] to retain_offsets[d + 1].
        meta: the model, its layers, the fingerprints of both data sets, and the versions of what computed this.
        forget_design_effect: [L, E] float32, by how much the variance of f over documents exceeds that of independent
            tokens; None when it was not measured.
        retain_design_effect: [L, E] float32, likewise of r.
        contexts: what unit "context" needs, where it was profiled.

    Example:
        >>> stats = RoutingStatistics(torch.tensor([[3, 1, 0]]), torch.tensor([[2, 2, 4]]), 4, 8, 1,
        ...                           torch.zeros(8, 1, 1, dtype=torch.uint8), torch.tensor([0, 8]))
        >>> stats.forget_frequency.tolist()
        [[0.75, 0.25, 0.0]]
    """

    forget_counts: torch.Tensor
    retain_counts: torch.Tensor
    forget_tokens: int
    retain_tokens: int
    top_k: int
    retain_routes: torch.Tensor
    retain_offsets: torch.Tensor
    meta: dict[str, Any] = field(default_factory=dict)
    forget_design_effect: torch.Tensor | None = None
    retain_design_effect: torch.Tensor | None = None
    contexts: Contexts | None = None

    @property
    def forget_frequency(self) -> torch.Tensor:
        """The f [L, E] float64: the share of forget tokens that activate an expert; a layer sums to k."""
        return self.forget_counts.double() / self.forget_tokens

    @property
    def retain_frequency(self) -> torch.Tensor:
        """The r [L, E] float64: likewise of retain tokens."""
        return self.retain_counts.double() / self.retain_tokens

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the folder in one step: it is there and whole, or not there."""
        with files.staged_folder(folder) as staged:
            np.save(staged / ROUTES, self.retain_routes.numpy())
            if self.contexts is not None:
                np.save(staged / PROMPT_ROUTES, self.contexts.prompt_routes.numpy())
            self.save_rest(staged)

    def save_rest(self, staged: Path) -> None:
        """Writes all but the routes into a folder that is there."""
        tensors = {name: value for name in _TENSOR_FIELDS if isinstance(value := getattr(self, name), torch.Tensor)}
        plain: dict[str, Any] = {}
        if self.contexts is not None:
            plain["window"] = self.contexts.window
            for name in _CONTEXT_FIELDS:
                if isinstance(value := getattr(self.contexts, name), torch.Tensor):
                    tensors[f"context_{name}"] = value
        files.save_tensors(staged / TENSORS, tensors)
        numbers = {name: getattr(self, name) for name in ("forget_tokens", "retain_tokens", "top_k")}
        files.write_json(staged / META, {"format": _FORMAT, **numbers, **plain, "meta": self.meta})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RoutingStatistics:
        """Reads what `save` wrote, the routes as a memory map; UserError for anything else."""
        files.check_made_by("profile", folder, META)
        meta = files.read_json(Path(folder) / META)
        made_with = meta.pop("format", None) if isinstance(meta, dict) else None
        if made_with is None:
            raise UserError(f"{Path(folder) / META}: not routing statistics")
        if made_with != _FORMAT:
            raise UserError(
                f"{folder}: made by another version of trace-unlearn (format {made_with}, this one reads {_FORMAT}); "
                "run `trace-unlearn profile` again, with another output"
            )
        tensors: dict[str, Any] = files.load_tensors(Path(folder) / TENSORS)
        routes = _mapped(Path(folder) / ROUTES)
        try:
            contexts = None
            if "window" in meta:
                own = {n: tensors.pop(f"context_{n}") for n in _CONTEXT_FIELDS if f"context_{n}" in tensors}
                contexts = Contexts(
                    prompt_routes=_mapped(Path(folder) / PROMPT_ROUTES), window=meta.pop("window"), **own
                )
            stats = cls(retain_routes=routes, contexts=contexts, **tensors, **meta)
            L, E = stats.forget_counts.shape
            N = stats.retain_tokens
            whole = (
                stats.retain_counts.shape == (L, E)
                and stats.retain_routes.shape == (N, L, stats.top_k)
                and int(stats.retain_offsets[-1]) == N
                and (contexts is None or contexts.prompt_routes.shape == (len(contexts.counted) - N, L, stats.top_k))
            )
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{folder}: not routing statistics: {error}") from error
        if not whole:
            raise UserError(f"{folder}: {TENSORS}, {META} and {ROUTES} do not belong together; profile again")
        return stats


def _mapped(path: Path) -> torch.Tensor:
    try:
        # Copy on write: torch wants memory that may be written to; nobody does.
        return torch.from_numpy(np.load(path, mmap_mode="c"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable routes: {error}") from error
