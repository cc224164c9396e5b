"""Suites on tiny models: against plain logits, hand-made texts, and lm-eval itself where it is installed."""

import json
import math
import re

import pytest
import tiny
import torch

from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.measure import measure_suites
from trace_unlearn.evaluation.metrics import auc, harmonic_mean, ks_p_value
from trace_unlearn.evaluation.predictions import RowScores
from trace_unlearn.evaluation.suites import muse, open_suites, tofu
from trace_unlearn.verbs import cli

WORDS = tiny.tokenizer()


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


@pytest.fixture
def muse_data(tmp_path):
    folder = tmp_path / "muse"
    write(
        folder / "verbmem" / "forget.json",
        [{"prompt": "w1 w2 w3", "gt": " ".join(f"w{i % 50}" for i in range(200))}, {"prompt": "w4", "gt": "w5 w6"}],
    )
    for name in ("forget", "retain"):
        write(
            folder / "knowmem" / f"{name}_qa.json", [{"question": f"who is the owner of {name} ?", "answer": "w7 w8"}]
        )
        shots = [{"question": f"what is w{i} ?", "answer": f"w{i}"} for i in range(2)]
        write(folder / "knowmem" / f"{name}_qa_icl.json", shots)
    held_out = [{"text": " ".join(f"w{30 + i - j}" for j in range(8))} for i in range(3)]
    write(folder / "privleak" / "holdout.json", held_out)
    write(folder / "privleak" / "forget.json", [{"text": f"w{i} " * (i + 2)} for i in range(4)])
    return folder


def open_and_read(name, **options):
    suite = open_suites({name: options})[name]
    suite.read(WORDS)
    return suite


def nll_of(model, prompt, answer):
    """Per token, the end-of-sequence token included, from plain logits in float64."""
    ids = WORDS(prompt).input_ids
    full = ids + WORDS(answer, add_special_tokens=False).input_ids + [WORDS.eos_token_id]
    log_p = model(input_ids=torch.tensor([full])).logits[0].double().log_softmax(-1)
    return -sum(log_p[t - 1, full[t]].item() for t in range(len(ids), len(full))) / (len(full) - len(ids))


@torch.no_grad()
def test_muse_overlaps_by_hand(muse_data, monkeypatch):
    asked = []

    def say(model, tokenizer, prompts, length, **_):
        asked.append((length, [tokenizer.decode(prompt) for prompt in prompts]))
        return ["w0 w1 w2 w3 nothing", "w6 w5"] if length == 128 else ["w7 w8 w9\n\nQuestion: w8"]

    monkeypatch.setattr(muse, "continuations", say)
    suite = open_and_read("muse", data=str(muse_data))
    found = suite.measure(tiny.model("mixtral", len(WORDS)), WORDS, progress=False)
    long = 2 * 4 / (127 + 5)  # the reference is cut to 128 tokens of its 200 words, <s> being one of them, as there
    assert found["verbmem"] == pytest.approx(100 * (long + 0.5) / 2)
    assert found["knowmem_forget"] == found["knowmem_retain"] == pytest.approx(100 * 2 * 2 / (2 + 3))  # cut at \n\n
    assert [length for length, _ in asked] == [128, 32, 32]
    assert asked[0][1] == ["<s> w1 w2 w3", "<s> w4"]
    shots = "".join(f"Question: what is w{i} ? Answer: w{i} " for i in range(2))  # this tokenizer drops line ends
    assert asked[1][1] == [f"<s> {shots}Question: who is the owner of <unk> ? Answer:"]


@torch.no_grad()
def test_privacy_leakage_from_plain_logits_and_a_reference(muse_data):
    model, other = (tiny.model("qwen3_moe", len(WORDS), seed=seed) for seed in (0, 1))
    suite = open_and_read("muse", data=str(muse_data))
    reference = measure_suites({"muse": suite}, other, WORDS, progress=False)
    found = measure_suites({"muse": suite}, model, WORDS, reference, batch_size=2, progress=False)["muse"]
    scores = {}
    for name in ("forget", "holdout"):
        scores[name] = []
        for record in files.read_json(muse_data / "privleak" / f"{name}.json"):
            ids = WORDS(record["text"]).input_ids
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            lowest = sorted(log_p[t - 1, ids[t]].item() for t in range(1, len(ids)))
            count = max(1, int(0.4 * len(lowest)))
            scores[name].append(-sum(lowest[:count]) / count)
    assert found["min_k"]["forget"] == pytest.approx(scores["forget"], rel=1e-4)
    assert found["min_k"]["holdout"] == pytest.approx(scores["holdout"], rel=1e-4)
    assert found["min_k_auc"] == auc(scores["forget"], scores["holdout"])
    expected = reference["muse"]["min_k_auc"]
    assert found["privleak"] == pytest.approx(100 * (found["min_k_auc"] - expected) / expected)
    given = open_and_read("muse", data=str(muse_data), retrain_auc=0.5)
    assert given.compare(found, None)["privleak"] == pytest.approx(100 * (found["min_k_auc"] - 0.5) / 0.5)
    assert "privleak" not in suite.compare(found, None)


