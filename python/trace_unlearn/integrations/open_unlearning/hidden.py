"""Models that answer with a function of their hidden states, whichever transformers they come from.

`fuse_loss` needs the loss function that models have from transformers 4.46 on. For an older one the two functions here
do what the trainers need of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from trace_unlearn.errors import UserError
from trace_unlearn.sources.encoding import IGNORE_INDEX

if TYPE_CHECKING or importlib.util.find_spec("transformers.loss"):
    from trace_unlearn.fusion.loss import fuse_loss, fused_loss_of
else:

    def fuse_loss(model: Any) -> HiddenStates:
        """A model that computes what `per_token` is given where it is called with labels, and its loss otherwise."""
        head = model.get_output_embeddings()
        if type(head).forward is not torch.nn.Linear.forward:
            raise UserError(f"open-unlearning: the output embedding is a {type(head).__name__}, allowed is a Linear")
        scaled = [name for name in _SCALES if getattr(model.config, name, None) not in (None, 1, 1.0)]
        if scaled:
            raise UserError(f"open-unlearning: a model with {scaled[0]} needs transformers 4.46 or newer")
        members = {"forward": _asked(type(model).forward), "__module__": type(model).__module__}
        model.__class__ = type(type(model).__name__, (type(model),), members)
        model.__dict__[_STATE] = None
        return HiddenStates(model)

    def fused_loss_of(model: Any) -> HiddenStates | None:
        return HiddenStates(model) if _STATE in model.__dict__ else None


__all__ = ["fuse_loss", "fused_loss_of"]

_STATE = "_trace_asked"
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class HiddenStates:
    """As `trace_unlearn.fusion.loss.FusedLoss`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @contextlib.contextmanager
    def per_token(self, function: Callable[..., Any]) -> Iterator[None]:
        before, self._model.__dict__[_STATE] = self._model.__dict__[_STATE], function
        try:
            yield
        finally:
            self._model.__dict__[_STATE] = before

    def paused(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _asked(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def asked(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        function = self.__dict__[_STATE]
        if labels is None or function is None:
            return forward(self, *args, labels=labels, **kwargs)
        head = self.get_output_embeddings()
        target = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
        found = []

        def compute(hidden: torch.Tensor) -> torch.Tensor:
            options = {"bias": head.bias, "ignore_index": IGNORE_INDEX, "softcap": None, "logit_scale": 1.0}
            found.append(function(hidden, head.weight, target, **options))
            return hidden[..., :1]

        head.forward = compute
        try:
            output = forward(self, *args, **kwargs)
        finally:
            del head.forward
        return type(output)(loss=found[0], **{name: value for name, value in output.items() if name != "logits"})

    return asked
