"""TOFU (Maini et al. 2024): forget quality against a retained model, and model utility."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.answers import answered
from trace_unlearn.evaluation.generation import continuations
from trace_unlearn.evaluation.metrics import (
    answer_probability,
    extraction_strength,
    forgotten,
    harmonic_mean,
    ks_p_value,
    option_probability,
    rouge_l,
    true_better,
    truth_ratio,
)
from trace_unlearn.evaluation.predictions import RowScores, row_scores
from trace_unlearn.evaluation.suites.suite import Suite, check_data, check_number, read_part, text, texts
from trace_unlearn.sources.data import check_template
from trace_unlearn.sources.encoding import QUESTION_TEMPLATE, Encoder, Row
from trace_unlearn.sources.records import Record

KEPT = ("retain", "real_authors", "world_facts")
UTILITY = ("probability", "rouge_l_recall", "truth_ratio")  # of each of KEPT: the nine that the harmonic mean is of


@dataclasses.dataclass
class Tofu(Suite):
    r"""TOFU's measures.

    Attributes:
        data: locuslab/TOFU, or a folder with FORGET_perturbed, retain_perturbed, real_authors_perturbed and
            world_facts_perturbed as .json, .jsonl or .parquet: question, answer, perturbed_answer (a list), and for the
            first two paraphrased_answer. What a folder lacks is not measured; model utility needs the last three.
        forget: which forget set: forget01, forget05 or forget10.
        chat: whether to ask by the tokenizer's chat template; by default where it has one.
        question_template: the prompt otherwise, with {question} in it; by default "Question: {question}\nAnswer:".
        max_length: the most tokens of question and answer.
        max_new_tokens: the most tokens of a generated answer.
        limit: only the first questions of each part.
    """

    data: str
    forget: str = "forget10"
    chat: bool | None = None
    question_template: str | None = None
    max_length: int = 512
    max_new_tokens: int = 200
    limit: int | None = None

    def check(self) -> None:
        check_data(self.data)
        if not isinstance(self.forget, str) or not self.forget:
            raise UserError(f"forget: got {self.forget!r}, allowed is the name of a forget set, such as forget10")
        if self.chat is not None and not isinstance(self.chat, bool):
            raise UserError(f"chat: got {self.chat!r}, allowed are true and false")
        if self.chat and self.question_template is not None:
            raise UserError("chat and question_template: got both; each says alone how to ask, so give one of them")
        check_template(self.question_template)
        for name, least in (("max_length", 2), ("max_new_tokens", 1), ("limit", 1)):
            check_number(name, getattr(self, name), least)

    def sources(self) -> dict[str, str]:
        return {"data": self.data}

    def read(self, tokenizer: Tokenizer) -> None:
        template = self.question_template
        if template is None and self.chat is False:
            template = QUESTION_TEMPLATE
        encoder = Encoder(tokenizer, self.max_length, template)
        parts = {"forget": f"{self.forget}_perturbed", **{name: f"{name}_perturbed" for name in KEPT}}
        self.parts: dict[str, list[Question]] = {}
        for name, config in parts.items():
            records = read_part(self.data, config, "train", limit=self.limit)
            if records is not None:
                self.parts[name] = [self._question(record, encoder) for record in records]
        if not self.parts:
            raise UserError(f"{self.data}: has none of {', '.join(parts.values())}")

    def _question(self, record: Record, encoder: Encoder) -> Question:
        """Its rows: the answer, the paraphrased one (or the answer again), the wrong ones."""
        right = text(record, "answer")
        # Real authors and world facts have no paraphrase.
        second = text(record, "paraphrased_answer") if record.value.get("paraphrased_answer") else right
        wrong = texts(record, "perturbed_answer")
        rows = [self._row(record, answer, encoder) for answer in (right, second, *wrong)]
        if not list(answered([rows[0]._asdict()], encoder.eos)):
            raise UserError(f"{record.where}: its answer is empty for this tokenizer")
        return Question(right, rows)

    def _row(self, record: Record, answer: str, encoder: Encoder) -> Row:
        question = text(record, "question")
        value: dict[str, Any] = {"question": question, "answer": answer}
        if self.chat:
            roles = (("user", question), ("assistant", answer))
            value = {"messages": [{"role": role, "content": content} for role, content in roles]}
        notes: Counter[str] = Counter()
        rows = list(encoder.encode([Record(record.where, value)], notes))
        if not rows:
            raise UserError(f"{record.where}: an answer cannot be used: {', '.join(+notes) or 'nothing in it counts'}")
        return rows[0]

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int = 8, progress: bool = True
    ) -> dict[str, Any]:
        """For each part probability, rouge_l_recall and truth_ratio; model_utility; the forget set's truth ratios."""
        found: dict[str, Any] = {}
        for name, questions in self.parts.items():
            rows = [row._asdict() for question in questions for row in question.rows]
            scores = iter(
                row_scores(
                    model,
                    rows,
                    batch_size=batch_size,
                    correct=name == "forget",
                    label=f"tofu: {name}",
                    progress=progress,
                )
            )
            answers = [[next(scores) for _ in question.rows] for question in questions]
            ratios = [truth_ratio(a[1].nll, [wrong.nll for wrong in a[2:]]) for a in answers]
            prompts = [next(answered([question.rows[0]._asdict()], tokenizer.eos_token_id)) for question in questions]
            said = continuations(
                model,
                tokenizer,
                [prompt.input_ids[: prompt.start] for prompt in prompts],
                self.max_new_tokens,
                batch_size=batch_size,
                label=f"tofu: {name}, generation",
                progress=progress,
            )
            pairs = zip(questions, said, strict=True)
            found[name] = {
                "probability": _mean([_probability(name, scored) for scored in answers]),
                "rouge_l_recall": _mean([rouge_l(question.answer, answer).recall for question, answer in pairs]),
                "truth_ratio": _mean([(forgotten if name == "forget" else true_better)(ratio) for ratio in ratios]),
            }
            if name == "forget":
                found["truth_ratios"] = ratios
                lengths = [len(prompt.input_ids) - prompt.start for prompt in prompts]  # without the end token
                recited = [a[0].correct[:length].tolist() for a, length in zip(answers, lengths, strict=True)]
                found[name]["extraction_strength"] = _mean([extraction_strength(hits) for hits in recited])
        if all(name in found for name in KEPT):
            found["model_utility"] = harmonic_mean([found[name][measure] for name in KEPT for measure in UTILITY])
        return found

    def compare(self, found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
        """Gives forget_quality: the KS test's p-value for the truth ratios of the model and of the reference."""
        if reference is None or "truth_ratios" not in found or "truth_ratios" not in reference:
            return {}
        if any(math.isnan(ratio) for found_in in (found, reference) for ratio in found_in["truth_ratios"]):
            return {"forget_quality": math.nan, "log10_forget_quality": math.nan}
        p = ks_p_value(found["truth_ratios"], reference["truth_ratios"])
        return {"forget_quality": p, "log10_forget_quality": math.log10(p) if p > 0 else None}


@dataclasses.dataclass(frozen=True)
class Question:
    """The answer's text, and the rows of the answer, its paraphrase and the wrong answers."""

    answer: str
    rows: list[Row]


def _probability(part: str, scored: list[RowScores]) -> float:
    """Of the answer; where the wrong ones are alternatives to choose from, its share among them."""
    if part in ("real_authors", "world_facts"):
        return option_probability(scored[0].nll, [wrong.nll for wrong in scored[2:]])
    return answer_probability(scored[0].nll)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
