"""The names of scores, and how the results of attacks are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What each measure is called, wherever it is shown: the words of its key in metrics.json.
NAMES = {
    "nll": "NLL",
    "fact_accuracy": "fact accuracy",
    "exact_memorization": "exact memorization",
    "extraction_strength": "extraction strength",
    "rouge_l_recall": "ROUGE-L recall",
    "rouge_l_f1": "ROUGE-L F1",
    "routing_shift.changed": "routing shift",
}
# What a reader compares first, and which way is better.
SCORES = {
    "muse.verbmem": "MUSE VerbMem, 0 to 100 (low: forgotten)",
    "muse.knowmem_forget": "MUSE KnowMem on forget, 0 to 100 (low: forgotten)",
    "muse.privleak": "MUSE PrivLeak, from -100 (near 0: as if never seen)",
    "muse.knowmem_retain": "MUSE utility, KnowMem on retain, 0 to 100 (high: kept)",
    "tofu.forget_quality": "TOFU forget quality, p-value (high: as if never seen)",
    "tofu.forget.truth_ratio": "TOFU truth ratio on forget, 0 to 1 (high: forgotten)",
    "tofu.model_utility": "TOFU model utility, 0 to 1 (high: kept)",
}


def is_main(name: str) -> bool:
    """Whether a score is one that a reader compares first."""
    return name in SCORES or (name.startswith("lm_eval.") and ".parts." not in name)


def score_title(name: str) -> str:
    """What a score is called in a table."""
    if name.startswith("lm_eval.") and name.endswith(".acc"):
        return f"{name.removeprefix('lm_eval.').removesuffix('.acc')}, accuracy by lm-eval"
    return SCORES.get(name, name)


def conditions(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The measures of one model under each attack, by what was done, flat: relearn by its last step."""
    rows: dict[str, Mapping[str, Any]] = {"not attacked": found["unattacked"]}
    if "relearn" in found:
        last = found["relearn"]["curve"][-1]
        rows[f"relearned, {last['step']} steps"] = last
    for task, result in found.items():
        if task.startswith("quantize_"):
            rows[f"{task.removeprefix('quantize_')} bits"] = result
    for way, result in found.get("reroute", {}).items():
        rows[f"without {way} experts"] = result
    return rows
