"""Retain weights from the routing of the current forward, instead of the original model's."""

from __future__ import annotations

import contextlib

import torch

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.routing.recorder import RoutingRecorder


class LiveWeights:
    """A context manager; inside it `weights()` gives the weights [B, S] of the model's last forward, float32.

    Position t's weight belongs to the loss of predicting the token at t + 1. They are constants: no gradient flows
    through them.
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

    def weights(self) -> torch.Tensor:
        scores = self._scores.token_scores
        assert scores is not None
        hits = None if self._hits is None else self._hits.token_scores
        return self._calibration.weight_from_score(scores, hits).float()
