"""The fused loss in other people's code: `fuse_loss` makes any Hugging Face causal LM compute its loss without logits.

How: a forward with labels runs as the forward of a view of the model: an object that shares all the model's attributes
and differs in two. Its output embedding returns `PendingLogits` (its input and a pointer to itself) in place of the
[T, V] logits. What the model does to logits before its loss (a scale, a soft cap, a cast) is written down there instead
of computed. Its `loss_function` then calls the model's output embedding once, and in there hands hidden states, weight
and what was written down to one `trace_kernels.linear_cross_entropy` call. The model's class, its head, parameters and
state dict stay as they are, and whichever head the model has at the time of a forward is the one that is used.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.forwards import Layer, attach, detach, layer_of, wrapped_by_another
from trace_unlearn.fusion.head import check_weight, linear_of
from trace_unlearn.fusion.pending import PendingHead, PendingLogits

__all__ = ["FusedLoss", "PendingLogits", "fuse_loss", "fused_loss_of"]


def fuse_loss(model: torch.nn.Module) -> FusedLoss:
    """Lets a causal LM compute `.loss` without its logits; returns the handle that undoes it.

    With labels, `model(...)` gives the same loss and gradients as before (in float32 up to rounding; from
    half-precision weights better, because the logits are never rounded) and ``logits=None``: they are never computed.
    Without labels, and in `generate`, nothing changes. `num_items_in_batch`, `shift_labels`, `logits_to_keep`, a bias
    of the output embedding, scaled and soft-capped logits and the router's auxiliary loss keep their meaning. One
    difference: a batch without any label to predict has loss 0, not NaN.

    The model's class, head and state dict stay as they are. Copies and pickles of the model are fused as well, each on
    its own; the head of a forward is the one that the model has then; docs/only_the_loss.md says what survives what. A
    forward hook on the head sees the loss where it saw logits, and one that changes it is refused.

    Args:
        model: a transformers causal LM, or a peft model around one.

    Returns:
        The handle: `handle()` restores the model exactly; `handle.log_probs()` is a context in which `.loss` is the
        log-probability of every next token, `handle.paused()` one in which the model is as it was.

    Raises:
        UserError: the model is fused already, its output embedding is not a plain linear layer (an adapter on it, a
            quantised one), or its loss is not next-token cross-entropy; the message says which. A model that does
            anything else to its logits raises on its first forward with labels, as does one whose head was replaced by
            another kind of layer.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2))
        >>> ids = torch.arange(12).view(2, 6)
        >>> plain = model(input_ids=ids, labels=ids).loss
        >>> undo = fuse_loss(model)
        >>> fused = model(input_ids=ids, labels=ids)
        >>> fused.logits is None, torch.allclose(fused.loss, plain)
        (True, True)
        >>> undo()
        >>> model(input_ids=ids, labels=ids).logits.shape
        torch.Size([2, 6, 50])
    """
    causal_lm = _causal_lm(model)
    name = type(causal_lm).__name__
    embedding = causal_lm.get_output_embeddings()  # type: ignore[no-untyped-call]
    check_weight(linear_of(embedding, name).weight, name)
    path = next((path for path, module in causal_lm.named_modules() if module is embedding), None)
    if path is None:
        raise UserError(f"fuse_loss: the output embedding of {name} is no part of it")
    layer = _Fused(path.split("."), _position_of_labels(causal_lm))
    attach(causal_lm, layer)
    return FusedLoss(causal_lm, layer)


def fused_loss_of(model: torch.nn.Module) -> FusedLoss | None:
    """The handle of a model that `fuse_loss` changed before, or of a copy of one; otherwise None."""
    causal_lm = _base_model(model)
    layer = layer_of(causal_lm, _Fused)
    return None if layer is None else FusedLoss(causal_lm, layer)


class FusedLoss:
    """What `fuse_loss` returns. Calling it restores the model.

    The contexts hold for the forwards that their thread starts, replicas of `nn.DataParallel` included.
    """

    def __init__(self, model: PreTrainedModel, layer: _Fused) -> None:
        self._model, self._layer = model, layer

    def __call__(self) -> None:
        if layer_of(self._model, _Fused) is not self._layer:
            raise RuntimeError("this fused loss has been undone already")
        detach(self._model, self._layer)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model computes its loss from logits and returns them, as before `fuse_loss`.

        For evaluation code that passes labels and reads the logits.
        """
        before, self._layer.now.paused = self._layer.now.paused, True
        try:
            yield
        finally:
            self._layer.now.paused = before

    @contextlib.contextmanager
    def per_token(self, function: Callable[..., Any]) -> Iterator[None]:
        """Inside, a forward with labels returns as `.loss` what `function` returns.

        It is called as `function(hidden, weight, target, bias=, ignore_index=, softcap=, logit_scale=)`: hidden
        [B, S, H] is what the output embedding received, target [B, S] the next tokens, and the rest is what
        `trace_kernels.linear_log_prob` takes. The model is called as always, so that wrappers such as DDP and FSDP take
        part; what it returns is a tensor or a tuple of tensors. A router's auxiliary loss must be off: it would be
        added to every position.
        """
        before, self._layer.now.per_token = self._layer.now.per_token, function
        try:
            yield
        finally:
            self._layer.now.per_token = before

    @contextlib.contextmanager
    def log_probs(self) -> Iterator[None]:
        """Inside, a forward with labels [B, S] returns as `.loss` the log-probabilities [B, S], float32.

        Position t holds log p(labels[t + 1] | tokens up to t), or 0 where that label is ignored and at the last
        position. See `per_token`.
        """
        with self.per_token(_log_prob):
            yield


