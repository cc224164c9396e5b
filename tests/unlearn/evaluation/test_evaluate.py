import json
from collections import Counter

import datasets
import pytest
import tiny
import torch
from evaluated import QUESTIONS, TEXTS, WORDS, dataset, plain_nll
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteMoeConfig

import trace_unlearn
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation import predictions
from trace_unlearn.evaluation.answers import rouge_scores
from trace_unlearn.evaluation.likelihood import log_likelihood
from trace_unlearn.evaluation.measure import evaluate_model, routes_of
from trace_unlearn.integrations import fused_loss_of
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.sources.data import load_tokens
from trace_unlearn.sources.encoding import Encoder
from trace_unlearn.sources.records import Record


def load_records(records):
    encoder = Encoder(WORDS, 64, "{question}")
    rows = encoder.encode([Record("here", record) for record in records], Counter())
    return datasets.Dataset.from_list([row._asdict() for row in rows])


@pytest.fixture
def texts(tmp_path):
    return dataset(tmp_path, TEXTS, max_length=9)


@pytest.fixture
def questions(tmp_path):
    return dataset(tmp_path, QUESTIONS, "questions.json")


def with_answers(model, records, length=3):
    """The records with the model's own greedy continuations for answers."""
    answered = []
    for record in records:
        ids = WORDS(record["prompt"]).input_ids
        for _ in range(length):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answered.append({**record, "completion": " " + WORDS.decode(ids[-length:])})
    return answered


# likelihood


@torch.no_grad()
def test_nll_equals_that_of_plain_logits(family, texts, questions):
    model = tiny.model(family, len(WORDS))
    for data in (texts, questions):
        found = log_likelihood(model, data, batch_size=3, progress=False)
        nll, tokens = plain_nll(model, data)
        assert found.tokens == tokens
        assert found.nll == pytest.approx(nll, rel=1e-5)
        assert found.routes is None
    assert fused_loss_of(model) is None


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        GraniteMoeConfig(**{**tiny.COMMON, "vocab_size": 69}, num_local_experts=4, logits_scaling=3.0),
        Gemma2Config(**{**tiny.COMMON, "vocab_size": 69, "head_dim": 8}, final_logit_softcapping=0.7),
    ],
    ids=["scaled", "soft-capped"],
)
def test_nll_of_scaled_and_capped_logits(config, texts):
    config.vocab_size = len(WORDS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30.0)
    assert log_likelihood(model, texts, progress=False).nll == pytest.approx(plain_nll(model, texts)[0], rel=1e-5)


@torch.no_grad()
def test_recited_tokens_are_those_of_the_argmax_of_plain_logits(texts, questions, monkeypatch):
    monkeypatch.setattr(predictions, "WORDS", 7)  # several tiles of the vocabulary
    monkeypatch.setattr(predictions, "TOKENS", 3)
    model = tiny.model("mixtral", len(WORDS))
    prompts = [{"prompt": f"w{i} w{2 * i}"} for i in range(4)]
    right = with_answers(model, prompts)
    right[0]["completion"] = " ".join(["", *right[0]["completion"].split()[:2], "w40"])
    right[1]["completion"] = " ".join(["", "w40", *right[1]["completion"].split()[1:]])
    own = load_records(right)
    eos = WORDS.eos_token_id
    for data in (texts, questions, own):
        exact, strength = [], []
        for row in data:
            best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
            hits = [int(best[t]) == y for t, y in enumerate(row["labels"][1:]) if y not in (-100, eos)]
            exact.append(sum(hits) / len(hits))
            strength.append(sum(all(hits[k:]) for k in range(len(hits))) / len(hits))
        found = log_likelihood(model, data, batch_size=3, recited=True, eos=eos, progress=False)
        assert found.exact_memorization == pytest.approx(sum(exact) / len(exact))
        assert found.extraction_strength == pytest.approx(sum(strength) / len(strength))
    assert found.extraction_strength >= (1 + 1) / 4 - 1e-9  # two whole answers
    assert log_likelihood(model, texts, progress=False).exact_memorization is None


