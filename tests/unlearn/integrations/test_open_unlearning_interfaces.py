"""Our trainers for open-unlearning on a stand-in of its interfaces; test_open_unlearning.py has them on a checkout."""

import math

import open_unlearning_like as like
import pytest
import tiny
import torch
from transformers import TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning.documents import document_key
from trace_unlearn.integrations.open_unlearning.losses import largest_less_mean, trainer_class
from trace_unlearn.integrations.open_unlearning.versions import bridged, on_float_logits


def documents(number, seed, vocabulary, first_label=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        ids = torch.randint(4, vocabulary, (5 + i % 4,), generator=generator)
        labels = ids.clone()
        labels[:first_label] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def trainer(tmp_path, tokenizer, method="GradDiff", side="right", forget=None, evaluators=None, cls=None, **options):
    arguments = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3, "num_train_epochs": 2, "remove_unused_columns": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_steps": 1,
        "eval_strategy": "epoch", "eval_on_start": True, "do_eval": True,
    }  # fmt: skip
    size = len(tokenizer)
    return (cls or trainer_class(getattr(like, method), method))(
        model=tiny.model("qwen3_moe", size),
        train_dataset=like.ForgetRetain(forget or documents(4, 1, size, 1), documents(8, 2, size, 1)),
        eval_dataset=None,
        tokenizer=tokenizer,
        data_collator=like.Collator(tokenizer.pad_token_id, side),
        args=TrainingArguments(**arguments),
        evaluators=evaluators,
        template_args=None,
        **options,
    )


def losses(made):
    torch.manual_seed(0)
    made.train()
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("base", ["theirs", "ours"])
def test_evaluation_before_during_and_after_training_finds_tokenizer_and_logits(base, tmp_path, tokenizer):
    seen = []

    def evaluator(model, tokenizer, folder):
        ids = torch.arange(4, 9)[None]
        seen.append((tokenizer.pad_token_id, tuple(model(input_ids=ids, labels=ids).logits.shape)))
        return {"measure": float(len(seen))}

    cls = bridged(like.GradDiff) if base == "theirs" else None
    made = trainer(tmp_path, tokenizer, evaluators=[evaluator], cls=cls)
    made.train()
    assert made.evaluate(metric_key_prefix="eval")["measure"] == 4.0  # the first, two epochs, the last
    assert seen == [(tokenizer.pad_token_id, (1, 5, len(tokenizer)))] * 4
    assert [entry["measure"] for entry in made.state.log_history if "measure" in entry] == [1.0, 2.0, 3.0, 4.0]


