"""Which parameters are trained: all, those whose names match patterns, or low-rank adapters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from trace_unlearn.errors import UserError, needs


def train_only(model: torch.nn.Module, patterns: Sequence[str]) -> int:
    r"""Trains the parameters in whose name one of the regular expressions is found and freezes all others.

    Returns:
        How many numbers are trained.

    Raises:
        UserError: a pattern that is no regular expression or is found in no parameter's name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> train_only(model, [r"^1\.weight$"])
        6
    """
    compiled = check_patterns(patterns)
    names = [name for name, _ in model.named_parameters()]
    for pattern in compiled:
        if not any(pattern.search(name) for name in names):
            shape = sorted({re.sub(r"\d+", "N", name) for name in names})
            raise UserError(
                f"trainable: {pattern.pattern!r} is found in no parameter's name; there are {', '.join(shape[:12])}"
                + (", ..." if len(shape) > 12 else "")
            )
    trained = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(pattern.search(name) for pattern in compiled))
        trained += parameter.numel() if parameter.requires_grad else 0
    return trained


def check_patterns(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """The compiled patterns; UserError when one is no regular expression."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"trainable: {pattern!r} is not a regular expression: {error}") from error
    return compiled


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters.

    Attributes:
        rank: of the adapters.
        alpha: their scale is alpha / rank.
        modules: ends of the names of the linear layers that get one.
        parameters: ends of the names of stacked expert weights that get one, such as "mlp.experts.down_proj".
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    parameters: tuple[str, ...] = ()


def add_lora(model: PreTrainedModel, options: LoraOptions) -> Any:
    """The peft model with fresh adapters, which leave its outputs unchanged at first. The output embedding gets none.

    Raises:
        UserError: peft is not installed, or nothing matches.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"lora: {needs('peft')}") from error
    for kind, ends, present in (
        ("lora_modules", options.modules, [name for name, _ in model.named_modules()]),
        ("lora_parameters", options.parameters, [name for name, _ in model.named_parameters()]),
    ):
        for end in ends:
            if not any(name == end or name.endswith(f".{end}") for name in present):
                raise UserError(f"{kind}: no name in this model ends with {end!r}")
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # a factor, whatever its annotation says
        target_modules=list(options.modules) or None,
        target_parameters=list(options.parameters) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)