@torch.no_grad()
def test_models_that_cannot_be_fused_are_measured_from_logits_with_a_warning(texts, monkeypatch, caplog):
    model = tiny.model("qwen3_moe", len(WORDS))
    fused = log_likelihood(model, texts, keep_routes=1000, progress=False)

    def refuse(model):
        raise UserError("fuse_loss: not this one")

    monkeypatch.setattr(predictions, "fuse_loss", refuse)
    plain = log_likelihood(model, texts, keep_routes=1000, progress=False)
    assert "computing logits, which takes more memory: fuse_loss: not this one" in caplog.text
    assert plain.nll == pytest.approx(fused.nll, rel=1e-5)
    assert torch.equal(plain.routes.counts, fused.routes.counts)
    assert torch.equal(plain.routes.routes, fused.routes.routes)


@torch.no_grad()
def test_a_router_loss_in_the_config_does_not_count_and_comes_back(texts):
    model = tiny.model("mixtral", len(WORDS), output_router_logits=True, router_aux_loss_coef=100.0)
    expected = plain_nll(model, texts)[0]
    assert log_likelihood(model, texts, progress=False).nll == pytest.approx(expected, rel=1e-5)
    assert model.config.output_router_logits is True


# answers


def facts(model, data, tokenizer=WORDS):
    found = log_likelihood(model, data, recited=True, eos=tokenizer.eos_token_id, progress=False)
    return found.answers, found.fact_accuracy


@torch.no_grad()
def test_fact_accuracy_is_whether_greedy_decoding_gives_the_answer(family, tmp_path):
    model = tiny.model(family, len(WORDS))
    prompts = [{"prompt": text} for text in ("w1 w2 w3 w4", "the capital of w5 is", "w6")]
    right = with_answers(model, prompts)
    assert facts(model, dataset(tmp_path, right)) == (3, 1.0)
    for position in range(3):
        wrong = json.loads(json.dumps(right))
        words = wrong[1]["completion"].split()
        words[position] = "w40" if words[position] != "w40" else "w41"
        wrong[1]["completion"] = " " + " ".join(words)
        assert facts(model, dataset(tmp_path, wrong)) == (3, pytest.approx(2 / 3)), position


@torch.no_grad()
def test_rouge_by_hand(tmp_path, monkeypatch):
    model = tiny.model("olmoe", len(WORDS))
    (record,) = with_answers(model, [{"prompt": "w1 w2 w3"}], length=4)
    said = record["completion"].split()
    assert len(said) == 4
    record["completion"] = f" {said[0]} w45 {said[1]} {said[2]} w46 w47"  # 3 of 6 words in order, 4 are generated
    scores = rouge_scores(model, WORDS, dataset(tmp_path, [record]), max_new_tokens=4, progress=False)
    assert scores == {
        "generated": 1,
        "rouge_l_recall": pytest.approx(3 / 6),
        "rouge_l_f1": pytest.approx(2 * 3 / (6 + 4)),
    }


@torch.no_grad()
def test_generation_is_greedy_whatever_the_checkpoint_configures_and_padding_does_not_matter(family, tmp_path):
    model = tiny.model(family, len(WORDS))
    unspoken = [i for word, i in WORDS.get_vocab().items() if word not in tiny.WORDS[:50]]
    model.get_output_embeddings().weight[unspoken] = 0  # special tokens and punctuation are no words for ROUGE
    prompts = [{"prompt": text} for text in ("w1", "the capital of w5 is", "w6 w7 w8 w9 w10 w11 w12")]
    data = dataset(tmp_path, with_answers(model, prompts, length=5))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    before = model.generation_config
    together = rouge_scores(model, WORDS, data, max_new_tokens=5, progress=False)
    assert together["rouge_l_recall"] == 1.0
    assert together == rouge_scores(model, WORDS, data, batch_size=1, max_new_tokens=5, progress=False)
    assert model.generation_config is before
    limited = rouge_scores(model, WORDS, data, max_new_tokens=5, max_generations=2, progress=False)
    assert limited["generated"] == 2


@torch.no_grad()
def test_what_a_model_says_after_its_answer_is_cut_unless_the_reference_has_it_too(tmp_path, monkeypatch):
    model = tiny.model("olmoe", len(WORDS))
    said = torch.tensor([[3] * 60 + WORDS("w1").input_ids])
    monkeypatch.setattr(type(WORDS), "batch_decode", lambda *_, **__: ["\n w1 w2\n\nw6\nQuestion: w3 w4"])
    monkeypatch.setattr(model, "generate", lambda **_: said)
    for answer, f1 in (("w1 w2", 1.0), ("w1 w2\n\nw5", 2 * 2 / (3 + 3))):
        data = dataset(tmp_path, [{"prompt": "w7", "completion": f" {answer}"}])
        assert rouge_scores(model, WORDS, data, progress=False)["rouge_l_f1"] == pytest.approx(f1), answer
    # The answer is empty, and the question that follows no part of it.
    monkeypatch.setattr(type(WORDS), "batch_decode", lambda *_, **__: ["\n\nQuestion: w1 w2"])
    data = dataset(tmp_path, [{"prompt": "w7", "completion": " w1 w2"}])
    assert rouge_scores(model, WORDS, data, progress=False)["rouge_l_recall"] == 0


