"""Logits that are written down and never computed."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.fusion.head import at_head, check_weight


class PendingHead:
    """Stands for an output embedding while a model's forward runs: called, it gives `PendingLogits`.

    The call runs no hooks: FSDP2 shards the last norm and the head as one unit, which two calls of the head would end
    before its time, and its weights would be freed before their backward.
    """

    def __init__(self, module: torch.nn.Module, model: str, out_features: int) -> None:
        self.module, self.model, self._out_features = module, model, out_features

    def __call__(self, hidden: torch.Tensor) -> PendingLogits:
        return PendingLogits(self, hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def shape(self, hidden: torch.Tensor) -> torch.Size:
        return torch.Size((*hidden.shape[:-1], self._out_features))


class PendingLogits:
    """Logits that are written down and never computed: softcap(scale * (W hidden + bias)).

    It follows the operations that causal LMs apply between output embedding and loss. Anything else raises UserError.
    """

    def __init__(self, head: PendingHead, hidden: torch.Tensor, scale: float = 1.0, gain: float | None = None) -> None:
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

        def compute(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
            if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
                check_weight(weight, self.head.model)
            if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
                hidden = hidden.to(weight.dtype)  # from a model that casts its logits, and so these, to float32
            if per_token is not None:
                return per_token(hidden, weight, target, bias=bias, **options)
            count = num_items_in_batch
            if isinstance(count, torch.Tensor):
                if count.dim() > 0:
                    return _by_each(count, hidden, weight, target, bias=bias, **options)
                count = count.to(hidden.device)
            return tk.linear_cross_entropy(hidden, weight, target, bias=bias, normalizer=count, **options)

        loss: torch.Tensor = at_head(self.head.module, hidden, compute)
        return loss

    def _scaled(self, factor: object) -> PendingLogits:
        if isinstance(factor, torch.Tensor) and factor.numel() == 1 and not factor.requires_grad:
            factor = factor.item()
        if not isinstance(factor, numbers.Real):
            raise _unsupported("a product with something that is not a number")
        if self.gain is None:
            return self._with(self.scale * float(factor), None)
        return self._with(self.scale, self.gain * float(factor))

    def _with(self, scale: float, gain: float | None) -> PendingLogits:
        return PendingLogits(self.head, self.hidden, scale, gain)

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
        return self._with(self.scale, 1.0)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def shape(self) -> torch.Size:
        return self.head.shape(self.hidden)

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


def _by_each(
    counts: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The sum by each of `counts`, in their shape, as ForCausalLMLoss gives it.

    Trainer hands each replica of `nn.DataParallel` counts [1] or [n, 1].
    """
    total = tk.linear_cross_entropy(hidden, weight, target, reduction="sum", **options)
    counts = counts.to(total.device)
    return (total / counts).masked_fill(counts == 0, 0.0)


def _unsupported(what: str) -> UserError:
    return UserError(
        f"fuse_loss: this model applies {what} to its logits, and only scaling, casts and a tanh soft cap are known"
    )
