"""The README.md of an unlearned model: what was done to it, from which data, and how far to trust it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_unlearn import files
from trace_unlearn.evaluation.scores import conditions, is_main, score_title
from trace_unlearn.reporting.page import flatten, scalars, show
from trace_unlearn.sources.records import HUB_NAME, SUFFIXES

FORGETTING = {
    "grad_diff": "minus the mean negative log-likelihood of the forget tokens (gradient difference)",
    "grad_ascent": "minus the mean negative log-likelihood of the forget tokens (gradient ascent), and no retain loss",
    "npo": "NPO, -(2/beta) log sigmoid(-beta log(p / p_ref)), the mean over forget documents",
    "simnpo": "SimNPO, -(2/beta) log sigmoid(beta (mean token NLL - delta)), the mean over forget documents",
    "dpo": "DPO, which prefers the alternate answer to the forgotten one",
    "wga": "WGA, minus the token NLL weighted by p^beta",
    "satimp": "SatImp, minus the token NLL weighted by p^beta (1 - p)^beta2",
    "ce_u": "CE-U, the cross-entropy to the model's own distribution without the true token",
    "undial": "UNDIAL, the KL divergence from the original model's distribution with the true logit lowered by beta",
    "rmu": "RMU, the distance of a layer's hidden states from a fixed random direction",
}
KNOBS = {
    **dict.fromkeys(("npo", "dpo", "wga", "undial"), ("beta",)),
    "simnpo": ("beta", "delta"),
    "satimp": ("beta", "beta2"),
    "rmu": ("layer", "steering"),
}
RETAINING = {
    "nll": "the token-weighted mean negative log-likelihood of the retain tokens",
    "kl": "the token-weighted mean KL divergence from the original model on the retain tokens",
}
MEASURES = {
    "exact_memorization": "tokens recited",
    "fact_accuracy": "fact accuracy",
    "rouge_l_f1": "ROUGE-L F1",
    "nll": "NLL, nats a token",
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


def model_card(run_facts: Mapping[str, Any]) -> str:
    """The card as Markdown with Hugging Face's front matter. It names data by file name and digest, and shows none.

    Args:
        run_facts: what trace.json records: `method`, `options`, `config`, `calibration`, `experts`, `steps`,
            `versions`, and the data's fingerprints; and where there are any `evaluation` and `attacks`, what evaluate
            and attack wrote. All of them may be absent.

    >>> card = model_card({"options": {"model": "owner/moe", "objective": "npo"}, "steps": 60})
    >>> card.splitlines()[:3]
    ['---', 'library_name: transformers', 'pipeline_tag: text-generation']
    >>> "base_model: owner/moe" in card
    True
    """
    facts: dict[str, Any] = json.loads(files.to_json(run_facts))
    options, config = facts.get("options") or {}, facts.get("config") or {}
    objective = config.get("objective") or options.get("objective") or "unknown"
    base = str(options.get("model") or "unknown")
    tuned = objective == "finetune"
    parts = [
        _front_matter(base, options, tuned),
        f"# {_name(base)}, {'fine-tuned' if tuned else 'unlearned'}\n",
        _opening(base, facts, tuned),
        _method(objective, config, facts),
        _checkpoint(facts.get("best"), config),
        _calibration(facts.get("calibration")),
        _data(facts, options),
        _evaluation(facts.get("evaluation"), base),
        _attacks(facts.get("attacks")),
        LIMITS,
        _choices(facts, options),
    ]
    return "\n".join(part for part in parts if part)


def write_evaluated(model: Path, run: Path) -> None:
    """Writes the card of the checkpoint folder `model` anew, with what evaluate and attack wrote into `run`."""
    facts = files.read_json(model / "trace.json")
    for name, file in (("evaluation", "metrics.json"), ("attacks", "attacks.json")):
        if (run / file).is_file():
            facts[name] = files.read_json(run / file)
    card, path = model_card(facts), model / "README.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != card:
        files.write_text(path, card)


def _front_matter(base: str, options: Mapping[str, Any], tuned: bool) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if _on_hub(base) else []
    data = [str(options[name]) for name in ("forget", "retain") if _on_hub(options.get(name))]
    if data:
        lines += ["datasets:", *(f"- {source.partition(':')[0]}" for source in dict.fromkeys(data))]
    lines += ["tags:", "- trace-kernels", "- mixture-of-experts", *([] if tuned else ["- machine-unlearning"])]
    return "\n".join([*lines, "---", ""])


def _opening(base: str, facts: Mapping[str, Any], tuned: bool) -> str:
    made = "was fine-tuned" if tuned else "was made to forget some of its training data"
    steps = f" in {facts['steps']:,} steps" if isinstance(facts.get("steps"), int) else ""
    version = (facts.get("versions") or {}).get("trace_kernels")
    tool = f"trace-unlearn {version}" if version else "trace-unlearn"
    told = "`trace.json` beside this file has every choice and the whole log."
    return f"`{_name(base)}` {made}{steps}, by {tool}. {told}\n"


def _method(objective: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    lines = ["## Method\n"]
    if objective == "finetune":
        return "\n".join([*lines, "Plain fine-tuning: the mean negative log-likelihood of the data.\n"])
    if objective not in FORGETTING:
        return ""
    retained = RETAINING.get(config.get("retain_loss", "nll"), "")
    if objective == "rmu":
        retained = "the token-weighted distance of that layer's hidden states on the retain set from the original ones"
    knobs = ", ".join(f"{name} {config[name]}" for name in KNOBS.get(objective, ()) if config.get(name) is not None)
    lines.append(f"loss = {config.get('gamma', 1.0)} x forget loss + {config.get('alpha', 1.0)} x retain loss, with\n")
    lines.append(f"- forget loss: {FORGETTING[objective]}{f' ({knobs})' if knobs else ''};")
    if objective != "grad_ascent":
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
    limit = f"{config.get('best_forget_nll')} nats a token on the forget documents"
    rule = (
        f"of the checkpoints with a mean loss of at least {limit}, the one with the lowest on held-out retain documents"
    )
    if not best["reached"]:
        rule = f"no checkpoint came to a mean loss of {limit}, and this is the one that came closest"
    rows = [
        [f"{name}, nats a token", best[f"original_{measure}"], best[measure]]
        for name, measure in (("forget documents", "forget_nll"), ("held-out retain documents", "retain_nll"))
    ]
    return (
        f"## Which checkpoint\n\nThe model after {best['step']:,} of {best['trained_steps']:,} steps: {rule}.\n\n"
        + _table(["", "original model", "this model"], rows)
    )


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if not calibration:
        return ""
    told = {
        "rule": calibration.get("rule"),
        "effective sample size": calibration.get("ess"),
        "largest weight allowed": calibration.get("max_weight"),
        "forget-critical experts a layer, at most": calibration.get("experts_per_layer"),
        "SHA-256 of the calibration": calibration.get("sha256"),
    }
    return (
        "## Calibration\n\nTRACE: each retain token weighs by the experts that it uses, so that the weighted retain "
        "set uses the experts which the forget set prefers as much as the forget set does.\n\n"
        + _table(["", ""], [[name, value] for name, value in told.items() if value is not None])
    )


def _data(facts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    rows = [
        [name, _name(str(options.get(name))), facts[f"{name}_fingerprint"]]
        for name in ("forget", "retain", "alternate", "retain_eval")
        if facts.get(f"{name}_fingerprint")
    ]
    if not rows:
        return ""
    return "## Data\n\nNone of it is in this repository. The digests are of its tokens and labels.\n\n" + _table(
        ["set", "name", "SHA-256"], rows
    )


def _evaluation(metrics: Mapping[str, Any] | None, base: str) -> str:
    if not metrics:
        return "## Evaluation\n\nNone is recorded here. `trace-unlearn evaluate` measures this model.\n"
    checkpoints = metrics["checkpoints"]
    *before, _ = checkpoints
    columns = ["base" if name == base else _name(name) for name in before] + ["this model"]
    rows: list[list[Any]] = [
        [f"{data}: {title}", *(found.get(data, {}).get(measure) for found in checkpoints.values())]
        for data in dict.fromkeys(data for found in checkpoints.values() for data in found)
        for measure, title in MEASURES.items()
    ]
    scores = [flatten(scalars(metrics.get("suites", {}).get(name, {}))) for name in checkpoints]
    main = [name for name in dict.fromkeys(name for found in scores for name in found) if is_main(name)]
    rows += [[score_title(name), *(found.get(name) for found in scores)] for name in main]
    kept = [row for row in rows if any(cell is not None for cell in row[1:])]
    return "## Evaluation\n\n" + _table(["", *columns], kept)


def _attacks(attacks: Mapping[str, Any] | None) -> str:
    if not attacks or not attacks.get("models"):
        return ""
    found = next(iter(attacks["models"].values()))
    rows = []
    for label, measures in conditions(found).items():
        forget, retain = measures["forget"], measures["retain"]
        rows.append([label, forget["exact_memorization"], forget["nll"], retain["exact_memorization"]])
    columns = ["", "forget: tokens recited", "forget: NLL, nats a token", "retain: tokens recited"]
    return "## Under attack\n\n" + _table(columns, rows)


def _choices(facts: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    paths = ("model", "forget", "retain", "alternate", "retain_eval", "calibration", "profile")
    told = {name: _name(str(value)) if name in paths else value for name, value in options.items() if value is not None}
    if "steps" in told:
        told.pop("epochs", None)  # steps, where given, decide
    flat = flatten({**told, "versions": facts.get("versions") or {}})
    rows = [[name, value] for name, value in flat.items() if value != "" and not name.endswith("token")]
    if not rows:
        return ""
    return f"<details><summary>Every choice</summary>\n\n{_table(['option', 'value'], rows)}\n</details>\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([show(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _on_hub(source: Any) -> bool:
    if not isinstance(source, str) or not HUB_NAME.fullmatch(source):
        return False
    return not Path(source).exists() and not source.endswith(SUFFIXES)


def _name(source: str) -> str:
    """A hub name, or the last part of a path: where it lay is nobody's business."""
    return source if _on_hub(source) else Path(source).name or source