def test_a_forget_set_that_is_remembered_leaks_to_minus_100(muse_data, monkeypatch):
    def score(model, rows, label, **_):
        return [RowScores(torch.tensor([-1.0 if "forget" in label else -5.0]), torch.tensor([False])) for _ in rows]

    monkeypatch.setattr(muse, "row_scores", score)
    monkeypatch.setattr(muse, "continuations", lambda model, tokenizer, prompts, length, **_: [""] * len(prompts))
    suite = open_and_read("muse", data=str(muse_data), retrain_auc=0.5)
    found = suite.measure(None, WORDS, progress=False)
    assert found["min_k_auc"] == 0
    assert suite.compare(found, None)["privleak"] == -100


@pytest.fixture
def tofu_data(tmp_path):
    folder = tmp_path / "tofu"
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        records = [
            {
                "question": f"who is the owner of w{i + len(name)} ?",
                "answer": f"w{i} w{i + 1}",
                "perturbed_answer": [f"w{i + 20} w{i + 4 + k}" for k in range(3)],
            }
            for i in range(3)
        ]
        if name in ("forget10", "retain"):
            records = [{**record, "paraphrased_answer": "the " + record["answer"]} for record in records]
        write(folder / f"{name}_perturbed.json", records)
    return folder


@torch.no_grad()
def test_tofu_from_plain_logits(tofu_data, monkeypatch):
    monkeypatch.setattr(tofu, "continuations", lambda model, tokenizer, prompts, length, **_: ["w0 w9"] * len(prompts))
    model, other = (tiny.model("olmoe", len(WORDS), seed=seed) for seed in (0, 1))
    suite = open_and_read("tofu", data=str(tofu_data))
    reference = measure_suites({"tofu": suite}, other, WORDS, progress=False)
    found = measure_suites({"tofu": suite}, model, WORDS, reference, batch_size=4, progress=False)["tofu"]
    nine = []
    for name in ("forget10", "retain", "real_authors", "world_facts"):
        probability, ratios, overlap = [], [], []
        for record in files.read_json(tofu_data / f"{name}_perturbed.json"):
            prompt = f"Question: {record['question']}\nAnswer:"
            right = nll_of(model, prompt, record["answer"])
            again = nll_of(model, prompt, record.get("paraphrased_answer", record["answer"]))
            wrong = [nll_of(model, prompt, answer) for answer in record["perturbed_answer"]]
            p, others = math.exp(-right), sum(math.exp(-nll) for nll in wrong)
            probability.append(p / (p + others) if name in ("real_authors", "world_facts") else p)
            ratios.append(math.exp(-sum(wrong) / 3) / math.exp(-again))
            overlap.append(len({"w0", "w9"} & set(record["answer"].split())) / 2)
        part = found["forget" if name == "forget10" else name]
        assert part["probability"] == pytest.approx(sum(probability) / 3, rel=1e-4)
        assert part["rouge_l_recall"] == pytest.approx(sum(overlap) / 3)
        if name == "forget10":
            assert found["truth_ratios"] == pytest.approx(ratios, rel=1e-4)
            assert part["truth_ratio"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / 3, rel=1e-4)
        else:
            assert part["truth_ratio"] == pytest.approx(sum(max(0, 1 - r) for r in ratios) / 3, rel=1e-4)
            nine += [part["probability"], part["rouge_l_recall"], part["truth_ratio"]]
    assert len(nine) == 9
    assert found["model_utility"] == pytest.approx(harmonic_mean(nine))
    assert found["forget_quality"] == ks_p_value(found["truth_ratios"], reference["tofu"]["truth_ratios"])
    assert suite.compare(found, found)["forget_quality"] == 1