def test_measures_see_float32_logits_of_a_bfloat16_model(tokenizer):
    """Its own reads a reference model, too, and hands probabilities to NumPy."""
    ids = torch.arange(4, 9)[None]
    models = [tiny.model(family, len(tokenizer)).bfloat16() for family in ("qwen3_moe", "mixtral")]

    def evaluate(model):
        return [one(input_ids=ids).logits.exp().detach().numpy() for one in (model, models[1])]

    with pytest.raises(TypeError, match="BFloat16"):
        evaluate(models[0])
    found = on_float_logits(evaluate)(models[0])
    for one, seen in zip(models, found, strict=True):
        logits = one(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16  # after it as before
        assert (seen == logits.float().exp().detach().numpy()).all()


def test_micro_batches_are_averaged(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, weights="uniform")
    assert made.model_accepts_loss_kwargs is False
    logged = losses(made)
    plain = losses(trainer(tmp_path, tokenizer, cls=bridged(like.GradDiff)))
    assert logged == pytest.approx(plain, rel=1e-4, abs=2e-4)  # the log rounds to four digits


@pytest.mark.parametrize("method", ["GradDiff", "NPO"])
@pytest.mark.parametrize("first_label", [0, 1])
def test_weights_and_references_are_found_behind_padding_on_the_left(method, first_label, tmp_path, tokenizer):
    found = {}
    for side in ("left", "right"):
        forget = documents(4, 1, len(tokenizer), 1)
        made = trainer(tmp_path, tokenizer, method, side, forget, experts_per_layer=2)
        if first_label == 0:  # then a row has a position more than the document: the one before its first token
            labelled = documents(8, 2, len(tokenizer), 0)
            made = trainer(tmp_path, tokenizer, method, side, forget, experts_per_layer=2)
            made.train_dataset.retain = labelled
            made._weights.clear()
            made._weigh("balance", "token", 2, 0.5)
        found[side] = losses(made)
    if first_label == 1:
        assert found["left"] == pytest.approx(found["right"], abs=2e-4)
    assert all(map(math.isfinite, found["left"]))


def test_a_document_is_recognised_padded_on_either_side(tokenizer):
    pad = tokenizer.pad_token_id
    ids, labels = torch.tensor([5, 6, 7]), torch.tensor([-100, 6, 7])
    key = document_key(ids, labels, pad)
    padding, ignored = torch.full((2,), pad), torch.full((2,), -100)
    assert document_key(torch.cat([padding, ids]), torch.cat([ignored, labels]), pad) == key
    assert document_key(torch.cat([ids, padding]), torch.cat([labels, ignored]), pad) == key
    assert document_key(ids, torch.tensor([-100, -100, 7]), pad) != key
    assert document_key(ids, torch.full((3,), -100), pad) == document_key(padding, ignored, pad)


def test_documents_without_a_label(tmp_path, tokenizer):
    forget = documents(4, 1, len(tokenizer), 1)
    forget[2]["labels"][:] = -100
    made = trainer(tmp_path, tokenizer, "NPO", forget=forget, weights="uniform", beta=0.5, alpha=0.0)
    batch = made.data_collator(forget)
    loss = made.compute_loss(made.model, {"forget": batch})
    assert loss.item() == pytest.approx(2 / 0.5 * math.log(2), rel=1e-6)  # at the start all are as they were
    for row in forget:
        del row["labels"]
    with pytest.raises(UserError, match="a batch has no labels"):
        made.compute_loss(made.model, {"forget": made.data_collator(forget)})


def test_means_of_rmu(tmp_path, tokenizer):
    distances = torch.tensor([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 9.0], [7.0, 7.0, 7.0, 7.0]])
    labelled = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    steered = distances.sqrt()[..., None].expand(3, 4, 5)
    zero = torch.zeros_like(steered)
    every, own = (trainer_class(like.RMU, "RMU").__new__(trainer_class(like.RMU, "RMU")) for _ in range(2))
    every.document_mean, own.document_mean = False, True
    sums, lengths = (4.0, 15.0), (2, 4)
    assert own.compute_activation_loss(steered, zero, labelled).item() == pytest.approx((4 / 2 + 15 / 4) / 2)
    pairs = [total / length for total in sums for length in lengths]
    assert every.compute_activation_loss(steered, zero, labelled).item() == pytest.approx(sum(pairs) / 4)
    assert every.compute_activation_loss(steered, zero, labelled & False).item() == 0.0


@pytest.mark.parametrize("bias", [False, True])
def test_the_largest_logit_above_the_mean_one(bias, monkeypatch):
    monkeypatch.setattr("trace_unlearn.integrations.open_unlearning.losses._LOGITS", 40)  # rows of two chunks and more
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 7), (20, 7)))
    given = torch.randn(20, generator=generator, dtype=torch.float64) if bias else None
    wanted = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    logits = torch.nn.functional.linear(*wanted, given)
    expected = logits.max(-1).values - logits.mean(-1)
    expected.square().sum().backward()
    ours = [tensor.float().requires_grad_() for tensor in (hidden, head)]
    found = largest_less_mean(*ours, None if given is None else given.float())
    found.square().sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    assert largest_less_mean(hidden[:0].float(), head.float(), None).shape == (0,)


def test_without_a_retain_loss_nothing_is_weighed(tmp_path, tokenizer):
    with pytest.raises(UserError, match="weights: got 'balance' for TraceGradAscent, which has no retain loss"):
        trainer(tmp_path, tokenizer, "GradAscent", weights="balance")
    made = trainer(tmp_path, tokenizer, "GradAscent")
    batch = made.data_collator(documents(3, 1, len(tokenizer), 1))
    plain = tiny.model("qwen3_moe", len(tokenizer))(**batch).loss
    assert made.compute_loss(made.model, {"forget": batch}).item() == pytest.approx(-plain.item(), rel=1e-6)
