"""Which experts a forward really used, told from what changing an expert's weights changes; no index is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Activations:
    """The calls of a model's MoE layers, in order, to be repeated with other weights."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[_Block, tuple[Any, ...], dict[str, Any]]]] = {}

    @torch.no_grad()
    def of(self, path: str, num_experts: int, call: int = 0) -> torch.Tensor:
        """[n, num_experts] bool: the rows of the layer's input whose output an expert has a part in."""
        block, args, kwargs = self.calls[path][call]
        plain = block.run(*args, **kwargs)
        columns = []
        for expert in range(num_experts):
            weights = block.weights_of(expert)
            before = [weight.clone() for weight in weights]
            for weight in weights:
                weight.normal_(std=1000.0)  # so that a tiny weight of the expert shows in bfloat16 too
            columns.append((block.run(*args, **kwargs) != plain).flatten(1).any(dim=1))
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        return torch.stack(columns, dim=1)


class _Block:
    """What to call again: `run` gives one row per token, `weights_of` an expert's own weights."""

    def __init__(self, watched: nn.Module, run: Callable[..., Any], weights_of: Callable[[int], list[torch.Tensor]]):
        self.watched, self.run, self.weights_of = watched, run, weights_of


def _rows(output: Any) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else output
    return output.reshape(-1, output.shape[-1])


def _stacked(experts: nn.Module) -> Callable[[int], list[torch.Tensor]]:
    return lambda e: [p.data[e] for p in experts.parameters() if p.dim() == 3 and p.shape[0] > e]


def _block(model: nn.Module, path: str, module: nn.Module) -> _Block | None:
    kind = type(module).__name__
    parent = model.get_submodule(path.rpartition(".")[0])
    if kind == "Llama4TextExperts":
        return _Block(parent, lambda *a, **k: _rows(parent.forward(*a, **k)), _stacked(module))
    if kind == "DogeCDMoE":
        weight = module.up_embed.weight.data
        return _Block(module, lambda *a, **k: _rows(module.forward(*a, **k)), lambda e: [weight[e]])
    if kind == "JetMoeMoE":
        return _Block(module, lambda *a, **k: _rows(module.forward(*a, **k)), _stacked(module.output_linear))
    if kind == "JetMoeMoA":
        return _Block(
            module.router, lambda hidden: module.map(hidden[None])[0][0].flatten(1), _stacked(module.input_linear)
        )
    if kind == "DbrxExperts":
        stacked = [p.data.view(module.num_experts, -1, module.hidden_size) for p in module.parameters()]
        return _Block(module, lambda *a, **k: _rows(module.forward(*a, **k)), lambda e: [p[e] for p in stacked])
    if kind.endswith("Experts") and isinstance(module, nn.ModuleDict):
        return _Block(
            module,
            lambda *a, **k: _rows(module.forward(*a, **k)),
            lambda e: [p.data for p in module[f"expert_{e}"].parameters()],
        )
    if kind.endswith("Experts") and any(p.dim() == 3 for p in module.parameters()):
        if "Parallel" in kind or (kind.endswith("SharedExperts") and "gammas" in module.forward.__code__.co_varnames):
            return None
        return _Block(module, lambda *a, **k: _rows(module.forward(*a, **k)), _stacked(module))
    return None


@contextlib.contextmanager
def activations(model: nn.Module) -> Iterator[Activations]:
    seen, handles = Activations(), []
    for path, module in model.named_modules():
        block = _block(model, path, module)
        if block is None:
            continue

        def keep(_: nn.Module, args: Any, kwargs: Any, path: str = path, block: _Block = block) -> None:
            copy = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in args]
            copied = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            seen.calls.setdefault(path, []).append((block, tuple(copy), copied))

        handles.append(block.watched.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