@torch.no_grad()
def test_only_the_last_answer_of_a_chat_is_asked_for(tmp_path):
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = tiny.tokenizer(chat_template=template)
    model = tiny.model("mixtral", len(tokenizer))
    start = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4")]
    ids = tokenizer("w1 w2 w3 w4", add_special_tokens=False).input_ids
    last = tokenizer.decode([int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())])
    messages = [{"role": role, "content": content} for role, content in [*start, ("assistant", last)]]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages}]))
    data = load_tokens(tmp_path / "chat.json", tokenizer, progress=False)
    assert data[0]["labels"].count(-100) == 3
    assert facts(model, data, tokenizer) == (1, 1.0)
    found = log_likelihood(model, data, recited=True, progress=False)
    assert found.extraction_strength < 1  # the first answer is another


def test_plain_texts_have_no_answers(texts):
    model = tiny.model("mixtral", len(WORDS))
    assert facts(model, texts) == (0, None)
    assert rouge_scores(model, WORDS, texts, progress=False) == {}


# routing


@torch.no_grad()
def test_routing_shift_against_brute_force(family, texts, questions):
    before, after = (tiny.model(family, len(WORDS), seed=seed) for seed in (0, 1))
    measures = trace_unlearn.evaluate(
        after, WORDS, questions, texts, base=before, batch_size=2, max_new_tokens=0, progress=False
    )
    experts = range(tiny.NUM_EXPERTS)
    for name, data in (("forget", questions), ("retain", texts)):
        chosen = []
        for model in (before, after):
            per_token = []
            for row in data:
                with RoutingRecorder(model, store_routes=True) as recorder:
                    model(input_ids=torch.tensor([row["input_ids"]]))
                bearing = [t for t, label in enumerate(row["labels"][1:]) if label != -100]
                per_token += [[set(layer) for layer in recorder.routes[0, t].tolist()] for t in bearing]
            chosen.append(per_token)
        num_layers = len(chosen[0][0])
        changed, variation = [], []
        for layer in range(num_layers):
            pairs = [(old[layer], new[layer]) for old, new in zip(*chosen, strict=True)]
            changed.append(sum(len(new - old) for old, new in pairs) / (tiny.TOP_K * len(pairs)))
            shares = [
                [sum(e in token[layer] for token in tokens) / (tiny.TOP_K * len(tokens)) for e in experts]
                for tokens in chosen
            ]
            variation.append(sum(abs(p - q) for p, q in zip(*shares, strict=True)) / 2)
        shift = measures[name]["routing_shift"]
        assert shift["tokens"] == len(chosen[0])
        assert shift["changed_per_layer"] == pytest.approx(changed)
        assert shift["total_variation_per_layer"] == pytest.approx(variation)
        assert shift["changed"] == pytest.approx(sum(changed) / num_layers)
        assert 0 < shift["total_variation"] < 1


def test_the_same_model_does_not_shift_and_is_left_as_it_was(texts, questions):
    model = tiny.model("deepseek_v3", len(WORDS)).train()
    base = routes_of(model, {"forget": questions, "retain": texts}, routing_tokens=5, progress=False)
    measures = evaluate_model(
        model, WORDS, questions, texts, base=base, routing_tokens=5, max_new_tokens=2, progress=False
    )
    for name in ("forget", "retain"):
        assert measures[name]["routing_shift"]["changed"] == 0
        assert measures[name]["routing_shift"]["total_variation"] == 0
        assert measures[name]["routing_shift"]["tokens"] == 5
    assert model.training
    assert fused_loss_of(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_base_of_another_architecture(texts, questions):
    other = tiny.model("qwen3_moe", len(WORDS), num_hidden_layers=3)
    with pytest.raises(UserError, match=r"base: its routing has the shape .* another architecture"):
        evaluate_model(tiny.model("qwen3_moe", len(WORDS)), WORDS, questions, texts, base=other, progress=False)
