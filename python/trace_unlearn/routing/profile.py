"""Which experts the forget and the retain data activate in a model as it is."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from trace_unlearn import files
from trace_unlearn.checks import check_integers, check_word
from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import RoutingRecorder, unwrap
from trace_unlearn.routing.statistics import DEFAULT_UNIT, PROMPT_ROUTES, ROUTES, UNITS, Contexts, RoutingStatistics
from trace_unlearn.sources.data import check_disjoint, collate, fingerprint, loss_bearing
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.sources.model import input_device
from trace_unlearn.versions import versions

__all__ = ["RoutingStatistics", "profile_routing"]


def profile_routing(
    model: PreTrainedModel,
    forget: datasets.Dataset,
    retain: datasets.Dataset,
    *,
    batch_size: int = 8,
    pad_token_id: int,
    progress: bool = True,
    output: str | os.PathLike[str] | None = None,
    source: dict[str, Any] | None = None,
    overlap: int | None = None,
    unit: str = DEFAULT_UNIT,
) -> RoutingStatistics:
    """Runs both data sets once through `model`, in eval mode and without gradients, and counts activations.

    The result does not depend on `batch_size` beyond the rounding of the model's own arithmetic. It holds the experts
    of every loss-bearing retain token, N * L * k bytes (twice that from 256 experts on): in memory, or with `output` in
    a file, where memory stays bounded by a batch.

    Args:
        model: a causal MoE language model; left in the mode it came in.
        forget: rows with input_ids and labels, as `load_tokens` gives them.
        retain: likewise.
        batch_size: documents a forward; documents of like length share one.
        pad_token_id: what fills up short documents.
        progress: whether to show a bar.
        output: a folder to write, as `RoutingStatistics.save` does; it must not exist. The routes go into it as they
            come, and what is returned maps them from there.
        source: what goes into meta["source"]: where model and data came from, in the words of the verb's options.
        overlap: what `check_disjoint` gave, where it was asked already.
        unit: the unit of the weights that are to follow (see `trace_unlearn.calibration.calibrate`). "context" also
            records the routes of the prompts that losses read; the others need no more than each other.

    Raises:
        UserError: a model that cannot be observed, a set without loss-bearing tokens, forget and retain the same.
    """
    check_integers({"batch_size": batch_size}, batch_size=1)
    overlap = check_disjoint(forget, retain) if overlap is None else overlap
    check_word("unit", unit, UNITS)
    run = _Run(model, batch_size, pad_token_id, progress, contexts=unit == "context")
    if output is None:
        stats = _profile(model, forget, retain, overlap, run, None)
        stats.meta["source"] = source
        return stats
    with files.staged_folder(output) as staged:
        stats = _profile(model, forget, retain, overlap, run, staged)
        stats.meta["source"] = source
        stats.save_rest(staged)
        del stats  # with the map of the file in the hidden folder
    return RoutingStatistics.load(output)


def _profile(
    model: PreTrainedModel,
    forget: datasets.Dataset,
    retain: datasets.Dataset,
    overlap: int,
    run: _Run,
    folder: Path | None,
) -> RoutingStatistics:
    was_training = model.training
    model.train(False)
    try:
        forget_offsets = run.offsets("forget", forget)
        retain_offsets = run.offsets("retain", retain)
        forget_side, forget_contexts = run.count("forget", forget, forget_offsets)
        routes = run.room_for_routes(int(retain_offsets[-1]), folder and folder / ROUTES)
        stored = [_Stored(routes, retain_offsets)]
        if run.contexts:
            prompt_offsets, counted = _positions(retain)
            prompts = run.room_for_routes(int(prompt_offsets[-1]), folder and folder / PROMPT_ROUTES)
            stored.append(_Stored(prompts, prompt_offsets))
        retain_side, retain_contexts = run.count("retain", retain, retain_offsets, *stored)
    finally:
        model.train(was_training)
    layers = run.recorder.layers
    contexts = None
    if run.contexts:
        contexts = Contexts(
            counted,
            torch.from_numpy(prompts),
            forget_contexts.counts,
            retain_contexts.counts,
            run.window,
            forget_contexts.design_effect(),
            retain_contexts.design_effect(),
        )
    return RoutingStatistics(
        forget_side.counts,
        retain_side.counts,
        int(forget_offsets[-1]),
        int(retain_offsets[-1]),
        routes.shape[2],
        torch.from_numpy(routes),
        torch.from_numpy(retain_offsets),
        {
            "model": getattr(model.config, "_name_or_path", ""),
            "model_type": model.config.model_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": [layer.name for layer in layers],
            "layer_indices": [layer.layer_index for layer in layers],
            "num_experts": forget_side.counts.shape[1],
            "forget_fingerprint": fingerprint(forget),
            "retain_fingerprint": fingerprint(retain),
            "forget_documents": len(forget),
            "retain_documents": len(retain),
            "rows_in_both": overlap,
            "versions": versions(),
        },
        forget_side.design_effect(),
        retain_side.design_effect(),
        contexts,
    )


def _positions(dataset: datasets.Dataset) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
    """[D + 1], where each document's prompts begin among all of them; and [P] bool, as in `Contexts`."""
    counted, prompts = [], [0]
    for labels in dataset["labels"]:
        bearing = np.asarray(labels[1:]) != IGNORE_INDEX
        read = bearing[: int(bearing.nonzero()[0].max(initial=-1)) + 1]
        counted.append(read)
        prompts.append(len(read) - int(read.sum()))
    return np.cumsum(prompts), torch.from_numpy(np.concatenate(counted))


