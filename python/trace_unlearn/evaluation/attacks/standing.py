"""What a model knows of some data, quickly measured."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.attacks.reroute import Around
from trace_unlearn.evaluation.likelihood import log_likelihood
from trace_unlearn.evaluation.measure import evaluating


def standing(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    sets: Mapping[str, datasets.Dataset],
    *,
    batch_size: int = 8,
    around: Around | None = None,
    label: str = "",
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """What a model knows of each data set, from teacher-forced passes alone.

    Returns:
        For each: nll, exact_memorization, extraction_strength and, of data with answers, fact_accuracy: see
        `evaluate_model`.
    """
    found: dict[str, dict[str, float]] = {}
    with evaluating(model):
        for name, data in sets.items():
            seen = log_likelihood(
                model,
                data,
                batch_size=batch_size,
                recited=True,
                eos=tokenizer.eos_token_id,
                around=around,
                label=f"{label}, {name}" if label else name,
                progress=progress,
            )
            if seen.exact_memorization is None or seen.extraction_strength is None:
                raise UserError(f"{name}: nothing in it can be recited: only end-of-sequence tokens bear loss")
            found[name] = {
                "nll": seen.nll,
                "exact_memorization": seen.exact_memorization,
                "extraction_strength": seen.extraction_strength,
            }
            if seen.fact_accuracy is not None:
                found[name]["fact_accuracy"] = seen.fact_accuracy
    return found
