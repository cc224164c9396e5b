"""How the chosen experts are read from each kind of MoE layer.

Most families hand [T, k] indices to a module named ...Experts, and one pre-hook on it reads them. The others are
listed here by the name of their class, each with the few lines that recover the very choice the layer acts on. What
cannot be recovered exactly is refused, with the reason.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trace_unlearn.routing.hooks import Hook

#: Called once a forward with the indices [n, k] that the layer acts on, -1 for no expert, and the rows of the batch's
#: tokens that they belong to (all by default).
Report = Callable[..., None]
#: Registers hooks that call the report; gets the model, the layer's path and module, and the report.
Attach = Callable[[nn.Module, str, nn.Module, Report], list[Any]]


@dataclass(frozen=True)
class Adapter:
    """How to observe one kind of layer: `attach` its hooks, and where the number of experts is told."""

    attach: Attach
    num_experts: Callable[[nn.Module], int | None]


def adapter_of(module: nn.Module, parent: nn.Module) -> Adapter | str | None:
    """The adapter of an MoE layer, the reason why it cannot be observed, or None for any other module.

    Classes are told by the end of their names: quantisers and FSDP put words before them. `parent` is the module around
    it: it says whose layer it is where a quantiser has put experts of its own.
    """
    kind = type(module).__name__
    if kind.endswith(_QUANTISED):
        family = sys.modules[type(parent).__module__]
        for name in _ADAPTERS:
            if hasattr(family, name):
                return f"it stands where {name} was, which is read in a way of its own: load the model unquantised"
    for name, reason in _REFUSED.items():
        if kind.endswith(name):
            return reason
    for name, adapter in _ADAPTERS.items():
        if kind.endswith(name):
            return adapter
    if isinstance(getattr(module, "experts", None), nn.ModuleList) and hasattr(module, "gate"):
        return _of_transformers_4(kind)
    if not kind.endswith("Experts") or kind.endswith(_PARTS):
        return None
    if argument_names(module)[1:2] in ([name] for name in _INDEX_ARGUMENTS):
        return _INDICES
    if argument_names(module)[1:2] == ["router_logits"] and hasattr(module, "route_tokens_to_experts"):
        return _LOGITS
    if kind.endswith("SharedExperts"):  # they run for every token
        return None
    return f"it takes {inspect.signature(type(module).forward)}, not the indices of the chosen experts"


def _of_transformers_4(kind: str) -> Adapter | str:
    """Of a block with a list of experts, which transformers 5 has no more."""
    for name, adapter in _LISTS.items():
        if kind.endswith(name):
            return adapter
    known = ", ".join(name.removesuffix("SparseMoeBlock").removesuffix("MoE") for name in _LISTS)
    return f"of blocks with a list of experts, as in transformers 4, those of {known} are known"


def plain_path(path: str) -> str:
    """The path without what PEFT puts around a module."""
    return re.sub(r"(\.base_layer)+$", "", path)


# The second argument of an experts module that receives the chosen experts as [T, k] indices.
_INDEX_ARGUMENTS = ("top_k_index", "router_indices")

_REFUSED = {
    "NllbMoeExperts": "transformers takes its router's one-hot mask for indices, so that every token runs through "
    "experts 0 and 1 whatever the router chose",
    "Mxfp4GptOssExperts": "its kernels route by themselves; load the model with Mxfp4Config(dequantize=True)",
}

# What loaders of quantised checkpoints put in the place of any family's experts.
_QUANTISED = ("FP8Experts", "GgufExperts")

# Modules whose class is named like a layer and that are a part of one.
_PARTS = ("JetMoeParallelExperts",)


def argument_names(module: nn.Module) -> list[str]:
    """Of the class: an instance's forward may be replaced by a wrapper that takes anything."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    names = argument_names(module)
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


def _ancestor(model: nn.Module, path: str, levels: int) -> nn.Module:
    return model.get_submodule(".".join(plain_path(path).split(".")[:-levels]))


def _stated(*attributes: str) -> Callable[[nn.Module], int | None]:
    def read(module: nn.Module) -> int | None:
        values = (getattr(module, attribute, None) for attribute in attributes)
        return next((value for value in values if isinstance(value, int)), None)

    return read


def _before(module: nn.Module, observe: Callable[..., None]) -> list[Any]:
    """Lets `observe` see the arguments of the module's forward, by position."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        observe(*_arguments(module, args, kwargs))

    return [module.register_forward_pre_hook(Hook(hook), with_kwargs=True)]


def _after(module: nn.Module, observe: Callable[[Any], None]) -> list[Any]:
    """Lets `observe` see what the module's forward returns."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        observe(output)

    return [module.register_forward_hook(Hook(hook))]