def attention_window(config: Any) -> int | None:
    """How many positions a token's attention reads at most, its own among them; None where some layer reads all.

    In a model whose layers differ, one that reads the whole document decides: through it every position reaches the
    loss. Linear attention and state-space layers read the whole document too.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if kinds == {"chunked_attention"}:
        raise UserError(
            f"unit: got 'context', but all layers of {config.model_type} attend within chunks; use 'document'"
        )
    window = getattr(config, "sliding_window", None)
    if kinds != {"sliding_attention"} or not getattr(config, "use_sliding_window", True):
        return None
    return window if isinstance(window, int) and window > 0 else None


class _Side:
    """What one data set activates: counts over all tokens, and how unlike its documents are."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.counts = torch.zeros((), dtype=torch.float64)  # [L, E] once something is added
        self._documents = 0
        # Over documents d with n_d tokens of which y_d activate an expert: sums of y_d^2, y_d n_d [L, E], and n_d^2.
        self._squares = torch.zeros((), dtype=torch.float64)
        self._products = torch.zeros((), dtype=torch.float64)
        self._sizes = 0.0

    def add(
        self, chosen: torch.Tensor, mask: torch.Tensor, num_experts: int, share: torch.Tensor | None = None
    ) -> None:
        """Takes in the routes [n, L, k] of the positions of `mask` [d, S], whole documents; -1 is no expert.

        A position counts 1, or what `share` [d, S] says.
        """
        L = chosen.shape[1]
        mask = mask.to(chosen.device)
        sizes = mask.sum(1) if share is None else share.sum(1).round().long()
        document = mask.nonzero()[:, 0]
        place = (document[:, None] * L + torch.arange(L, device=chosen.device))[:, :, None] * (num_experts + 1)
        place = place + torch.where(chosen < 0, num_experts, chosen)
        weight = None if share is None else share[mask].to(chosen.device)[:, None, None].expand_as(place).flatten()
        hits = torch.bincount(place.flatten(), weight, minlength=len(sizes) * L * (num_experts + 1))
        hits = hits.view(len(sizes), L, num_experts + 1)[:, :, :num_experts].double().cpu()
        self.counts = self.counts + hits.sum(0)
        length = sizes.double().cpu()
        self._squares = self._squares + (hits**2).sum(0)
        self._products = self._products + (hits * length[:, None, None]).sum(0)
        self._sizes += float((length**2).sum())
        self._documents += int((length > 0).sum())

    def design_effect(self) -> torch.Tensor:
        """[L, E] float32: the variance of the frequency when documents are drawn, over that when tokens are.

        It is the linearised variance of a ratio of document sums, sum (y_d - p n_d)^2 D / ((D - 1) N^2), over
        p (1 - p) / N. At least 1; 1 where the frequency is 0 or 1, and infinite for a single document, which says
        nothing about how documents differ.
        """
        p = self.counts.double() / self.tokens
        if self._documents < 2:
            return torch.full(p.shape, torch.inf, dtype=torch.float32)
        spread = self._squares - 2 * p * self._products + p**2 * self._sizes
        among = spread * self._documents / ((self._documents - 1) * self.tokens)
        effect = among / (p * (1 - p)).clamp(min=1e-300)
        return torch.where((p > 0) & (p < 1), effect, 1.0).clamp(min=1).float()


