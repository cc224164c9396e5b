"""The fused loss in other people's code: `fuse_loss` makes any Hugging Face causal LM compute its loss without logits.

How: the model and its output embedding get, per instance, a subclass that changes two things. While a forward with
labels runs, the output embedding returns `PendingLogits` (its input and a pointer to itself) in place of the [T, V]
logits. What the model does to logits before its loss (a scale, a soft cap, a cast) is written down there instead of
computed. The model's `loss_function` then hands hidden states, weight and what was written down to one
`trace_kernels.linear_cross_entropy` call. Parameters, their names and the state dict stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils.generic import ModelOutput

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.fusion.routers import FusedRouters, fuse_routers

__all__ = ["FusedLoss", "FusedRouters", "PendingLogits", "fuse_loss", "fuse_routers", "fused_loss_of"]

_STATE = "_trace_fused_loss"


def fuse_loss(model: torch.nn.Module) -> FusedLoss:
    """Lets a causal LM compute `.loss` without its logits; returns the handle that undoes it.

    With labels, `model(...)` gives the same loss and gradients as before (in float32 up to rounding; from
    half-precision weights better, because the logits are never rounded) and ``logits=None``: they are never computed.
    Without labels, and in `generate`, nothing changes. `num_items_in_batch`, `shift_labels`, `logits_to_keep`, a bias
    of the output embedding, scaled and soft-capped logits and the router's auxiliary loss keep their meaning. One
    difference: a batch without any label to predict has loss 0, not NaN. Forward hooks on the output embedding see the
    loss where they saw logits: a hook that changes the logits cannot be fused.

    Args:
        model: a transformers causal LM, or a peft model around one.

    Returns:
        The handle: `handle()` restores the model exactly; `handle.log_probs()` is a context in which `.loss` is the
        log-probability of every next token, `handle.paused()` one in which the model is as it was.

    Raises:
        UserError: the model is fused already, its output embedding is not a plain linear layer (an adapter on it, a
            quantised one), or its loss is not next-token cross-entropy; the message says which. A model that does
            anything else to its logits raises on its first forward with labels.

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
    head = _output_embedding(causal_lm)
    state = _State()
    _become(head, _pending_head(type(head)), state)
    _become(causal_lm, _pending_model(type(causal_lm)), state)
    return FusedLoss(causal_lm, head, state)


def fused_loss_of(model: torch.nn.Module) -> FusedLoss | None:
    """The handle of a model that `fuse_loss` changed before, or None."""
    causal_lm = _base_model(model)
    state = causal_lm.__dict__.get(_STATE)
    return None if state is None else FusedLoss(causal_lm, causal_lm.get_output_embeddings(), state)


