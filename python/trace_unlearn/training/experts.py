"""Training some experts only, of stacked [E, ...] weights too."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.routing.routers import layers_of, router_of
from trace_unlearn.routing.statistics import RoutingStatistics

_SLOT = "_trace_trained_rows"  # of a module of experts: its `_TrainedRows`
Pair = tuple[int, int]


def train_experts(model: torch.nn.Module, pairs: Sequence[Pair], *, routers: bool = True) -> int:
    """Trains some experts, and the routers of their layers, and freezes everything else.

    Of stacked weights [E, ...] the gradients of the other experts' rows are set to zero, so that optimisers leave these
    rows as they are, unless they decay weights. Gradients and optimiser states still have the size of the whole stack.
    Copies and pickles of the model train the same experts. A second call replaces the first one. Weights that are put
    in the place of these (`load_state_dict(..., assign=True)`) are trained whole: call this afterwards.

    Args:
        model: an MoE language model, not wrapped.
        pairs: (decoder layer, expert).
        routers: whether the routers of these layers are trained, all their rows.

    Returns:
        How many numbers are trained.

    Raises:
        UserError: no pair, no such layer or expert, or an expert without parameters.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> train_experts(MixtralForCausalLM(config), [(0, 2)])  # 3 * 8 * 16 of the expert, 4 * 16 of the router
        448
    """
    if not pairs:
        raise UserError("experts: got none to train")
    trained = 0
    chosen = layers_of(model, pairs, "experts")
    for module in model.modules():
        if (earlier := module.__dict__.pop(_SLOT, None)) is not None:
            earlier.remove()
    model.requires_grad_(False)
    for layer, experts in chosen.values():
        matched, stacked = 0, {}
        for name, parameter in layer.experts_module.named_parameters():
            first = name.partition(".")[0]
            if first.isdigit():  # a list of experts, each a module of its own
                if int(first) in experts:
                    parameter.requires_grad_(True)
                    matched += parameter.numel()
            elif parameter.dim() and parameter.shape[0] == layer.num_experts:
                parameter.requires_grad_(True)
                stacked[name] = parameter
                matched += parameter.numel() // layer.num_experts * len(set(experts))
        if not matched:
            raise UserError(f"experts: {layer.name} has no parameters of single experts to train")
        if stacked:
            layer.experts_module.__dict__[_SLOT] = _TrainedRows(stacked, sorted(set(experts)))
        if routers:
            for parameter in router_of(model, layer)[1].parameters():
                parameter.requires_grad_(True)
                matched += parameter.numel()
        trained += matched
    return trained


class _TrainedRows:
    """Hooks that set the gradients of all other rows to zero; in a copy of the module, its own parameters get them.

    A copy of a parameter alone has no hooks, and would be trained whole.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], rows: list[int]) -> None:
        self.parameters, self.rows = parameters, rows
        mask: Any = functools.partial(_only, rows)
        self._handles: list[Any] = [parameter.register_hook(mask) for parameter in parameters.values()]  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> _TrainedRows:
        return _TrainedRows(copy.deepcopy(self.parameters, memo), list(self.rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return _TrainedRows, (self.parameters, self.rows)


def _only(rows: list[int], gradient: torch.Tensor) -> torch.Tensor:
    kept = torch.zeros_like(gradient)
    kept[rows] = gradient[rows]
    return kept


def check_masks(model: torch.nn.Module, weight_decay: float, sharded: bool) -> None:
    """UserError where the rows of other experts would change, or could not be told apart."""
    masked = {
        name: (module, found)
        for name, module in model.named_modules()
        if (found := module.__dict__.get(_SLOT)) is not None
    }
    if not masked:
        return
    if weight_decay:
        raise UserError(f"weight_decay: got {weight_decay}, allowed is 0 with experts: it would decay the others too")
    if sharded:
        raise UserError("experts: FSDP and DeepSpeed split the stacked weights, whose rows are then not found")
    for name, (module, found) in masked.items():
        there = dict(module.named_parameters())
        if replaced := [key for key, parameter in found.parameters.items() if there.get(key) is not parameter]:
            raise UserError(
                f"experts: {', '.join(replaced)} of {name} was replaced after train_experts, and would be trained "
                "whole; call train_experts again"
            )


def check_words(words: Sequence[str], calibration: str | None, profile: str | None) -> None:
    """UserError for a word that `chosen_experts` does not know, or a folder that it needs and is not given."""
    for word in words:
        if word == "selected" and calibration is None:
            raise UserError("experts: 'selected' needs a calibration")
        if re.fullmatch(r"top[1-9]\d*", word) and profile is None:
            raise UserError(f"experts: {word!r} needs the folder that profile wrote, as `profile`")
        if not re.fullmatch(r"selected|top[1-9]\d*|\d+\.\d+", word):
            raise UserError(f"experts: got {word!r}, allowed: LAYER.EXPERT, selected, or top1, top2, ...")


def chosen_experts(words: Sequence[str], calibration: str | None, profile: str | None) -> tuple[Pair, ...]:
    """The (decoder layer, expert) pairs that an option names: "LAYER.EXPERT", "selected" or "topM".

    "selected" are the calibration's forget-critical experts, "topM" the M pairs of the highest forget frequency of all
    layers, as SEUF takes them (it ranks by gate scores, which a profile does not hold).

    Raises:
        UserError: another word, or the folder that it needs is not given.

    Example:
        >>> chosen_experts(["3.17", "5.2"], None, None)
        ((3, 17), (5, 2))
    """
    check_words(words, calibration, profile)
    pairs: list[Pair] = []
    for word in words:
        if word == "selected":
            assert calibration is not None
            found = Calibration.load(calibration)
            pairs += _named(found.selected.tolist(), found.choices.get("layer_indices"))
        elif word.startswith("top"):
            assert profile is not None
            pairs += top_experts(RoutingStatistics.load(profile), int(word[3:]))
        else:
            layer, expert = word.split(".")
            pairs.append((int(layer), int(expert)))
    if words and not pairs:
        raise UserError(f"experts: {', '.join(words)} names no expert: the calibration selected none")
    return tuple(dict.fromkeys(pairs))


def top_experts(stats: RoutingStatistics, count: int) -> list[Pair]:
    """The (decoder layer, expert) pairs of the highest forget frequency, over all layers."""
    frequency = stats.forget_frequency
    flat = frequency.flatten().sort(descending=True, stable=True).indices[:count]
    E = frequency.shape[1]
    return _named([[int(i) // E, int(i) % E] for i in flat], stats.meta.get("layer_indices"))


def _named(pairs: list[list[int]], layers: list[int] | None) -> list[Pair]:
    return [(layers[layer] if layers else layer, expert) for layer, expert in pairs]
