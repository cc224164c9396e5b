"""The verb `profile`: which experts the forget and the retain data activate in the model as it is."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import trace_kernels
from trace_unlearn import files
from trace_unlearn.data import check_disjoint, collate, fingerprint, load_tokens, loss_bearing
from trace_unlearn.encoding import IGNORE_INDEX
from trace_unlearn.errors import UserError
from trace_unlearn.model import check_inputs, check_placement, load_model, load_tokenizer
from trace_unlearn.routing import RoutingRecorder, unwrap

TENSORS, META = "routing.safetensors", "routing.json"
_FORMAT = 1
_TENSOR_FIELDS = (
    "forget_counts",
    "retain_counts",
    "retain_routes",
    "retain_offsets",
    "forget_design_effect",
    "retain_design_effect",
)


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
            entry of E or more is a slot without a routed expert.
        retain_offsets: [D + 1] int64; the tokens of document d are retain_offsets[d] to retain_offsets[d + 1].
        meta: the model, its layers, the fingerprints of both data sets, and the versions of what computed this.
        forget_design_effect: [L, E] float32, by how much the variance of f over documents exceeds that of independent
            tokens; None when it was not measured.
        retain_design_effect: [L, E] float32, likewise of r.

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
            tensors = {name: value for name in _TENSOR_FIELDS if isinstance(value := getattr(self, name), torch.Tensor)}
            files.save_tensors(staged / TENSORS, tensors)
            numbers = {name: getattr(self, name) for name in ("forget_tokens", "retain_tokens", "top_k")}
            files.write_json(staged / META, {"format": _FORMAT, **numbers, "meta": self.meta})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RoutingStatistics:
        """Reads what `save` wrote; UserError for anything else."""
        meta = files.read_json(Path(folder) / META)
        tensors: dict[str, Any] = files.load_tensors(Path(folder) / TENSORS)
        if not isinstance(meta, dict) or meta.pop("format", None) != _FORMAT:
            raise UserError(f"{Path(folder) / META}: not routing statistics that this version of trace-unlearn reads")
        try:
            stats = cls(**tensors, **meta)
            L, E = stats.forget_counts.shape
            N = stats.retain_tokens
            whole = (
                stats.retain_counts.shape == (L, E)
                and stats.retain_routes.shape == (N, L, stats.top_k)
                and int(stats.retain_offsets[-1]) == N
            )
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{folder}: not routing statistics: {error}") from error
        if not whole:
            raise UserError(f"{folder}: {TENSORS} and {META} do not belong together; profile again")
        return stats


def profile_routing(
    model: PreTrainedModel,
    forget: datasets.Dataset,
    retain: datasets.Dataset,
    *,
    batch_size: int = 8,
    pad_token_id: int,
    progress: bool = True,
) -> RoutingStatistics:
    """Runs both data sets once through `model`, in eval mode and without gradients, and counts activations.

    The result does not depend on `batch_size` beyond the rounding of the model's own arithmetic. It holds the experts
    of every loss-bearing retain token: N * L * k bytes of memory (three times that at the end of the run).

    Args:
        model: a causal MoE language model; left in the mode it came in.
        forget: rows with input_ids and labels, as `load_tokens` gives them.
        retain: likewise.
        batch_size: documents a forward; documents of like length share one.
        pad_token_id: what fills up short documents.
        progress: whether to show a bar.

    Raises:
        UserError: a model that cannot be observed, a set without loss-bearing tokens, forget and retain the same.
    """
    _check_batch_size(batch_size)
    overlap = check_disjoint(forget, retain)
    was_training = model.training
    model.train(False)
    try:
        recorder = RoutingRecorder(model, store_routes=True)
        run = _Run(model, recorder, batch_size, pad_token_id, progress)
        forget_offsets = run.offsets("forget", forget)
        retain_offsets = run.offsets("retain", retain)
        forget_counts = run.count("forget", forget, forget_offsets, None)
        routes: list[npt.NDArray[np.uint16]] = []
        retain_counts = run.count("retain", retain, retain_offsets, routes)
    finally:
        model.train(was_training)
    num_experts = forget_counts.shape[1]
    return RoutingStatistics(
        forget_counts,
        retain_counts,
        int(forget_offsets[-1]),
        int(retain_offsets[-1]),
        routes[0].shape[2],
        torch.from_numpy(_narrow(routes[0], num_experts)),
        torch.from_numpy(retain_offsets),
        {
            "model": getattr(model.config, "_name_or_path", ""),
            "model_type": model.config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": [layer.name for layer in recorder.layers],
            "layer_indices": [layer.layer_index for layer in recorder.layers],
            "num_experts": num_experts,
            "forget_fingerprint": fingerprint(forget),
            "retain_fingerprint": fingerprint(retain),
            "forget_documents": len(forget),
            "retain_documents": len(retain),
            "rows_in_both": overlap,
            "versions": {
                "trace_kernels": trace_kernels.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
    )


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}, allowed is 1 or more")


@dataclass
class _Run:
    model: PreTrainedModel
    recorder: RoutingRecorder
    batch_size: int
    pad_token_id: int
    progress: bool

    def offsets(self, name: str, dataset: datasets.Dataset) -> npt.NDArray[np.int64]:
        """[D + 1]: where each document's loss-bearing tokens begin."""
        if len(dataset) == 0:
            raise UserError(f"{name}: the data set is empty")
        # Position t bears the loss of label t + 1; labels[0] has no position before it.
        sizes = [sum(label != IGNORE_INDEX for label in labels[1:]) for labels in dataset["labels"]]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if offsets[-1] == 0:
            raise UserError(f"{name}: no token bears loss: every label is {IGNORE_INDEX} or has no token before it")
        return offsets

    @torch.no_grad()
    def count(
        self,
        name: str,
        dataset: datasets.Dataset,
        offsets: npt.NDArray[np.int64],
        routes: list[npt.NDArray[np.uint16]] | None,
    ) -> torch.Tensor:
        """[L, E] counts; appends the routes [N, L, k] in the order of the data set to `routes`."""
        device = next(self.model.get_input_embeddings().parameters()).device
        # Only routing is wanted: no cache, and no logits beyond one position.
        accepted = inspect.signature(type(unwrap(self.model)).forward).parameters
        options = {key: v for key, v in (("use_cache", False), ("logits_to_keep", 1)) if key in accepted}
        lengths = [len(ids) for ids in dataset["input_ids"]]
        order = sorted(
            range(len(dataset)), key=lambda document: -lengths[document]
        )  # longest first: it needs most memory
        self.recorder.reset()
        stored: npt.NDArray[np.uint16] | None = None
        with (
            self.recorder,
            tqdm(total=sum(lengths), desc=f"profiling {name}", unit=" tokens", disable=not self.progress) as bar,
        ):
            for start in range(0, len(order), self.batch_size):
                documents = order[start : start + self.batch_size]
                batch = collate([dataset[document] for document in documents], self.pad_token_id)
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                self.recorder.mask_next(bearing)
                inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
                self.model(**inputs, **options)
                if routes is not None:
                    if stored is None:
                        stored = self._allocate(int(offsets[-1]))
                    self._store(stored, documents, offsets, bearing)
                bar.update(sum(lengths[document] for document in documents))
        if routes is not None and stored is not None:
            routes.append(stored)
        return self.recorder.counts.cpu()

    def _routes(self) -> torch.Tensor:
        routes = self.recorder.routes
        assert routes is not None  # the recorder has checked that every layer reported
        return routes

    def _allocate(self, num_tokens: int) -> npt.NDArray[np.uint16]:
        return np.empty((num_tokens, *self._routes().shape[2:]), dtype=np.uint16)

    def _store(
        self,
        stored: npt.NDArray[np.uint16],
        documents: list[int],
        offsets: npt.NDArray[np.int64],
        bearing: torch.Tensor,
    ) -> None:
        routes = self._routes()
        limits = torch.tensor([layer.num_experts for layer in self.recorder.layers], device=routes.device)[:, None]
        outside = (routes < 0) | (routes >= limits)
        chosen = routes.masked_fill(outside, np.iinfo(np.uint16).max)[bearing.to(routes.device)].cpu().numpy()
        begin = 0
        for document in documents:
            low, high = offsets[document], offsets[document + 1]
            stored[low:high] = chosen[begin : begin + high - low]
            begin += high - low