class FusedLoss:
    """What `fuse_loss` returns. Calling it restores the model."""

    def __init__(self, model: PreTrainedModel, head: torch.nn.Linear, state: _State) -> None:
        self._model, self._head, self._state = model, head, state

    def __call__(self) -> None:
        for module in (self._model, self._head):
            if module.__dict__.get(_STATE) is not self._state:
                raise RuntimeError("this fused loss has been undone already")
            if not issubclass(type(module), _Fused) or type(module).__bases__[0] is not _Fused:
                raise RuntimeError(f"{type(module).__name__} was wrapped after fuse_loss: undo that first")
        for module in (self._model, self._head):
            module.__class__ = type(module).__bases__[1]
            del module.__dict__[_STATE]
            _point_hooks_to_the_class(module)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model computes its loss from logits and returns them, as before `fuse_loss`.

        For evaluation code that passes labels and reads the logits.
        """
        before, self._state.paused = self._state.paused, True
        try:
            yield
        finally:
            self._state.paused = before

    @contextlib.contextmanager
    def per_token(self, function: Callable[..., Any]) -> Iterator[None]:
        """Inside, a forward with labels returns as `.loss` what `function` returns.

        It is called as `function(hidden, weight, target, bias=, ignore_index=, softcap=, logit_scale=)`: hidden
        [B, S, H] is what the output embedding received, target [B, S] the next tokens, and the rest is what
        `trace_kernels.linear_log_prob` takes. The model is called as always, so that wrappers such as DDP and FSDP take
        part; what it returns is a tensor or a tuple of tensors. A router's auxiliary loss must be off: it would be
        added to every position.
        """
        before, self._state.per_token = self._state.per_token, function
        try:
            yield
        finally:
            self._state.per_token = before

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


@dataclasses.dataclass
class _State:
    deferring: bool = False  # a forward with labels is running
    paused: bool = False  # such a forward is left as it was
    per_token: Callable[..., Any] | None = None  # what a forward with labels computes in place of the loss


class _Fused:
    """Marks the subclasses made here. Their bases are (_Fused, the original class)."""


class PendingLogits:
    """Logits that are written down and never computed: softcap(scale * (W hidden + bias)).

    It follows the operations that causal LMs apply between output embedding and loss. Anything else raises UserError.
    """

    def __init__(
        self, head: torch.nn.Linear, hidden: torch.Tensor, scale: float = 1.0, gain: float | None = None
    ) -> None:
        # Without tanh (gain None): scale * z. With it: gain * tanh(scale * z), a soft cap of gain on gain * scale * z.
        self.head, self.hidden, self.scale, self.gain = head, hidden, scale, gain

    def next_token_loss(
        self,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        ignore_index: int,
        num_items_in_batch: torch.Tensor | float | None,
        per_token: Callable[..., Any] | None,
    ) -> torch.Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hidden = self.hidden
        if per_token is None:  # as ForCausalLMLoss does: both may come in any shape of the same number of positions
            hidden, shift_labels = hidden.flatten(0, -2), shift_labels.flatten()
        target = shift_labels.to(hidden.device)
        options: dict[str, Any] = {"ignore_index": ignore_index, "softcap": self.gain}
        options["logit_scale"] = self.scale if self.gain is None else self.gain * self.scale

        def compute(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
                hidden = hidden.to(weight.dtype)  # from a model that casts its logits, and so these, to float32
            if per_token is not None:
                return per_token(hidden, weight, target, bias=bias, **options)  # type: ignore[no-any-return]
            return tk.linear_cross_entropy(hidden, weight, target, bias=bias, normalizer=num_items_in_batch, **options)

        # Through the module's call: hooks on it (FSDP, offloading) make the weight available only during that.
        loss: torch.Tensor = self.head(hidden, compute)
        return loss

    def _scaled(self, factor: object) -> PendingLogits:
        if isinstance(factor, torch.Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = factor.item()
        if not isinstance(factor, numbers.Real):
            raise _unsupported("a product with something that is not a number")
        if self.gain is None:
            return PendingLogits(self.head, self.hidden, self.scale * float(factor))
        return PendingLogits(self.head, self.hidden, self.scale, self.gain * float(factor))

    def __mul__(self, factor: object) -> PendingLogits:
        return self._scaled(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> PendingLogits:
        if isinstance(divisor, torch.Tensor) and divisor.numel() == 1 and not divisor.requires_grad:
            divisor = divisor.item()
        if not isinstance(divisor, numbers.Real):
            raise _unsupported("a division by something that is not a number")
        return self._scaled(1.0 / float(divisor))

    def tanh(self) -> PendingLogits:
        if self.gain is not None:
            raise _unsupported("a second tanh")
        return PendingLogits(self.head, self.hidden, self.scale, 1.0)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def __getitem__(self, index: object) -> PendingLogits:
        raise _unsupported("indexing")

    def __setitem__(self, index: object, value: object) -> None:
        raise _unsupported("assignment")

    def __add__(self, other: object) -> PendingLogits:
        raise _unsupported("an addition")

    __radd__ = __sub__ = __rsub__ = __add__

    def __getattr__(self, name: str) -> Any:
        if name in ("float", "to", "contiguous"):  # the loss is computed in float32 whatever the dtype
            return lambda *args, **kwargs: self
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unsupported(f".{name}")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> PendingLogits:
        if function in (torch.tanh, torch.Tensor.tanh) and len(args) == 1:
            capped: PendingLogits = args[0].tanh()
            return capped
        if function in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__) and len(args) == 2:
            scaled: PendingLogits = args[0] * args[1] if isinstance(args[0], PendingLogits) else args[1] * args[0]
            return scaled
        raise _unsupported(getattr(function, "__name__", repr(function)))


def _unsupported(what: str) -> UserError:
    return UserError(
        f"fuse_loss: this model applies {what} to its logits, and only scaling, casts and a tanh soft cap are known"
    )


def _base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    causal_lm = _base_model(model)
    name = type(causal_lm).__name__
    if not isinstance(causal_lm, PreTrainedModel):
        raise UserError(f"fuse_loss: model is a {name}, allowed is a transformers model or a peft model around one")
    if _STATE in causal_lm.__dict__:
        raise UserError(f"fuse_loss: this {name} is fused already")
    takes_labels = "labels" in inspect.signature(causal_lm.forward).parameters
    if not takes_labels or causal_lm.loss_function is not ForCausalLMLoss:
        raise UserError(f"fuse_loss: {name} does not compute a next-token loss from labels; allowed are causal LMs")
    _refuse_foreign_wrapper(causal_lm, f"this {name}")
    return causal_lm


def _output_embedding(model: PreTrainedModel) -> torch.nn.Linear:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    name = type(head).__name__
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        reason = ""
        if hasattr(head, "base_layer") or hasattr(head, "original_module"):
            reason = ": it bears an adapter; leave the output embedding out of the adapter's targets"
        raise UserError(
            f"fuse_loss: the output embedding of {type(model).__name__} is a {name}, "
            f"allowed is a torch.nn.Linear{reason}"
        )
    _refuse_foreign_wrapper(head, f"the output embedding of {type(model).__name__}")
    return head


def _refuse_foreign_wrapper(module: torch.nn.Module, what: str) -> None:
    if "forward" in module.__dict__ and "_old_forward" not in module.__dict__:
        raise UserError(f"fuse_loss: the forward of {what} is replaced by another tool; fuse first, wrap then")


def _become(module: torch.nn.Module, cls: type, state: _State) -> None:
    module.__dict__[_STATE] = state
    module.__class__ = cls
    _point_hooks_to_the_class(module)


def _point_hooks_to_the_class(module: torch.nn.Module) -> None:
    # accelerate's hooks (device maps, offloading) replace an instance's forward by a wrapper around `_old_forward`.
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def _subclass(cls: type, **members: Any) -> type:
    # The name stays: save_pretrained writes it as the architecture.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_Fused, cls), {**names, **members})


def _pending_head(cls: type) -> type:
    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, hidden: torch.Tensor, compute: Callable[..., torch.Tensor] | None = None) -> Any:
        if compute is not None:
            return compute(hidden, self.weight, self.bias)
        return cls.forward(self, hidden)  # type: ignore[attr-defined]

    def call(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The model's own call runs no hooks: FSDP2 shards the last norm and the head as one unit, which two calls of
        # the head would end before its time, and its weights would be freed before their backward.
        if getattr(self, _STATE).deferring and not args and not kwargs:
            return PendingLogits(self, hidden)
        return cls.__call__(self, hidden, *args, **kwargs)

    return _subclass(cls, forward=forward, __call__=call)


def _pending_model(cls: type[PreTrainedModel]) -> type:
    labels_position = list(inspect.signature(cls.forward).parameters).index("labels") - 1

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[labels_position] if len(args) > labels_position else kwargs.get("labels")
        state = getattr(self, _STATE)
        if labels is None or state.paused:
            return cls.forward(self, *args, **kwargs)
        state.deferring = True
        try:
            return _without_pending(cls.forward(self, *args, **kwargs))
        finally:
            state.deferring = False

    def loss_function(self: Any) -> Callable[..., torch.Tensor]:
        original = cls.loss_function.fget(self)  # type: ignore[attr-defined]

        def pending(
            logits: PendingLogits,
            labels: torch.Tensor | None,
            vocab_size: int,
            num_items_in_batch: torch.Tensor | float | None = None,
            ignore_index: int = -100,
            shift_labels: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> torch.Tensor:
            state = getattr(self, _STATE)
            return logits.next_token_loss(labels, shift_labels, ignore_index, num_items_in_batch, state.per_token)

        def fused(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = args[0] if args else kwargs.get("logits")
            found: torch.Tensor = (pending if isinstance(logits, PendingLogits) else original)(*args, **kwargs)
            return found

        return fused

    def setter(self: Any, value: Any) -> None:
        raise UserError(f"loss_function: the loss of {cls.__name__} is fused; undo fuse_loss before you set another")

    return _subclass(cls, forward=forward, loss_function=property(loss_function, setter))


def _without_pending(output: Any) -> Any:
    if isinstance(output, ModelOutput):
        kept = {name: value for name, value in output.items() if not isinstance(value, PendingLogits)}
        return type(output)(**kept)
    return tuple(None if isinstance(value, PendingLogits) else value for value in output)