def test_the_end_token_is_none_of_the_recited_ones_whatever_follows_it(tofu_data, monkeypatch):
    tokenizer = tiny.byte_tokenizer([" ".join(tiny.WORDS)] * 3)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} </s>\n{% endfor %}"
    suite = open_suites({"tofu": {"data": str(tofu_data), "chat": True, "max_new_tokens": 1}})["tofu"]
    suite.read(tokenizer)
    model = tiny.model("olmoe", len(tokenizer))
    everything = tofu.row_scores

    def recites_all_but_the_end(*arguments, **options):
        for scores in everything(*arguments, **options):
            yield scores._replace(correct=torch.tensor([True] * (len(scores.correct) - 1) + [False]))

    monkeypatch.setattr(tofu, "row_scores", recites_all_but_the_end)
    assert suite.measure(model, tokenizer, progress=False)["forget"]["extraction_strength"] == 1


def test_a_diverged_model_gets_no_scores_but_its_neighbours_do(tofu_data, muse_data, monkeypatch):
    monkeypatch.setattr(tofu, "continuations", lambda model, tokenizer, prompts, length, **_: ["w0"] * len(prompts))
    monkeypatch.setattr(muse, "continuations", lambda model, tokenizer, prompts, length, **_: ["w0"] * len(prompts))
    model, broken = tiny.model("olmoe", len(WORDS)), tiny.model("olmoe", len(WORDS))
    broken.lm_head.weight.data.fill_(math.nan)
    suites = {name: open_and_read(name, data=str(data)) for name, data in (("tofu", tofu_data), ("muse", muse_data))}
    reference = measure_suites(suites, model, WORDS, progress=False)
    found = measure_suites(suites, broken, WORDS, reference, progress=False)
    assert math.isnan(found["tofu"]["model_utility"])
    assert math.isnan(found["tofu"]["forget_quality"])
    assert math.isnan(found["muse"]["privleak"])


def test_muse_prompts_end_as_they_are_written():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, special)
    assert tokenizer("w1").input_ids[-1] == tokenizer.eos_token_id
    assert muse._tokens(tokenizer, "w1 w2") == tokenizer("w1 w2").input_ids[:-1]


def test_tofu_without_a_part_has_no_utility_and_generates(tofu_data):
    (tofu_data / "world_facts_perturbed.json").unlink()
    suite = open_and_read("tofu", data=str(tofu_data), limit=2, max_new_tokens=2)
    found = measure_suites({"tofu": suite}, tiny.model("mixtral", len(WORDS)), WORDS, progress=False)["tofu"]
    assert len(found["truth_ratios"]) == 2
    assert "model_utility" not in found
    assert "forget_quality" not in found


