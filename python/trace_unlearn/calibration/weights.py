"""Token weights: what `calibrate` found, and how it reaches the retain data."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch

import trace_kernels as tk
from trace_unlearn import files
from trace_unlearn.calibration.averages import of_contexts
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import fingerprint
from trace_unlearn.sources.encoding import IGNORE_INDEX

TENSORS, META = "calibration.safetensors", "calibration.json"
_FORMAT = 3
_QUANTILES = {"1 %": 0.01, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
_TENSOR_FIELDS = (
    "table",
    "hit_table",
    "selected",
    "f",
    "r",
    "f_interval",
    "r_interval",
    "weighted_r",
    "token_weight",
    "retain_offsets",
    "hits",
    "counted",
)


@dataclass(frozen=True)
class Calibration:
    r"""Token weights of the retain set and the lookup that gives them.

    .. math:: w_t = \min(\text{scale} \cdot \phi(\text{reduce}_{l,j}\ \text{table}[l, \text{index}_{ltj}]), \text{clip})

    where `reduce` runs over the layers and the k slots of token t: "sum" over all, or "mean" over those that hit a
    selected expert (and then phi of a token without hits is 1). With phi "linear" the scale is an addend and no weight
    is negative: w_t = min(max(scale + reduce table, 0), clip). For the units "context" and "document" every sum, and
    the number of hits where `reduce` divides by it, is the mean over the positions of the unit.

    Attributes:
        rule: "balance", "additive", "product", "ratio" or "uniform".
        unit: "token", "context" or "document": whose routing a weight looks at, see `calibrate`.
        phi: "exp", "identity" or "linear".
        reduce: "sum" or "mean".
        table: [L, E] float32, 0 outside the selected pairs.
        hit_table: [L, E] float32, 1 at the selected pairs, else 0: its token score is the number of hits.
        clip: the largest weight.
        scale: makes the mean weight over all retain tokens 1.
        selected: [M, 2] int64, the forget-critical pairs (MoE layer, expert).
        f: [M] float64, their frequency among forget tokens; of unit "context" the mean over their contexts, r likewise.
        r: [M] float64, among retain tokens.
        f_interval, r_interval: [M, 2] float64, the 95 % intervals of f and r, with each document's tokens as one
            cluster when choices["intervals_by_document"] is true, else with independent tokens.
        weighted_r: [M] float64, among retain tokens, weighted.
        token_weight: [N] float32, mean 1, in the order of the retain set.
        retain_offsets: [D + 1] int64, where each document's tokens begin.
        hits: [N, ceil(M / 8)] uint8, which pairs a token hits, as numpy.packbits packs them; of unit "context":
            [P, ceil(M / 8)], of all positions that a counted token's loss reads.
        counted: [P] bool, which of these are counted tokens; None where all are.
        ess: effective sample size as a share of the tokens, (sum w)^2 / (N sum w^2).
        unit_ess: likewise of the units, each counted once: of documents, or of tokens again.
        max_error: the largest abs(weighted_r - f).
        mean_error: the mean of them.
        largest_weight: the largest weight.
        retain_fingerprint: of the retain set that the weights belong to.
        choices: the settings and what followed from them, for the record.
        notes: warnings, for people.
        shuffle_seed: set when the weights were shuffled over the units (the control).
    """

    rule: str
    unit: str
    phi: str
    reduce: str
    table: torch.Tensor
    hit_table: torch.Tensor
    clip: float
    scale: float
    selected: torch.Tensor
    f: torch.Tensor
    r: torch.Tensor
    f_interval: torch.Tensor
    r_interval: torch.Tensor
    weighted_r: torch.Tensor
    token_weight: torch.Tensor
    retain_offsets: torch.Tensor
    hits: torch.Tensor
    ess: float
    unit_ess: float
    max_error: float
    mean_error: float
    largest_weight: float
    retain_fingerprint: str
    choices: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shuffle_seed: int | None = None
    counted: torch.Tensor | None = None

    def weight_from_score(self, score: torch.Tensor, hits: torch.Tensor | None = None) -> torch.Tensor:
        """The weights of tokens from their scores: the same function for stored and for live routing.

        Args:
            score: any shape, float; the sum of `table` over a token's experts (`RoutingRecorder(model, table)`); or the
                mean of these sums over the unit's positions, see `trace_unlearn.calibration.averages.unit_means`.
            hits: likewise the sum of `hit_table`; needed when `reduce` is "mean" only.

        Returns:
            The weights in the shape, dtype and device of `score`.

        Raises:
            UserError: for shuffled weights, which belong to tokens and not to routing; or without the hits it needs.
        """
        if self.shuffle_seed is not None:
            raise UserError("weighting: shuffled weights (the control) are no function of the routing; use 'reference'")
        if self.reduce == "mean" and hits is None:
            raise UserError(f"hits: got None; the rule {self.rule!r} averages over the hits and needs their number")
        return lookup(score, hits, self.phi, self.reduce, self.scale, self.clip)

    def weights_of(self, document: int) -> torch.Tensor:
        """[n] float32: the weights of the loss-bearing tokens of one retain document."""
        count = len(self.retain_offsets) - 1
        if not 0 <= document < count:
            raise IndexError(f"document: got {document}, the retain set has {count}")
        return self.token_weight[int(self.retain_offsets[document]) : int(self.retain_offsets[document + 1])]

    def shuffled(self, seed: int) -> Calibration:
        """The control: the same weights, each given to a random unit, so that they say nothing about routing.

        Where documents differ in length, the mean over tokens that the exchange changes is brought back to 1, by one
        factor for all weights; the largest may then exceed `clip`.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.unit == "document":
            sizes = self.retain_offsets.diff()
            sizes = sizes[sizes > 0]
            weights = of_units(self.token_weight, self.unit, self.retain_offsets)[
                torch.randperm(len(sizes), generator=generator)
            ].double()
            weights = (weights * (sizes.sum() / (weights * sizes).sum())).float()
            weights = torch.repeat_interleave(weights, sizes)
        else:
            weights = self.token_weight[torch.randperm(len(self.token_weight), generator=generator)]
        made = Made(self.unit, self.hits, self.retain_offsets, self.counted, self.choices.get("attention_window"))
        outcome = matching(weights, self.f, made)
        return replace(self, token_weight=weights, shuffle_seed=seed, **outcome)

    def facts(self) -> dict[str, Any]:
        """For records: the rule, the unit, the effective sample sizes, and the choices."""
        own = {"rule": self.rule, "unit": self.unit, "ess": self.ess, "unit_ess": self.unit_ess}
        return {**own, **self.choices}

    def quantiles(self) -> dict[str, float]:
        """Of the weights, from the lowest percent to the highest thousandth."""
        ranked = self.token_weight.sort().values
        return {name: float(ranked[int(share * (len(ranked) - 1))]) for name, share in _QUANTILES.items()}

    def summary(self) -> str:
        """For people: a row per selected expert, the errors before and after, and what to know about the weights."""
        lines = ["layer  expert  forget f  [95 % interval]   retain r  [95 % interval]   weighted r     error"]
        names = self.choices.get("layer_indices")
        columns = (self.selected, self.f, self.f_interval, self.r, self.r_interval, self.weighted_r)
        for (layer, expert), f, f_span, r, r_span, weighted in zip(*(c.tolist() for c in columns), strict=True):
            shown = names[layer] if names else layer
            lines.append(
                f"{shown:5d}  {expert:6d}  {f:8.4f}  {_span(f_span)}  {r:8.4f}  {_span(r_span)}  {weighted:10.4f}  "
                f"{weighted - f:+8.4f}"
            )
        rule = self.rule if self.shuffle_seed is None else f"{self.rule}, shuffled (the control)"
        if len(self.f):
            before = (self.r - self.f).abs()
            lines.append(f"error with uniform weights: max {before.max():.4f}, mean {before.mean():.4f}")
            lines.append(f"error with {rule}: max {self.max_error:.4f}, mean {self.mean_error:.4f}")
        documents = int((self.retain_offsets.diff() > 0).sum())
        of_documents = f" and {self.unit_ess:.3f} of {documents} documents" if self.unit == "document" else ""
        lines.append(
            f"unit {self.unit}: effective sample size {self.ess:.3f} of {len(self.token_weight)} tokens{of_documents}, "
            f"largest weight {self.largest_weight:.2f} (mean 1)"
        )
        lines.append("weights: " + ", ".join(f"{name} {value:.3f}" for name, value in self.quantiles().items()))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the folder in one step: it is there and whole, or not there."""
        with files.staged_folder(folder) as staged:
            tensors = {name: value for name in _TENSOR_FIELDS if (value := getattr(self, name)) is not None}
            files.save_tensors(staged / TENSORS, tensors)
            plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSOR_FIELDS}
            files.write_json(staged / META, {"format": _FORMAT, **plain})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Reads what `save` wrote; UserError for anything else."""
        files.check_made_by("calibrate", folder, META)
        plain = files.read_json(Path(folder) / META)
        made_with = plain.pop("format", None) if isinstance(plain, dict) else None
        if made_with is None:
            raise UserError(f"{Path(folder) / META}: not a calibration")
        if made_with != _FORMAT:
            raise UserError(
                f"{folder}: made by another version of trace-unlearn (format {made_with}, this one reads {_FORMAT}); "
                "run `trace-unlearn calibrate` again, with another output"
            )
        tensors: dict[str, Any] = files.load_tensors(Path(folder) / TENSORS)
        try:
            found = cls(**tensors, **plain)
            N, M = len(found.token_weight), len(found.selected)
            whole = (
                int(found.retain_offsets[-1]) == N
                and found.hits.shape == (N if found.counted is None else len(found.counted), math.ceil(M / 8))
                and (found.counted is None or int(found.counted.sum()) == N)
                and found.table.shape == found.hit_table.shape
                and len(found.f) == len(found.r) == len(found.weighted_r) == M
                and found.f_interval.shape == found.r_interval.shape == (M, 2)
                and math.isclose(float(found.token_weight.max()), found.largest_weight, rel_tol=1e-6)
            )
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{folder}: not a calibration: {error}") from error
        if not whole:
            raise UserError(f"{folder}: {TENSORS} and {META} do not belong together; calibrate again")
        return found


