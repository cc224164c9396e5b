"""The model card: complete, without data and without paths."""

import json

import pytest

from trace_unlearn import files
from trace_unlearn.reporting.model_card import model_card, write_evaluated
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.objectives import OBJECTIVES

FACTS = {
    "method": "TRACE",
    "options": {
        "model": "/home/me/secret/moe",
        "forget": "/home/me/secret/forget.jsonl",
        "retain": "owner/data:config",
        "objective": "npo",
        "learning_rate": 1e-5,
        "training": {"hub_token": "hf_x", "adam_beta2": 0.95},
    },
    "config": TraceConfig(objective="npo", alpha=8.0),
    "calibration": {"sha256": "a" * 64, "rule": "balance", "ess": 0.5, "max_weight": 20.0},
    "forget_fingerprint": "b" * 64,
    "retain_fingerprint": "c" * 64,
    "experts": [[3, 17]],
    "versions": {"trace_kernels": "9.9", "torch": "2.13"},
    "steps": 1200,
}


def front_matter(card):
    """Of simple lists and strings, as written here."""
    lines = card.split("---\n")[1].splitlines()
    found, last = {}, ""
    for line in lines:
        if line.startswith("- "):
            found[last].append(line[2:])
        else:
            last, _, value = line.partition(": ") if ": " in line else (line.rstrip(":"), "", "")
            found[last] = value or []
    return found


def test_a_card_says_what_was_done_and_shows_no_path_and_no_secret():
    card = model_card(FACTS)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["owner/data"],
        "tags": ["trace-kernels", "mixture-of-experts", "machine-unlearning"],
    }
    for text in (
        "# moe, unlearned",
        "in 1,200 steps, by trace-unlearn 9.9",
        "NPO, -(2/beta) log sigmoid(-beta log(p / p_ref)), the mean over forget documents (beta 0.1)",
        "8.0 x retain loss",
        "| SHA-256 of the calibration | " + "a" * 64,
        "| forget | forget.jsonl | " + "b" * 64,
        "| retain | owner/data:config | " + "c" * 64,
        "were trained: 3.17.",
        "| learning_rate | 1e-05 |",
        "| training.adam_beta2 | 0.950 |",
        "## Limits",
    ):
        assert text in card, text
    for text in ("/home", "secret", "hf_x", "None"):
        assert text not in card.replace("None of it is", "").replace("None is recorded", ""), text


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "finetune"])
def test_every_objective_is_told_in_words(objective):
    card = model_card({"config": {"objective": objective}})
    assert OBJECTIVES[objective].formula in card
    assert ("retain loss: " in card) == OBJECTIVES[objective].uses_retain


def test_a_fine_tuned_model_has_forgotten_nothing():
    card = model_card({"options": {"model": "owner/moe"}, "config": {"objective": "finetune"}})
    assert "machine-unlearning" not in card
    assert "forget loss" not in card
    assert front_matter(card)["base_model"] == "owner/moe"


def test_nothing_known_is_a_card_all_the_same():
    assert "## Limits" in model_card({})


def test_the_evaluation_is_put_in_once_it_is_there(tmp_path):
    files.write_json(tmp_path / "model" / "trace.json", FACTS)
    write_evaluated(tmp_path / "model", tmp_path)
    assert "None is recorded here" in (tmp_path / "model" / "README.md").read_text()
    before = {"forget": {"nll": 0.5, "exact_memorization": 0.9}}
    after = {"forget": {"nll": 4.0, "exact_memorization": 0.125}}
    metrics = {"checkpoints": {"/home/me/secret/moe": before, "run/model": after}, "suites": {}, "choices": {}}
    metrics["suites"]["run/model"] = {"muse": {"verbmem": 7.5, "min_k_auc": 0.25}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    write_evaluated(tmp_path / "model", tmp_path)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "|  | base | this model |" in card
    assert "| forget: exact memorization | 0.900 | 0.125 |" in card
    assert "| MUSE VerbMem, 0 to 100 (low: forgotten) | – | 7.500 |" in card
    assert "min_k_auc" not in card
    written = (tmp_path / "model" / "README.md").stat().st_mtime_ns
    write_evaluated(tmp_path / "model", tmp_path)
    assert (tmp_path / "model" / "README.md").stat().st_mtime_ns == written