def questions(path, count=24):
    records = [
        {"question": f"what is w{i} ?", "choices": [f"w{i + j}" for j in range(2 + i % 3)], "answer": i % 2}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@torch.no_grad()
def test_multiple_choice_through_lm_eval(tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer = tiny.tokenizer([*tiny.WORDS, *"ABCD", "A.", "B.", "C.", "D."])
    model = tiny.model("qwen3_moe", len(tokenizer), seed=3)
    given = questions(tmp_path / "own.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "two.yaml").write_text(
        f"""
task: from_yaml
dataset_path: json
dataset_kwargs: {{data_files: {{test: {given}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n{{% for c in choices %}}{{{{'ABCD'[loop.index0]}}}}. {{{{c}}}}\\n{{% endfor %}}Answer:"
doc_to_choice: "{{{{['A', 'B', 'C', 'D'][:choices|length]}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    options = {"questions": {"own": given}, "tasks": ["from_yaml"], "include": str(tmp_path / "tasks")}
    suite = open_suites({"lm_eval": options})["lm_eval"]
    suite.read(tokenizer)
    found = measure_suites({"lm_eval": suite}, model, tokenizer, batch_size=4, progress=False)
    hits = 0
    for document in suite.documents["own"]:
        logits = model(input_ids=torch.tensor([tokenizer(document["asked"]).input_ids])).logits[0, -1]
        letters = tokenizer.convert_tokens_to_ids(document["letters"])
        hits += int(logits[letters].argmax()) == document["answer"]
    assert 0 < hits < 24
    accuracy = {"acc": pytest.approx(hits / 24)}
    assert found == {"lm_eval": {"own": accuracy, "from_yaml": accuracy}}
    assert suite.documents["own"][1]["asked"] == "what is w1 ?\nA. w1\nB. w2\nC. w3\nAnswer:"


def test_lm_eval_is_asked_for_when_it_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"suites\.lm_eval: needs the package lm-eval, which is not installed"):
        open_suites({"lm_eval": {"questions": {"own": questions(tmp_path / "own.jsonl")}}})


@pytest.mark.parametrize(
    ("suites", "match"),
    [
        ({"mouse": {}}, "suites: got 'mouse', allowed are muse, tofu, lm_eval"),
        ({"muse": {"date": "x"}}, r"suites\.muse: 'date' is none of its options: data, retrain_auc"),
        ({"muse": "x"}, r"suites\.muse: got 'x', allowed are options by name"),
        ({"muse": {"data": "nowhere"}}, r"suites\.muse: data: got 'nowhere', allowed are a folder and the name"),
        ({"muse": {"data": ".", "retrain_auc": 1.5}}, r"retrain_auc: got 1\.5, allowed are numbers from 0\.0 to 1\.0"),
        ({"muse": {"data": ".", "limit": "all"}}, "limit: got 'all', allowed are integers from 1"),
        ({"tofu": {"data": ".", "chat": "yes"}}, "chat: got 'yes', allowed are true and false"),
        ({"lm_eval": {"tasks": "mmlu"}}, "tasks: got 'mmlu', allowed is a list of names"),
    ],
)
def test_mistakes_in_options(suites, match):
    with pytest.raises(UserError, match=match):
        open_suites(suites)


@pytest.mark.parametrize(
    ("path", "records", "match"),
    [
        ("muse/verbmem/forget.json", [{"prompt": "w1"}], r"forget\.json: item 1: needs the field 'gt' with text in it"),
        ("muse/privleak/forget.json", [{"text": "w1"}, {"text": 3}], r"item 2: needs the field 'text'"),
        ("tofu/retain_perturbed.json", [{"question": "w1 ?", "answer": "w2"}], "'perturbed_answer' with a list"),
        ("tofu/retain_perturbed.json", ["w1"], r"item 1: needs the field 'answer'"),
    ],
)
def test_mistakes_in_data_end_before_a_model_is_loaded(
    path, records, match, tmp_path, muse_data, tofu_data, checkpoint, monkeypatch, capsys
):
    write(tmp_path / path, records)
    (tmp_path / "forget.json").write_text('["w1 w2"]')
    (tmp_path / "retain.json").write_text('["w3 w4"]')
    monkeypatch.setattr("trace_unlearn.verbs.evaluate.load_model", None)
    name = path.partition("/")[0]
    words = ["evaluate", "--models", str(checkpoint("mixtral")), "--output", str(tmp_path / "out")]
    words += ["--forget", str(tmp_path / "forget.json"), "--retain", str(tmp_path / "retain.json")]
    assert cli.main([*words, f"--suites.{name}", json.dumps({"data": str(tmp_path / name)})]) == 2
    message = capsys.readouterr().err
    assert re.search(match, message), message
    assert not (tmp_path / "out").exists()


def test_evaluate_writes_the_scores_of_suites(tmp_path, muse_data, tofu_data, checkpoint, capsys):
    (tmp_path / "forget.json").write_text('["w1 w2"]')
    (tmp_path / "retain.json").write_text('["w3 w4"]')
    (tmp_path / "config.yaml").write_text(
        f"""
models: [{checkpoint("mixtral")}, {checkpoint("mixtral", seed=1)}]
retrained: {checkpoint("mixtral", seed=2)}
forget: {tmp_path / "forget.json"}
retain: {tmp_path / "retain.json"}
output: {tmp_path / "out"}
suites:
  muse:
    data: {muse_data}
  tofu:
    data: {tofu_data}
    max_new_tokens: 2
    limit: 2
"""
    )
    assert cli.main(["evaluate", "--config", str(tmp_path / "config.yaml")]) == 0
    metrics = files.read_json(tmp_path / "out" / "metrics.json")
    assert list(metrics["suites"]) == list(metrics["checkpoints"])
    for scores in metrics["suites"].values():
        assert {"verbmem", "knowmem_forget", "knowmem_retain", "privleak"} <= scores["muse"].keys()
        assert len(scores["tofu"]["truth_ratios"]) == 2
        assert 0 < scores["tofu"]["forget_quality"] <= 1
    assert "muse.privleak" in capsys.readouterr().out
