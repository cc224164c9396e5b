"""The verb `profile`: which experts the forget and the retain data activate in the model as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from trace_unlearn import files
from trace_unlearn.checks import check_integers, check_word
from trace_unlearn.routing.profile import profile_routing
from trace_unlearn.routing.statistics import DEFAULT_UNIT, UNITS
from trace_unlearn.sources.data import asked, check_disjoint, check_positions, check_template, load_tokens
from trace_unlearn.sources.encoding import DATE
from trace_unlearn.sources.folder import refuse_inside
from trace_unlearn.sources.model import check_inputs, check_placement, load_model, load_tokenizer

MAKES = "profile"
PLACES = ("model", "forget", "retain", "output")


@dataclass
class ProfileOptions:
    r"""Counts which experts of a model the forget and the retain data activate.

    Args:
        model: a checkpoint folder or hub name of a Mixture-of-Experts language model.
        forget: the data to forget: a .jsonl, .json, .txt or .parquet file, or a hub name "owner/name[:config]".
        retain: the data whose behaviour must stay.
        output: the folder to write; must not exist.
        max_length: the most tokens of a document; longer texts are cut into windows.
        question_template: the prompt of question/answer records, with {question} in it; by default the tokenizer's chat
            template, or "Question: {question}\\nAnswer:" where it has none.
        forget_limit: use only that many forget documents.
        retain_limit: use only that many retain documents.
        batch_size: documents a forward.
        unit: that of `calibrate`: "context" also stores the routes of the prompts, which its weights look at.
        dtype: of the model's weights: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
        device: such as "cuda", "cuda:1" or "cpu"; by default a GPU where there is one.
    """

    model: str
    forget: str
    retain: str
    output: str = "profile"
    max_length: int = 512
    question_template: str | None = None
    forget_limit: int | None = None
    retain_limit: int | None = None
    batch_size: int = 8
    unit: str = DEFAULT_UNIT
    dtype: str = "auto"
    device: str | None = None


def check(options: ProfileOptions) -> None:
    """UserError for what can be told from the options alone."""
    check_integers(options, batch_size=1, max_length=2, forget_limit=1, retain_limit=1)
    refuse_inside(options.output, options.model)
    check_word("unit", options.unit, UNITS)
    check_placement(options.dtype, options.device)
    check_template(options.question_template)


def main(options: ProfileOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: loads, profiles, writes the folder `options.output`."""
    check(options)
    files.refuse_existing(options.output)
    say(f"profile: {options.model} on {options.forget} (forget) and {options.retain} (retain) -> {options.output}")
    config = check_inputs(options.model)
    tokenizer = load_tokenizer(options.model, config)
    read = functools.partial(load_tokens, tokenizer=tokenizer, max_length=options.max_length)
    read = functools.partial(read, question_template=options.question_template)
    forget, retain = read(options.forget, limit=options.forget_limit), read(options.retain, limit=options.retain_limit)
    check_positions(config, forget=forget, retain=retain)
    if (prompt := asked(forget, retain)) is not None:
        say(f"questions are asked as {prompt!r}")
    overlap = check_disjoint(forget, retain)  # before the model is loaded
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    names = ("model", "forget", "retain", "max_length", "retain_limit", "question_template")
    source = {name: getattr(options, name) for name in names}
    source |= {"asked": prompt, "date_string": DATE.strftime("%d %b %Y")}
    stats = profile_routing(
        model,
        forget,
        retain,
        batch_size=options.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        output=options.output,
        source=source,
        overlap=overlap,
        unit=options.unit,
    )
    say(
        f"{stats.forget_tokens} forget and {stats.retain_tokens} retain tokens, {stats.forget_counts.shape[0]} MoE "
        f"layers of {stats.forget_counts.shape[1]} experts, {stats.top_k} a token; written to {options.output}"
    )