def _log_prob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    # Cloned, since FSDP warns of a module that returns a view.
    return tk.linear_log_prob(hidden, weight, target, **options).clone()


class _Now(threading.local):
    """What the contexts of a thread ask for. The attributes exist in every thread, so that compilers guard them."""

    def __init__(self) -> None:
        self.paused: bool = False  # a forward with labels is left as it was
        self.per_token: Callable[..., Any] | None = None  # what such a forward computes in place of the loss


class _Fixed:
    """The same for a replica, which runs in another thread than the one that asked."""

    def __init__(self, paused: bool, per_token: Callable[..., Any] | None) -> None:
        self.paused, self.per_token = paused, per_token


class _Fused(Layer):
    """A causal LM's forward that computes no logits where it is given labels.

    Args:
        path: where the output embedding is.
        position: of the labels among the positional arguments.
    """

    replaces = True

    def __init__(self, path: list[str], position: int, now: _Now | _Fixed | None = None) -> None:
        self.path, self.position = path, position
        self.now: _Now | _Fixed = _Now() if now is None else now
        self._view: Any = None
        self._parts: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Fused, (self.path, self.position)

    def copied(self) -> _Fused:
        return _Fused(self.path, self.position)

    def replica(self) -> _Fused:
        return _Fused(self.path, self.position, _Fixed(self.now.paused, self.now.per_token))

    def bind(self, module: torch.nn.Module) -> None:
        if len(self.path) == 1:
            self._view = self._view_of(module, self.path)

    def run(self, module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        labels = args[self.position] if len(args) > self.position else kwargs.get("labels")
        if labels is None or self.now.paused:
            return inner(*args, **kwargs)
        if module.loss_function is not ForCausalLMLoss:
            name = type(module).__name__
            raise UserError(f"loss_function: the loss of {name} is fused; undo fuse_loss before you set another")
        if self._view is None or (self._parts and any(p._modules[name] is not child for p, name, child in self._parts)):
            self._parts = []
            self._view = self._view_of(module, self.path)  # of a head inside a module that was replaced
        view = self._view
        return _without_pending(type(view).forward(view, *args, **kwargs))

    def _view_of(self, module: torch.nn.Module, path: list[str]) -> Any:
        """An object that shares the attributes of `module`, but for its output embedding and loss function."""
        name, *rest = path
        members: dict[str, Any] = {"__doc__": type(module).__doc__, "__module__": type(module).__module__}
        if rest:
            child = module._modules[name]
            assert child is not None
            inner = self._view_of(child, rest)
            self._parts.append((module, name, child))
            members[name] = property(lambda view: inner)
        else:
            members[name] = property(functools.partial(_pending_head, name, type(module).__name__))
        if isinstance(module, PreTrainedModel):
            members["loss_function"] = property(self._loss_function)
        view: Any = object.__new__(type(type(module).__name__, (type(module),), members))
        object.__setattr__(view, "__dict__", module.__dict__)
        return view

    def _loss_function(self, view: Any) -> Callable[..., torch.Tensor]:
        name, now = type(view).__name__, self.now

        def fused(
            logits: PendingLogits,
            labels: torch.Tensor | None,
            vocab_size: int,
            num_items_in_batch: torch.Tensor | float | None = None,
            ignore_index: int = -100,
            shift_labels: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            if not isinstance(logits, PendingLogits):
                raise UserError(f"fuse_loss: {name} computes its logits without calling its output embedding")
            return logits.next_token_loss(labels, shift_labels, ignore_index, num_items_in_batch, now.per_token)

        return fused


def _pending_head(name: str, model: str, view: Any) -> PendingHead:
    head = view._modules[name]
    linear = head if type(head) is torch.nn.Linear else linear_of(head, model)
    return PendingHead(head, model, linear.out_features)


def _without_pending(output: Any) -> Any:
    if isinstance(output, ModelOutput):
        kept = {name: value for name, value in output.items() if not isinstance(value, PendingLogits)}
        return type(output)(**kept)
    return tuple(None if isinstance(value, PendingLogits) else value for value in output)


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    causal_lm = _base_model(model)
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise UserError(f"fuse_loss: model is a {name}, allowed is a transformers model or a peft model around one")
    if layer_of(causal_lm, _Fused) is not None:
        raise UserError(f"fuse_loss: this {name} is fused already")
    if _position_of_labels(causal_lm) < 0 or causal_lm.loss_function is not ForCausalLMLoss:
        raise UserError(f"fuse_loss: {name} does not compute a next-token loss from labels; allowed are causal LMs")
    if wrapped_by_another(causal_lm):
        raise UserError(
            f"fuse_loss: the forward of this {name} is replaced by another tool; fuse first, wrap then (after "
            "accelerate's mixed precision: accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes that off)"
        )
    return causal_lm


def _position_of_labels(model: PreTrainedModel) -> int:
    names = list(inspect.signature(type(model).forward).parameters)
    return names.index("labels") - 1 if "labels" in names else -1
