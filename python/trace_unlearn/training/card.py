"""The README.md of an unlearned model: what was done to it, from which data, and how far to trust it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from trace_unlearn import files
from trace_unlearn.sources.records import HUB_NAME, SUFFIXES
from trace_unlearn.training.objectives import OBJECTIVES
from trace_unlearn.values import flatten, markdown_table

UNJUDGED = "Whether this model has forgotten is not measured yet."
UNMEASURED = "## Evaluation\n\nNone is recorded here. `trace-unlearn evaluate` measures this model.\n"
RETAINING = {
    "nll": "the token-weighted mean negative log-likelihood of the retain tokens",
    "kl": "the token-weighted mean KL divergence from the original model on the retain tokens",
}
LIMITS = """\
## Limits

- Forgetting is measured, not proven. What the measures above do not ask for may still be there.
- Whoever has the weights can train on them. A few steps on related text bring back more than prompts show, and
  quantising can too. `trace-unlearn attack` measures both, and what other experts still hold.
- What resembles the forgotten data and is not in the retain set may be lost with it. Measure what you need before you
  use this model in place of its base.
- This is no evidence that a legal duty to erase data is met.
- The licence and the limits of the base model hold here too.
"""


def training_card(run_facts: Mapping[str, Any], measured: str = UNMEASURED, verdict: str = "") -> str:
    """The card as Markdown with Hugging Face's front matter. It names data by file name and digest, and shows none.

    Args:
        run_facts: what trace.json records: `method`, `options`, `config`, `calibration`, `experts`, `steps`,
            `versions`, and the data's fingerprints. All of them may be absent.
        measured: the sections about what the model does.
        verdict: a sentence that says whether it has forgotten; by default that nobody has measured it.

    >>> card = training_card({"options": {"model": "owner/moe", "method.objective": "npo"}, "steps": 60})
    >>> card.splitlines()[:3]
    ['---', 'base_model: owner/moe', 'library_name: transformers']
    """
    facts: dict[str, Any] = json.loads(files.to_json(run_facts))
    options, config = facts.get("options") or {}, facts.get("config") or {}
    objective = config.get("objective") or options.get("method.objective") or "unknown"
    base = str(options.get("model") or "unknown")
    tuned = objective == "finetune"
    parts = [
        _front_matter(base, options, tuned),
        f"# {short_name(base)}, {'fine-tuned' if tuned else 'unlearned'}\n",
        "" if tuned else f"**{verdict or UNJUDGED}**\n",
        _opening(base, facts, tuned),
        _method(objective, config, facts),
        _checkpoint(facts.get("best"), config),
        _calibration(facts.get("calibration")),
        _data(facts, options),
        measured,
        LIMITS,
        _choices(facts, options),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(base: str, options: Mapping[str, Any], tuned: bool) -> str:
    data = [str(options[name]).partition(":")[0] for name in ("forget", "retain") if on_hub(options.get(name))]
    facts = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base if on_hub(base) else None,
        datasets=list(dict.fromkeys(data)) or None,
        tags=["trace-kernels", "mixture-of-experts", *([] if tuned else ["machine-unlearning"])],
    )
    return f"---\n{facts.to_yaml()}\n---\n"


def _opening(base: str, facts: Mapping[str, Any], tuned: bool) -> str:
    made = "was fine-tuned" if tuned else "was trained to forget some of its training data"
    steps = f" in {facts['steps']:,} steps" if isinstance(facts.get("steps"), int) else ""
    version = (facts.get("versions") or {}).get("trace_kernels")
    tool = f"trace-unlearn {version}" if version else "trace-unlearn"
    told = "`trace.json` beside this file has every choice and the whole log."
    return f"`{short_name(base)}` {made}{steps}, by {tool}. {told}\n"


def _method(objective: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = ["## Method\n"]
    if objective == "finetune":
        return "\n".join([*lines, "Plain fine-tuning: the mean negative log-likelihood of the data.\n"])
    if objective not in OBJECTIVES:
        return ""
    retained = RETAINING.get(config.get("retain_loss", "nll"), "")
    if objective == "rmu":
        retained = "the token-weighted distance of that layer's hidden states on the retain set from the original ones"
    knobs = ", ".join(f"{name} {config[name]}" for name in OBJECTIVES[objective].knobs if config.get(name) is not None)
    lines.append(f"loss = {config.get('gamma', 1.0)} x forget loss + {config.get('alpha', 1.0)} x retain loss, with\n")
    lines.append(f"- forget loss: {OBJECTIVES[objective].formula}{f' ({knobs})' if knobs else ''};")
    if OBJECTIVES[objective].uses_retain:
        lines.append(f"- retain loss: {retained}.")
    if config.get("anchor"):
        lines.append(f"- and {config['anchor']} x SEUF's anchor, which keeps forget tokens on chosen experts.")
    experts = facts.get("experts") or []
    if experts:
        named = ", ".join(f"{layer}.{expert}" for layer, expert in experts[:20])
        more = f" and {len(experts) - 20} more" if len(experts) > 20 else ""
        lines.append(f"- Only these experts (layer.expert) and their routers were trained: {named}{more}.")
    return "\n".join([*lines, ""])


def _checkpoint(best: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    if not best:
        return ""
    limit = f"{config.get('best_forget_nll')} nats per token on the forget documents"
    rule = (
        f"of the checkpoints with a mean loss of at least {limit}, the one with the lowest on held-out retain documents"
    )
    if not best["reached"]:
        rule = f"no checkpoint came to a mean loss of {limit}, and this is the one that came closest"
    rows = [
        [f"{name}, nats per token", best[f"original_{measure}"], best[measure]]
        for name, measure in (("forget documents", "forget_nll"), ("held-out retain documents", "retain_nll"))
    ]
    return (
        f"## Which checkpoint\n\nThe model after {best['step']:,} of {best['trained_steps']:,} steps: {rule}.\n\n"
        + markdown_table(["", "original model", "this model"], rows)
    )


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if not calibration:
        return ""
    told = {
        "rule": calibration.get("rule"),
        "unit of a weight": calibration.get("unit"),
        "effective sample size": calibration.get("ess"),
        "effective sample size of the units": calibration.get("unit_ess"),
        "largest weight allowed": calibration.get("max_weight"),
        "forget-critical experts per layer, at most": calibration.get("experts_per_layer"),
        "SHA-256 of the calibration": calibration.get("sha256"),
    }
    return (
        "## Calibration\n\nTRACE: each retain token weighs by the experts that it uses, so that the weighted retain "
        "set uses the experts which the forget set prefers as much as the forget set does.\n\n"
        + markdown_table(["", ""], [[name, value] for name, value in told.items() if value is not None])
    )


def _data(facts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    rows = [
        [name, short_name(str(options.get(name))), facts[f"{name}_fingerprint"]]
        for name in ("forget", "retain", "alternate", "retain_eval")
        if facts.get(f"{name}_fingerprint")
    ]
    if not rows:
        return ""
    return (
        "## Data\n\nNone of it is in this repository. The digests are of its tokens and labels.\n\n"
        + markdown_table(["set", "name", "SHA-256"], rows)
    )


def _choices(facts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    paths = ("model", "forget", "retain", "alternate", "retain_eval", "calibration", "profile")
    told = {
        name: short_name(str(value)) if name in paths else value for name, value in options.items() if value is not None
    }
    if options.get("training.max_steps", -1) > 0:
        told.pop("training.num_train_epochs", None)  # steps, where given, decide
    flat = flatten({**told, "versions": facts.get("versions") or {}})
    rows = [[name, value] for name, value in flat.items() if value != "" and not name.endswith("token")]
    if not rows:
        return ""
    return f"<details><summary>Every choice</summary>\n\n{markdown_table(['option', 'value'], rows)}\n</details>\n"


def on_hub(source: Any) -> bool:
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source):
        return False
    return not Path(source).exists() and not source.endswith(SUFFIXES)


def short_name(source: str) -> str:
    """A hub name, or the last part of a path: where it lay is nobody's business."""
    return source if on_hub(source) else Path(source).name or source