class _Run:
    """One model over both data sets."""

    def __init__(
        self, model: PreTrainedModel, batch_size: int, pad_token_id: int, progress: bool, contexts: bool = False
    ) -> None:
        self.model = model
        self.contexts = contexts
        self.window = attention_window(model.config) if contexts else None
        self.recorder = RoutingRecorder(model, store_routes=True)
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.progress = progress
        self.num_experts = max(layer.num_experts for layer in self.recorder.layers)
        self.top_k = 0

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

    def room_for_routes(self, tokens: int, path: Path | None) -> npt.NDArray[Any]:
        """[N, L, k]; the largest number of the dtype is a slot without a routed expert."""
        shape = (tokens, len(self.recorder.layers), self.top_k)
        dtype = np.uint8 if self.num_experts <= 255 else np.uint16
        if path is None:
            return np.empty(shape, dtype)
        try:
            room: npt.NDArray[Any] = np.lib.format.open_memmap(path, "w+", dtype, shape)
            # Now, and not as a signal when a page is written to a full disk.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error
        return room

    @torch.no_grad()
    def count(
        self, name: str, dataset: datasets.Dataset, offsets: npt.NDArray[np.int64], *stored: _Stored
    ) -> tuple[_Side, _Side]:
        """Counts, of tokens and of contexts; writes the routes in the order of the data set to `stored`."""
        device = input_device(self.model)
        # Only routing is wanted: no cache, and no logits beyond one position.
        accepted = inspect.signature(type(unwrap(self.model)).forward).parameters
        options = {key: v for key, v in (("use_cache", False), ("logits_to_keep", 1)) if key in accepted}
        lengths = [len(ids) for ids in dataset["input_ids"]]
        order = sorted(
            range(len(dataset)), key=lambda document: -lengths[document]
        )  # longest first: it needs most memory
        side, contexts = _Side(int(offsets[-1])), _Side(int(offsets[-1]))
        self.recorder.reset()
        with (
            self.recorder,
            tqdm(
                total=sum(lengths), desc=f"profiling {name}", unit=" tokens", disable=None if self.progress else True
            ) as bar,
        ):
            for start in range(0, len(order), self.batch_size):
                documents = order[start : start + self.batch_size]
                batch = collate([dataset[document] for document in documents], self.pad_token_id)
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                self.recorder.mask_next(bearing)
                inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
                self.model(**inputs, **options)
                chosen = self._chosen(bearing)
                side.add(chosen, bearing, self.num_experts)
                parts = [chosen]
                if self.contexts:
                    read = bearing.flip(1).cummax(1).values.flip(1)
                    contexts.add(self._chosen(read), read, self.num_experts, context_share(bearing, self.window))
                    parts.append(self._chosen(read & ~bearing))
                for room, part in zip(stored, parts, strict=False):
                    room.write(part.cpu().numpy(), documents)
                bar.update(sum(lengths[document] for document in documents))
        side.counts = self.recorder.counts.cpu()
        return side, contexts

    def _chosen(self, bearing: torch.Tensor) -> torch.Tensor:
        """[n, L, k] int64: the experts of the loss-bearing tokens of the last forward, -1 for none."""
        routes = self.recorder.routes
        assert routes is not None  # the recorder has checked that every layer reported
        self.top_k = routes.shape[3]
        limits = torch.tensor([layer.num_experts for layer in self.recorder.layers], device=routes.device)[:, None]
        return routes.masked_fill(routes >= limits, -1)[bearing.to(routes.device)]


def context_share(bearing: torch.Tensor, window: int | None) -> torch.Tensor:
    """[B, S] float64: how much each position is of the contexts' means, added up over the contexts that hold it.

    Documents begin at position 0: padding is on the right.
    """
    B, S = bearing.shape
    length = torch.arange(1, S + 1, device=bearing.device).clamp(min=1, max=window)
    share = bearing / length.double()
    ended = torch.zeros(B, S + 1, dtype=torch.float64, device=bearing.device)
    if window is not None and window < S:
        ended[:, : S - window] = share[:, window:]
    return (share - ended[:, :S]).flip(1).cumsum(1).flip(1)


@dataclass(frozen=True)
class _Stored:
    """Room for the routes of all documents, in the order of the data set."""

    room: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    def write(self, chosen: npt.NDArray[np.int64], documents: list[int]) -> None:
        chosen = chosen.astype(self.room.dtype)  # -1 becomes the largest number
        begin = 0
        for document in documents:
            low, high = self.offsets[document], self.offsets[document + 1]
            self.room[low:high] = chosen[begin : begin + high - low]
            begin += high - low
