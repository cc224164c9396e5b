"""Greedy continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.sources.model import input_device


def continuations(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 8,
    label: str = "",
    progress: bool = True,
) -> list[str]:
    """The texts that `model` continues each prompt's tokens with, greedily, whatever its checkpoint configures."""
    texts: list[str] = []
    with tqdm(total=len(prompts), desc=label, unit=" rows", disable=None if progress else True) as bar:
        for start in range(0, len(prompts), batch_size):
            some = prompts[start : start + batch_size]
            texts += _batch(model, tokenizer, some, max_new_tokens)
            bar.update(len(some))
    return texts


def cut(text: str, stops: Sequence[str]) -> str:
    r"""The text before the first of `stops`.

    >>> cut("Paris\n\nQuestion: and Rome?", ["\n\n", "Question:"])
    'Paris'
    """
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _batch(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """Padded on the left."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    own = model.generation_config
    ends = {tokenizer.eos_token_id, *_listed(getattr(own, "eos_token_id", None))} - {None}
    # In place of the model's own configuration: generate() would take its repetition penalty and the like from there.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    try:
        device = input_device(model)
        out = model.generate(input_ids=tokens.to(device), attention_mask=mask.to(device))  # type: ignore[operator]
    finally:
        model.generation_config = own
    decoded: Any = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return list(decoded)


def _listed(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
