"""One forward of the wrapped model, and from it what the losses need: never logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.fusion.loss import fuse_loss, fused_loss_of
from trace_unlearn.routing.hooks import Hook
from trace_unlearn.routing.recorder import unwrap
from trace_unlearn.routing.routers import RouterProbabilities
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.objectives import anchor


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one forward gives; what is not asked for is None."""

    log_probs: torch.Tensor | None = None  # [B, S] float32: position t holds log p(token t + 1)
    known: torch.Tensor | None = None  # 0-d: the sum of coefficient * NLL; log_probs are constants then
    reference_log_probs: torch.Tensor | None = None  # [B, S] float32, where a reference was given
    divergence: torch.Tensor | None = None  # [B, S] float32: KL(reference || model), likewise
    hidden: torch.Tensor | None = None  # [B, S, H]: the output of the layer that "rmu" steers
    anchor: torch.Tensor | None = None  # [B, S] float32: the anchor loss


@dataclasses.dataclass(frozen=True)
class ReferenceRows:
    """The original model's last hidden states at some positions of a batch."""

    mask: torch.Tensor  # [B, S] bool, n positions
    hidden: torch.Tensor  # [n, H]


class Forward:
    """Calls a model for one configuration.

    Args:
        model: as TraceTrainer takes it, before it is wrapped.
        config: what is wanted.
        frugal: on a CPU, return the losses' memory to the system before the backward of the layers.

    Raises:
        UserError: the model cannot serve it.
    """

    def __init__(self, model: PreTrainedModel, config: TraceConfig, frugal: bool = False) -> None:
        self._frugal = frugal
        self.fused = fused_loss_of(model) or fuse_loss(model)
        self._takes_router_logits = hasattr(model.config, "output_router_logits")
        self._layer = _Layer(model, config.layer) if config.method.on_hidden_states else None
        self.routers = RouterProbabilities(model, config.anchor_experts) if config.anchor else None
        head: Any = unwrap(model).get_output_embeddings()  # type: ignore[operator]
        self._reference_weight: torch.Tensor | None = None
        if config.retain_loss == "kl" or config.method.needs_divergence:
            if head.bias is not None:
                raise UserError(f"retain_loss: the output embedding of {type(unwrap(model)).__name__} has a bias")
            if head.weight.requires_grad:  # the head moves; a frozen one, as under LoRA, is its own reference
                self._reference_weight = _whole(head.weight)

    def router_options(self) -> dict[str, bool]:
        """Keeps a router's auxiliary loss off: with it, forgetting would also unbalance the experts."""
        return {"output_router_logits": False} if self._takes_router_logits else {}

    @property
    def reference_bytes(self) -> int:
        """Of the output embedding's copy."""
        return 0 if self._reference_weight is None else self._reference_weight.nbytes

    def freeze_unused(self) -> None:
        """Freezes what a loss on a layer's output cannot reach: the layers above, the last norm, the head."""
        if self._layer is not None:
            self._layer.freeze_above()

    def log_probs(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, S] float32."""
        with self.fused.log_probs():
            found: torch.Tensor = self._call(model, inputs)
        return found

    def hidden(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[B, S, H]: what the losses on the original model's hidden states refer to."""
        if self._layer is not None:
            return self._layer_output(model, inputs)
        with self.fused.per_token(lambda hidden, *rest, **options: hidden.clone()):
            found: torch.Tensor = self._call(model, inputs)
        return found

    def seen(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        constant: torch.Tensor,
        reference: ReferenceRows | None,
        coefficient: torch.Tensor | None = None,
    ) -> Seen:
        """All that the configuration's losses need.

        Args:
            model: wrapped or not.
            inputs: input_ids, attention_mask, labels.
            constant: [B] bool, documents whose log-probabilities are only logged and need no gradient.
            coefficient: [B, S] float, what the loss is of each token's NLL, where that is known already: a trainable
                head's gradient is then formed in the same pass. 0 for tokens that are only logged.
            reference: where the divergence from the original model is wanted.
        """
        if self._layer is not None:
            return Seen(hidden=self._layer_output(model, inputs))
        names: list[str] = []

        def compute(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
            frugal = self._frugal and not torch.compiler.is_compiling()
            if frugal and hidden.requires_grad and hidden.device.type == "cpu":
                hidden.register_hook(_release)  # type: ignore[no-untyped-call]
            if coefficient is None:
                found = self._log_probs(hidden, weight, target, constant, options)
            else:
                found = self._known(hidden, weight, target, coefficient, options)
            found |= self._divergence(hidden, weight, target, reference, options)
            if self.routers is not None:
                probabilities, targets = self.routers.take(target.shape)
                losses = (anchor(p, t) for p, t in zip(probabilities, targets, strict=True))
                found["anchor"] = torch.stack([*losses]).sum(0)
            names[:] = found
            values = tuple(found.values())
            return values if len(values) > 1 else values[0]

        if self.routers is not None:
            self.routers.begin()
        with self.fused.per_token(compute):
            values = self._call(model, inputs)
        values = (values,) if isinstance(values, torch.Tensor) else values
        return Seen(**dict(zip(names, values, strict=True)))

    def _log_probs(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        constant: torch.Tensor,
        options: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        ignored = options["ignore_index"]
        rest = constant.to(target.device)[:, None]
        log_probs = tk.linear_log_prob(hidden, weight, target.where(~rest, ignored), **options)
        return {"log_probs": log_probs + _logged(hidden, weight, target.where(rest, ignored), options)}

    def _known(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        coefficient: torch.Tensor,
        options: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        coefficient = coefficient.to(target.device)
        total, log_probs = tk.log_prob_sum(hidden, weight, target, coefficient, **options)
        rest = target.where(coefficient == 0, options["ignore_index"])
        return {"log_probs": log_probs + _logged(hidden, weight, rest, options), "known": -total}

    def _divergence(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        reference: ReferenceRows | None,
        options: Mapping[str, Any],
    ) -> dict[str, torch.Tensor]:
        if reference is None:
            return {}
        mask = reference.mask.to(hidden.device)
        ref_weight = weight.detach()
        if self._reference_weight is not None:
            self._reference_weight = ref_weight = self._reference_weight.to(weight.device)
        ref_hidden = reference.hidden.to(hidden.device, ref_weight.dtype)
        softcap, logit_scale = options["softcap"], options["logit_scale"]
        kl = tk.linear_kl(
            hidden[mask], weight, ref_hidden, ref_weight, reduction="none", softcap=softcap, logit_scale=logit_scale
        )
        with torch.no_grad():
            rest = {name: options[name] for name in ("ignore_index", "softcap", "logit_scale")}
            said = tk.linear_log_prob(ref_hidden, ref_weight, target[mask], **rest)
        zeros = torch.zeros(target.shape, dtype=kl.dtype, device=kl.device)
        return {
            "divergence": zeros.masked_scatter(mask, kl),
            "reference_log_probs": zeros.masked_scatter(mask, said),
        }

    def _layer_output(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        assert self._layer is not None
        layer = self._layer
        with layer, self.fused.per_token(lambda *args, **options: layer.output()):
            found: torch.Tensor = self._call(model, inputs)
        return found

    def _call(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["labels"],
            use_cache=False,
            **self.router_options(),
        ).loss


def _release(gradient: torch.Tensor) -> None:
    # A head's gradient was added to .grad by now, because autograd accumulates before it goes on to the layers. During
    # their backward its memory would lie unused.
    tk.release_workspace()


@torch.no_grad()
def _logged(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """[B, S]: log-probabilities of what is only logged; the other targets are ignored."""
    if not (target != options["ignore_index"]).any():
        return torch.zeros((), dtype=torch.float32, device=hidden.device)
    found: torch.Tensor = tk.linear_log_prob(hidden, weight, target, **options)
    return found


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight that may be partitioned by DeepSpeed already."""
    if not hasattr(weight, "ds_id"):
        return weight.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().clone()


class _Layer:
    """A context in which the model ends after one decoder layer, whose output is kept."""

    def __init__(self, model: PreTrainedModel, number: int | None) -> None:
        self._model = unwrap(model)
        self._owner: Any = next(
            (
                module
                for module in self._model.modules()
                if isinstance(getattr(module, "layers", None), torch.nn.ModuleList)
                and isinstance(getattr(module, "norm", None), torch.nn.Module)
            ),
            None,
        )
        if self._owner is None:
            raise UserError(
                f"objective: 'rmu' finds no decoder layers with a norm after them in {type(self._model).__name__}"
            )
        self._layers: torch.nn.ModuleList = cast(Any, self._owner).layers
        self.number = len(self._layers) // 4 if number is None else number
        if self.number >= len(self._layers):
            raise UserError(f"layer: got {number}, but {type(self._model).__name__} has {len(self._layers)} layers")
        self._output: torch.Tensor | None = None

    def freeze_above(self) -> None:
        reached = {id(p) for layer in self._layers[: self.number + 1] for p in layer.parameters()}
        reached |= {id(p) for p in self._model.get_input_embeddings().parameters()}  # type: ignore[operator]
        for parameter in self._model.parameters():
            if id(parameter) not in reached:
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self._model.parameters()):
            raise UserError(f"trainable: nothing that is trained lies below layer {self.number}, which 'rmu' steers")

    def output(self) -> torch.Tensor:
        assert self._output is not None
        return self._output.clone()  # FSDP2 warns of a module that returns a view

    def __enter__(self) -> _Layer:
        self._owner.layers = self._layers[: self.number + 1]
        # At the norm that follows: a hook on the layer would fire inside gradient checkpointing, without a graph.
        self._hook = self._owner.norm.register_forward_pre_hook(Hook(self._keep))
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        self._owner.layers = self._layers
        self._output = None

    def _keep(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._output = args[0]
