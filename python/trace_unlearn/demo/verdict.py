"""What a comparison amounts to, in plain sentences that follow from its numbers alone; the first one is the verdict.

NLL of the adjacent facts decides, since it moves with every fact, while accuracy moves with those on the edge.
"""

from __future__ import annotations

from trace_unlearn.demo.compare import CONTROL, STRONG, TRACE, UNIFORM, Comparison, Difference

DECIDES = "A_nll"
OTHERS = {"N": "neighbours (N), of which the retain set has nothing", "R": "held-out facts of other domains (R)"}


def sentences(comparison: Comparison, strength: float) -> list[str]:
    """The verdict, what it stands on, what it cost, and what a retain weight `strength` times as large does."""
    pairs = comparison.differences[DECIDES]
    if not ((TRACE, UNIFORM) in pairs and (TRACE, CONTROL) in pairs):
        return ["No claim: no model forgot enough in every arm to compare them."]
    told = [_verdict(comparison), _numbers(comparison)]
    if comparison.models > 1:
        told.append(_elsewhere(comparison))
        told.append(_sensitivity(comparison))
    if (STRONG, UNIFORM) in pairs:
        told.append(_stronger(comparison, strength))
    return told


def _verdict(comparison: Comparison) -> str:
    over_uniform, over_control = (comparison.differences[DECIDES][TRACE, other] for other in (UNIFORM, CONTROL))
    if comparison.models == 1:
        return "No claim: one model cannot tell a gain from noise. Six models can."
    if not over_uniform.beyond_noise:
        return "No claim either way: the noise is larger than the difference between TRACE and uniform weights."
    if over_uniform.mean > 0:
        return "TRACE's weights kept less of the adjacent facts (A) than uniform weights, at equal forgetting."
    if not (over_control.beyond_noise and over_control.mean < 0):
        return (
            "TRACE's weights kept more of the adjacent facts (A) than uniform weights, at equal forgetting, but they "
            "are not told apart from the control, the same weights on random documents: no claim that routing does it."
        )
    return (
        "TRACE's weights kept more of the adjacent facts (A), at equal forgetting, than uniform weights and than the "
        "control, the same weights on random documents."
    )


def _numbers(comparison: Comparison) -> str:
    parts = []
    for other in (UNIFORM, CONTROL):
        accuracy, nll = (comparison.differences[measure][TRACE, other] for measure in ("A_accuracy", "A_nll"))
        parts.append(f"against {other}: accuracy {accuracy}, NLL {nll}")
    models = f"{comparison.models} model{'s' if comparison.models > 1 else ''}"
    intervals = "mean [95 % interval], " if comparison.models > 1 else ""
    return f"On A, TRACE {'; '.join(parts)} ({intervals}{models})."


def _elsewhere(comparison: Comparison) -> str:
    parts = []
    for group, who in OTHERS.items():
        difference = comparison.differences[f"{group}_accuracy"][TRACE, UNIFORM]
        parts.append(f"on {who}, accuracy {difference}: {_word(difference)}")
    return f"Elsewhere, against uniform weights: {'; '.join(parts)}."


def _word(difference: Difference) -> str:
    if not difference.beyond_noise:
        return "not told apart"
    return "more" if difference.mean > 0 else "less"


def _sensitivity(comparison: Comparison) -> str:
    accuracy, nll = (comparison.differences[m][TRACE, UNIFORM].smallest_seen for m in ("A_accuracy", "A_nll"))
    assert accuracy is not None
    assert nll is not None
    return (
        f"With the noise of these models, 8 of 10 such runs would show a difference on A of {accuracy:.3f} in accuracy "
        f"or {nll:.3f} nats; smaller ones are mostly missed."
    )


def _stronger(comparison: Comparison, strength: float) -> str:
    differences = {group: comparison.differences[f"{group}_accuracy"][STRONG, UNIFORM] for group in "ANR"}
    parts = ", ".join(f"{group} {difference}" for group, difference in differences.items())
    models = "1 model" if len(differences["A"].values) == 1 else f"{len(differences['A'].values)} models"
    steps = comparison.differences["step"][STRONG, UNIFORM].mean
    return (
        f"A retain weight {strength:g} times as large, with uniform weights, does this by itself: accuracy of {parts} "
        f"({models}, {steps:+.0f} steps). Set it before you judge what the weights add."
    )
