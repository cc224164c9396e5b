"""Retain weights from the routing of the current forward, instead of the original model's."""

from __future__ import annotations

import contextlib

import torch

from trace_unlearn.calibration.averages import unit_means
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.routing.recorder import RoutingRecorder


class LiveWeights:
    """A context manager; inside it `weights()` gives the weights [B, S] of the model's last forward, float32.

    Position t's weight belongs to the loss of predicting the token at t + 1. They are constants: no gradient flows
    through them. A unit that needs the rest of the document costs no second forward: the scores of all positions are
    there when the forward ends, and the loss asks for the weights after that.
    """

    def __init__(self, model: torch.nn.Module, calibration: Calibration) -> None:
        self._calibration = calibration
        self._scores = RoutingRecorder(model, calibration.table)
        self._hits = RoutingRecorder(model, calibration.hit_table) if calibration.reduce == "mean" else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LiveWeights:
        for recorder in (self._scores, self._hits):
            if recorder is not None:
                self._stack.enter_context(recorder)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def weights(self, counted: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Of the last forward, whose tokens `counted` [B, S] bear loss, and `attended` [B, S] are no padding."""
        calibration = self._calibration

        def means(scores: torch.Tensor | None) -> torch.Tensor:
            assert scores is not None
            bearing, real = (mask.to(scores.device) != 0 for mask in (counted, attended))
            return unit_means(scores, calibration.unit, bearing, real, calibration.choices.get("attention_window"))

        hits = None if self._hits is None else means(self._hits.token_scores)
        return calibration.weight_from_score(means(self._scores.token_scores), hits).float()
