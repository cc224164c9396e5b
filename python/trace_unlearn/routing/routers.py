"""The routers of a model's MoE layers, and the probabilities that they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import MoELayer, moe_layers, unwrap

Pairs = Sequence[tuple[int, int]]


def layers_of(model: torch.nn.Module, pairs: Pairs, argument: str) -> dict[int, tuple[MoELayer, list[int]]]:
    """The MoE layers of (decoder layer, expert) pairs, with the experts of each.

    Raises:
        UserError: there is no such layer or expert.
    """
    by_index = {layer.layer_index: layer for layer in moe_layers(model)}
    found: dict[int, tuple[MoELayer, list[int]]] = {}
    for index, expert in pairs:
        layer = by_index.get(index)
        if layer is None:
            raise UserError(f"{argument}: layer {index} is no MoE layer; those are {sorted(by_index)}")
        if not 0 <= expert < layer.num_experts:
            raise UserError(f"{argument}: layer {index} has no expert {expert}, only 0 to {layer.num_experts - 1}")
        found.setdefault(index, (layer, []))[1].append(expert)
    return found


def router_of(model: torch.nn.Module, layer: MoELayer) -> tuple[str, torch.nn.Module]:
    """Name and module of the router of an MoE layer: beside its experts, with a weight [E, H].

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = MixtralForCausalLM(config)
        >>> router_of(model, moe_layers(model)[0])[0]
        'model.layers.0.mlp.gate'
    """
    parent = layer.name.rpartition(".")[0]
    for name, module in unwrap(model).get_submodule(parent).named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0] == layer.num_experts:
            return f"{parent}.{name}", module
    raise UserError(f"model: finds no router with a weight [{layer.num_experts}, H] beside {layer.name}")


class RouterProbabilities:
    """The softmax of the router logits of some layers, as the last forward computed them, with gradients.

    Enter it around training: its hooks must fire again when gradient checkpointing recomputes a layer.
    `begin` comes before a forward, and `take` gives what it saw.
    """

    def __init__(self, model: torch.nn.Module, pairs: Pairs) -> None:
        self._routers, self._targets = [], []
        for layer, experts in layers_of(model, pairs, "anchor_experts").values():
            self._routers.append(router_of(model, layer)[1])
            self._targets.append(torch.tensor([e in experts for e in range(layer.num_experts)]))
        self._seen: dict[int, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._recording = False

    def __enter__(self) -> RouterProbabilities:
        self._hooks = [router.register_forward_hook(self._hook(i)) for i, router in enumerate(self._routers)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin(self) -> None:
        """Records from here until `take`."""
        self._seen.clear()
        self._recording = True

    def take(self, shape: torch.Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """[*shape, E] float32 and [E] bool, of each layer."""
        self._recording = False
        if len(self._seen) != len(self._routers):
            raise UserError("anchor: a router did not run in this forward")
        seen = [self._seen.pop(i) for i in range(len(self._routers))]
        trained = any(router.weight.requires_grad for router in self._routers)
        if torch.is_grad_enabled() and trained and not all(p.requires_grad for p in seen):
            raise UserError(
                "anchor: reentrant gradient checkpointing hides the routers; set gradient_checkpointing_kwargs to "
                "use_reentrant: false"
            )
        return (
            [p.view(*shape, -1) for p in seen],
            [target.to(p.device) for target, p in zip(self._targets, seen, strict=True)],
        )

    def _hook(self, number: int) -> Any:
        def keep(router: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
            hidden = args[0].reshape(-1, router.weight.shape[1])
            bias = getattr(router, "bias", None)
            logits = F.linear(hidden, router.weight, bias if isinstance(bias, torch.Tensor) else None)
            probabilities = logits.float().softmax(-1)  # computed again: families return different things
            if self._recording:
                self._seen[number] = probabilities

        return keep
