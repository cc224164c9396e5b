"""The verdict at its boundaries, and that it stands at the top wherever results are read."""

import math

import pytest

from trace_unlearn.evaluation.verdict import verdict, verdicts


def facts(accuracy, nll=1.0):
    return {"nll": nll, "fact_accuracy": accuracy, "exact_memorization": 0.9}


def text(nll, recited=None):
    return {"nll": nll, **({} if recited is None else {"exact_memorization": recited})}


@pytest.mark.parametrize(
    ("before", "after", "forgotten"),
    [
        (facts(1.0), facts(1.0), "no"),
        (facts(1.0), facts(0.901), "no"),
        (facts(1.0), facts(0.9), "partly"),
        (facts(1.0), facts(0.501), "partly"),
        (facts(1.0), facts(0.5), "yes"),
        (facts(0.6), facts(0.3), "yes"),  # of what it knew
        (facts(0.3), facts(0.3 * 0.9), "partly"),
        (facts(0.1), facts(0.0), "yes"),
        (facts(0.0, 3.0), facts(0.0, 3.05), "no"),  # no fact was known: the NLL decides
        (facts(0.05, 3.0), facts(0.0, 4.5) | {"exact_memorization": 0.2}, "yes"),
        (text(2.0), text(2.099), "no"),
        (text(2.0), text(2.1), "partly"),
        (text(2.0), text(2.999), "partly"),
        (text(2.0), text(3.0), "yes"),
        (text(0.1, 1.0), text(1.1, 0.51), "partly"),  # most of it is still recited
        (text(0.1, 1.0), text(1.1, 0.5), "yes"),
        (text(2.0), text(1.0), "no"),  # known better than before
    ],
)
def test_forgotten(before, after, forgotten):
    kept = text(1.0)
    assert verdict({"forget": before, "retain": kept}, {"forget": after, "retain": kept}).forgotten == forgotten


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (facts(1.0), facts(0.9), "yes"),
        (facts(1.0), facts(0.899), "partly"),
        (facts(1.0), facts(0.501), "partly"),
        (facts(1.0), facts(0.5), "no"),
        (facts(0.5), facts(0.7), "yes"),
        (text(2.0), text(2.1), "yes"),
        (text(2.0), text(2.101), "partly"),
        (text(2.0), text(2.999), "partly"),
        (text(2.0), text(3.0), "no"),
        (text(2.0), text(1.0), "yes"),
    ],
)
def test_kept(before, after, kept):
    gone = text(9.0)
    assert verdict({"forget": text(1.0), "retain": before}, {"forget": gone, "retain": after}).kept == kept


@pytest.mark.parametrize("broken", [None, math.nan, math.inf])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_a_model_that_gives_no_numbers_is_no_success(name, broken):
    before = {"forget": text(1.0), "retain": text(1.0)}
    found = verdict(before, {"forget": text(9.0), "retain": text(1.0)} | {name: text(broken)})
    assert (found.forgotten, found.kept) == ("no", "no")
    assert "DIVERGED" in found.sentence
    assert "learning rate" in found.sentence


@pytest.mark.parametrize(
    ("forget", "retain", "start", "knob"),
    [
        (1.0, 1.0, "NOT FORGOTTEN", "learning rate"),
        (0.8, 1.0, "PARTLY FORGOTTEN", "steps"),
        (0.0, 0.4, "Forgotten", "alpha"),
        (1.0, 0.4, "NOT FORGOTTEN", "objective"),
    ],
)
def test_the_sentence_names_what_to_change(forget, retain, start, knob):
    base = {"forget": facts(1.0), "retain": facts(1.0)}
    sentence = verdict(base, {"forget": facts(forget), "retain": facts(retain)}).sentence
    assert sentence.startswith(start)
    assert knob in sentence
    assert f"fact accuracy 1.000 -> {forget:.3f}" in sentence


def test_a_success_asks_for_no_change():
    base = {"forget": facts(1.0), "retain": facts(1.0)}
    found = verdict(base, {"forget": facts(0.1), "retain": facts(0.95)})
    assert (found.forgotten, found.kept) == ("yes", "yes")
    assert ";" not in found.sentence


def test_there_is_no_verdict_without_a_base_to_compare_with():
    measured = {"forget": text(1.0), "retain": text(1.0)}
    assert verdicts({"model": measured}, None) == {}
    assert verdicts({"model": measured}, "base") == {}
    assert list(verdicts({"base": measured, "model": measured}, "base")) == ["model"]
