"""The routers of a model's MoE layers, and the probabilities that they give."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from trace_unlearn.errors import UserError
from trace_unlearn.forwards import Layer, attach, detach
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


class RouterLogits(Layer):
    """Lets a function see, or replace, the logits [..., E] that a router gives, as the router itself computes them.

    What it sees is what the model acts on: logits of the effective weight, where adapters, parametrisations or sharding
    stand in for the one that the module holds.

    Args:
        see: is given the logits, and returns None or others for their place.
        layer: whose router it is.
    """

    def __init__(self, see: Callable[[torch.Tensor], torch.Tensor | None], layer: MoELayer) -> None:
        self.see, self.layer = see, layer

    def run(self, module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _is_linear(module):  # adapters on a linear layer add to its output
            return self._seen(inner(*args, **kwargs))
        times: list[int] = []
        with _AtLinear(self._seen, self.layer.num_experts, times):
            output = inner(*args, **kwargs)
        if len(times) != 1:
            raise RuntimeError(
                f"the router of {self.layer.name} ({type(module).__name__}) computes its logits by {len(times)} linear "
                "maps; one is expected"
            )
        return output

    def _seen(self, logits: torch.Tensor) -> torch.Tensor:
        other = self.see(logits)
        return logits if other is None else other


class _AtLinear(TorchFunctionMode):
    """Passes the outputs [..., E] of linear maps through a function; `times` counts them."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], num_experts: int, times: list[int]) -> None:
        super().__init__()
        self.function, self.num_experts, self.times = function, num_experts, times

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and output.shape[-1] == self.num_experts:
            self.times.append(1)
            return self.function(output)
        return output


def _is_linear(router: Any) -> bool:
    while isinstance(base := getattr(router, "base_layer", None), torch.nn.Module):
        router = base
    return isinstance(router, torch.nn.Linear) and type(router).forward is torch.nn.Linear.forward


class RouterProbabilities:
    """The softmax of the router logits of some layers, as the last forward computed them, with gradients.

    Enter it around training: it must see them again when gradient checkpointing recomputes a layer.
    `begin` comes before a forward, and `take` gives what that forward saw, in the same thread.
    """

    def __init__(self, model: torch.nn.Module, pairs: Pairs) -> None:
        self._targets: list[torch.Tensor] = []
        self._layers: list[tuple[torch.nn.Module, RouterLogits]] = []
        self._now = _Now()
        for number, (layer, experts) in enumerate(layers_of(model, pairs, "anchor_experts").values()):
            router = router_of(model, layer)[1]
            self._layers.append((router, RouterLogits(functools.partial(self._keep, number), layer)))
            self._targets.append(torch.tensor([e in experts for e in range(layer.num_experts)]))

    def __enter__(self) -> RouterProbabilities:
        for router, layer in self._layers:
            attach(router, layer)
        return self

    def __exit__(self, *error: object) -> None:
        for router, layer in self._layers:
            detach(router, layer)

    def begin(self) -> None:
        """Records from here until `take`."""
        self._now.seen = {}

    def take(self, shape: torch.Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """[*shape, E] float32 and [E] bool, of each layer."""
        found, self._now.seen = self._now.seen, None
        if found is None or len(found) != len(self._layers):
            raise UserError("anchor: a router did not run in this forward")
        seen = [found[number] for number in range(len(self._layers))]
        trained = any(p.requires_grad for router, _ in self._layers for p in router.parameters())
        if torch.is_grad_enabled() and trained and not all(p.requires_grad for p in seen):
            raise UserError(
                "anchor: reentrant gradient checkpointing hides the routers; set gradient_checkpointing_kwargs to "
                "use_reentrant: false"
            )
        return (
            [p.view(*shape, -1) for p in seen],
            [target.to(p.device) for target, p in zip(self._targets, seen, strict=True)],
        )

    def _keep(self, number: int, logits: torch.Tensor) -> None:
        probabilities = logits.float().softmax(-1)  # also when it is not kept: checkpointing compares what is saved
        if self._now.seen is not None:
            self._now.seen[number] = probabilities


class _Now(threading.local):
    """What the forward of a thread saw, by the number of the layer; None where none is recorded."""

    def __init__(self) -> None:
        self.seen: dict[int, torch.Tensor] | None = None