def _span(interval: list[float]) -> str:
    return f"[{interval[0]:.4f}, {interval[1]:.4f}]"


def lookup(
    score: torch.Tensor, hits: torch.Tensor | None, phi: str, reduce: str, scale: float, clip: float
) -> torch.Tensor:
    """The weight of a score; see `Calibration`."""
    if phi == "linear":
        return (score + scale).clamp(0, clip)
    if reduce == "mean":
        assert hits is not None
        score = torch.where(hits > 0, score / hits.where(hits > 0, 1.0), torch.ones_like(score))
    # The scale joins the exponent: their product may be finite where exp alone is not.
    raw = torch.exp(score + math.log(scale)) if phi == "exp" else score * scale
    return raw.clamp(max=clip)


def of_units(token_weight: torch.Tensor, unit: str, offsets: torch.Tensor) -> torch.Tensor:
    """The weight of each unit: of each document with counted tokens, or of each token."""
    if unit != "document":
        return token_weight
    return token_weight[offsets[:-1][offsets.diff() > 0]]


class Made(NamedTuple):
    """What a calibration's frequencies are made from: see `Calibration` for the fields."""

    unit: str
    hits: torch.Tensor
    offsets: torch.Tensor
    counted: torch.Tensor | None = None
    window: int | None = None