def _indices(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    return _before(experts, lambda hidden, index, *rest: report(index))


def _logits(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    """The experts choose by themselves: what they call on the logits gives the same again."""
    choose: Any = experts.route_tokens_to_experts

    def observe(hidden: torch.Tensor, logits: torch.Tensor) -> None:
        first, second = choose(logits.detach())
        report(second if first.is_floating_point() else first)

    return _before(experts, observe)


def _softmax(model: nn.Module, path: str, block: nn.Module, report: Report) -> list[Any]:
    """The block chooses among its gate's logits by itself: the same calls on the same logits choose the same."""
    state: Any = block

    def observe(logits: torch.Tensor) -> None:
        scores = nn.functional.softmax(logits.detach(), dim=1, dtype=torch.float)
        report(scores.topk(state.top_k, dim=-1).indices)

    return _after(state.gate, observe)


def _chosen_by_gate(model: nn.Module, path: str, block: nn.Module, report: Report) -> list[Any]:
    gate: Any = block.get_submodule("gate")
    return _after(gate, lambda output: report(output[0]))


def _zaya(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    """A token that skips the layer comes as expert 0 with weight 0."""
    return _before(experts, lambda hidden, index, weights, *rest: report(index.masked_fill(weights == 0, -1)))


def _switch(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    """A one-hot mask [T, 1, E]; all zero where the chosen expert was at its capacity."""

    def observe(hidden: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> None:
        largest = mask.max(dim=-1)
        report(largest.indices.masked_fill(largest.values == 0, -1))

    return _before(experts, observe)


def _llama4(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    """Every expert runs on every token times its score [T, E], which is 0 but for the k chosen ones."""
    router: Any = _ancestor(model, path, 1).router

    def observe(output: tuple[torch.Tensor, ...]) -> None:
        top = output[0].topk(router.top_k, dim=-1)
        report(top.indices.masked_fill(top.values == 0, -1))

    return _after(router, observe)


def _jetmoe(model: nn.Module, path: str, layer: nn.Module, report: Report) -> list[Any]:
    """The router sorts the T * k slots by expert and tells how many each expert gets."""
    router: Any = layer.router

    def observe(output: tuple[Any, ...]) -> None:
        order, sizes = output[0], output[3]
        experts = torch.repeat_interleave(
            torch.arange(len(sizes), device=order.device), torch.as_tensor(sizes, device=order.device)
        )
        report(torch.empty_like(order).scatter_(0, order, experts).view(-1, router.top_k))

    return _after(router, observe)


def _doge(model: nn.Module, path: str, layer: nn.Module, report: Report) -> list[Any]:
    """The experts are rows of embeddings, looked up by [T, k] indices."""
    embedding: Any = layer.down_embed
    return _before(embedding, lambda index: report(index))


def _ernie_vl(model: nn.Module, path: str, experts: nn.Module, report: Report) -> list[Any]:
    """Text and vision tokens have experts of their own: the rows are those of one kind, in order."""
    block = _ancestor(model, path, 2)
    is_vision = plain_path(path).split(".")[-2] == "vision_moe"
    rows: list[torch.Tensor | None] = [None]

    def sort_out(hidden: torch.Tensor, kinds: torch.Tensor | None = None) -> None:
        if kinds is not None and bool(kinds.any()):
            rows[0] = (kinds.bool().flatten() == is_vision).nonzero()[:, 0]
            return
        rows[0] = None
        if is_vision:  # not run at all
            report(torch.full((hidden.shape[0] * hidden.shape[1], 1), -1, device=hidden.device))

    def observe(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        report(index, rows[0])

    return [*_before(block, sort_out), *_before(experts, observe)]


_INDICES = Adapter(_indices, _stated("num_experts", "num_routed_experts"))
_LOGITS = Adapter(_logits, lambda experts: None)
_LIST = Adapter(_softmax, lambda block: len(block.get_submodule("experts")))  # type: ignore[arg-type]
_LISTS = {
    "MixtralSparseMoeBlock": _LIST,
    "Qwen2MoeSparseMoeBlock": _LIST,
    "Qwen3MoeSparseMoeBlock": _LIST,
    "OlmoeSparseMoeBlock": _LIST,
    "DeepseekV3MoE": Adapter(_chosen_by_gate, _LIST.num_experts),
}
_ADAPTERS = {
    "ZayaExperts": Adapter(_zaya, _stated("num_experts")),
    "Llama4TextExperts": Adapter(_llama4, _stated("num_experts")),
    # Both route by themselves, and a token that activates an expert of either is changed when it is: two layers.
    "JetMoeMoA": Adapter(_jetmoe, lambda layer: _stated("num_experts")(layer.get_submodule("router"))),
    "JetMoeMoE": Adapter(_jetmoe, lambda layer: _stated("num_experts")(layer.get_submodule("router"))),
    "SwitchTransformersExperts": Adapter(_switch, _stated("num_experts")),
    "DogeCDMoE": Adapter(_doge, _stated("num_experts")),
    "Ernie4_5_VLMoeMoeExperts": Adapter(_ernie_vl, _stated("num_experts")),
}