def _narrow(routes: npt.NDArray[np.uint16], num_experts: int) -> npt.NDArray[Any]:
    """As uint8 where that can tell all experts and, if there are any, the empty slots apart."""
    has_empty = bool((routes >= num_experts).any())
    if num_experts > 256 - has_empty:
        return routes
    return routes.astype(np.uint8)  # the uint16 maximum becomes the uint8 maximum


@dataclass
class ProfileOptions:
    """Counts which experts of a model the forget and the retain data activate.

    Args:
        model: a checkpoint folder or hub name of a Mixture-of-Experts language model.
        forget: the data to forget: a .jsonl, .json, .txt or .parquet file, or a hub name "owner/name[:config]".
        retain: the data whose behaviour must stay.
        output: the folder to write; must not exist.
        max_length: the most tokens of a document; longer texts are cut into windows.
        forget_limit: use only that many forget documents.
        retain_limit: use only that many retain documents.
        batch_size: documents a forward.
        dtype: of the model's weights: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
        device: such as "cuda", "cuda:1" or "cpu"; by default a GPU where there is one.
    """

    model: str
    forget: str
    retain: str
    output: str = "profile"
    max_length: int = 512
    forget_limit: int | None = None
    retain_limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str | None = None


def check(options: ProfileOptions) -> None:
    """UserError for what can be told from the options alone."""
    _check_batch_size(options.batch_size)
    check_placement(options.dtype, options.device)


def main(options: ProfileOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: loads, profiles, writes the folder `options.output`."""
    check(options)
    files.refuse_existing(options.output)
    say(f"profile: {options.model} on {options.forget} (forget) and {options.retain} (retain) -> {options.output}")
    tokenizer = load_tokenizer(options.model, check_inputs(options.model))
    forget = load_tokens(options.forget, tokenizer, max_length=options.max_length, limit=options.forget_limit)
    retain = load_tokens(options.retain, tokenizer, max_length=options.max_length, limit=options.retain_limit)
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    stats = profile_routing(model, forget, retain, batch_size=options.batch_size, pad_token_id=tokenizer.pad_token_id)
    stats.save(options.output)
    say(
        f"{stats.forget_tokens} forget and {stats.retain_tokens} retain tokens, {stats.forget_counts.shape[0]} MoE "
        f"layers of {stats.forget_counts.shape[1]} experts, {stats.top_k} a token; written to {options.output}"
    )