def matching(weights: torch.Tensor, f: torch.Tensor, made: Made) -> dict[str, Any]:
    """What follows from weights: weighted_r, the errors, ESS, largest weight."""
    w = weights.double()
    if made.unit == "context":
        assert made.counted is not None
        weighted = of_contexts(made.hits, made.counted, made.offsets, made.window, len(f)).frequencies(w) / float(
            w.mean()
        )
    else:
        weighted = tk.hit_moments(made.hits, w, len(f)) / float(w.sum())
    error = (weighted - f).abs()
    return {
        "weighted_r": weighted,
        "max_error": float(error.max()) if len(f) else 0.0,
        "mean_error": float(error.mean()) if len(f) else 0.0,
        "ess": _ess(w),
        "unit_ess": _ess(of_units(w, made.unit, made.offsets)),
        "largest_weight": float(w.max()),
    }


def _ess(weights: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2)."""
    return float(weights.sum()) ** 2 / (len(weights) * float((weights**2).sum()))


def attach_weights(dataset: datasets.Dataset, calibration: Calibration) -> datasets.Dataset:
    """The retain set with a column ``token_weight``: one float a position, 0 where position t bears no loss.

    The weight at position t multiplies the loss of predicting the token at t + 1.

    Raises:
        UserError: the calibration was made for other data.
    """
    if fingerprint(dataset) != calibration.retain_fingerprint:
        raise UserError(
            "retain: the data is not what the calibration was made for (another file, tokenizer, max_length or limit); "
            "profile and calibrate again with this data"
        )
    weights = calibration.token_weight.numpy()
    rows: list[np.ndarray[Any, np.dtype[np.float32]]] = []
    for document, labels in enumerate(dataset["labels"]):
        row = np.zeros(len(labels), dtype=np.float32)
        low, high = calibration.retain_offsets[document : document + 2].tolist()
        # Position t bears the loss of label t + 1.
        row[:-1][np.asarray(labels[1:]) != IGNORE_INDEX] = weights[low:high]
        rows.append(row)
    if "token_weight" in dataset.column_names:
        dataset = dataset.remove_columns("token_weight")
    return dataset.add_column("token_weight", pa.array(rows, type=pa.list_(pa.float32())))
