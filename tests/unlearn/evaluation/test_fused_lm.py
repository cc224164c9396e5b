"""lm-eval's requests without logits: the same answers as its own class gives, and no tensor of the logits' size."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from trace_unlearn.evaluation.suites.fused_lm import FusedLM

TOKENIZER = tiny.tokenizer([*tiny.WORDS, *"ABCD"])


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return found


def models(kind="qwen3_moe", seed=3, num_classes=None, **options):
    model = tiny.model(kind, num_classes or len(TOKENIZER), seed=seed)
    return [cls(pretrained=model, tokenizer=TOKENIZER, batch_size=4, **options) for cls in (HFLM, FusedLM)]


def asked(*pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


CHOICES = [(f"what is w{i} ?", f" {letter}") for i in range(5) for letter in "ABCD"]
LONG = [(f"w{i} w{i + 1}", " " + " ".join(f"w{(i * j) % 40}" for j in range(1 + i))) for i in range(7)]


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
@pytest.mark.parametrize(
    "pairs",
    [CHOICES, LONG, CHOICES + LONG, [*LONG, ("", "w1 w2"), ("w1 w2", " w3"), ("w1", " w2 w3"), ("w1", " w2 w3")]],
    ids=["choices", "long", "both", "shared"],
)
def test_the_answers_are_those_of_lm_eval(kind, pairs):
    # Without its cache: that gives (w1 w2, w3) the wrong position's score beside (w1, w2 w3).
    theirs, ours = (model.loglikelihood(asked(*pairs), disable_tqdm=True) for model in models(kind, logits_cache=False))
    torch.testing.assert_close(torch.tensor([a for a, _ in ours]), torch.tensor([a for a, _ in theirs]))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_greedy_continuation_is_seen():
    theirs, ours = models()
    ids = torch.tensor([TOKENIZER("w1 w2").input_ids])
    word = TOKENIZER.convert_ids_to_tokens(int(theirs.model(ids).logits[0, -1].argmax()))
    for pairs in ([("w1 w2", f" {word}")], [("w1 w2", f" {word}"), ("w1 w2", " A")]):
        answers = [model.loglikelihood(asked(*pairs), disable_tqdm=True) for model in (theirs, ours)]
        assert answers[0][0][1]
        assert [greedy for _, greedy in answers[1]] == [greedy for _, greedy in answers[0]]


def test_texts_longer_than_the_context_window():
    theirs, ours = models(max_length=8)
    pairs = [(" ".join(f"w{j}" for j in range(20)), " w3 w4"), *LONG]
    answers = [model.loglikelihood(asked(*pairs), disable_tqdm=True) for model in (theirs, ours)]
    torch.testing.assert_close(torch.tensor(answers[1]), torch.tensor(answers[0]))
    texts = [(" ".join(f"w{(i + j * j) % 50}" for j in range(30)),) for i in range(3)]
    rolled = [
        model.loglikelihood_rolling(asked(*texts, kind="loglikelihood_rolling"), disable_tqdm=True)
        for model in (theirs, ours)
    ]
    torch.testing.assert_close(torch.tensor(rolled[1]), torch.tensor(rolled[0]))


def test_no_tensor_has_the_size_of_the_logits_and_the_model_is_left_as_it_was():
    theirs, ours = models(num_classes=5000)
    tokens = max(len(TOKENIZER(context + text).input_ids) for context, text in LONG) - 1
    logits = 4 * tokens * 5000
    largest = []
    for model in (theirs, ours):
        with Largest() as seen:
            model.loglikelihood(asked(*LONG), disable_tqdm=True)
        largest.append(seen.elements)
    assert largest[0] >= logits
    assert largest[1] < logits / 10
    assert ours.model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).logits is not None


def test_a_model_that_cannot_be_fused_is_scored_from_logits(caplog):
    theirs, ours = models()
    ours.model.loss_function = lambda *args, **kwargs: None
    answers = [model.loglikelihood(asked(*CHOICES), disable_tqdm=True) for model in (theirs, ours)]
    assert answers[0] == answers[1]
    assert "computing logits" in caplog.text
