"""MUSE (Shi et al. 2024): verbatim and knowledge memorisation, privacy leakage, utility."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.generation import continuations, cut
from trace_unlearn.evaluation.metrics import auc, min_k, priv_leak, rouge_l
from trace_unlearn.evaluation.predictions import row_scores
from trace_unlearn.evaluation.suites.suite import Suite, check_data, check_number, read_part, text
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.sources.records import Record

STOPS = ("\n\n", "\nQuestion", "Question:")
VERBATIM_TOKENS, ANSWER_TOKENS = 128, 32


@dataclasses.dataclass
class Muse(Suite):
    """MUSE's four measures.

    Attributes:
        data: a hub name such as muse-bench/MUSE-Books, or a folder that holds, as .json, .jsonl or .parquet,
            verbmem/forget (fields prompt, gt), knowmem/forget_qa, knowmem/retain_qa and the examples shown before them,
            knowmem/forget_qa_icl and knowmem/retain_qa_icl (question, answer), privleak/forget and privleak/holdout
            (text). What a folder lacks is not measured.
        retrain_auc: the AUC of Min-K%-Prob of a model of this architecture that was trained without the forget data;
            where no such checkpoint is at hand to be measured (`retrained` of evaluate).
        max_length: the most tokens of a text of privleak.
        limit: only the first rows of each part.
    """

    data: str
    retrain_auc: float | None = None
    max_length: int = 2048
    limit: int | None = None

    def check(self) -> None:
        check_data(self.data)
        check_number("retrain_auc", self.retrain_auc, 0.0, most=1.0, whole=False)
        check_number("max_length", self.max_length, 2)
        check_number("limit", self.limit, 1)
        if self.retrain_auc == 0:
            raise UserError("retrain_auc: got 0, allowed are numbers above 0: PrivLeak divides by it")

    def sources(self) -> dict[str, str]:
        return {"data": self.data}

    def read(self, tokenizer: Tokenizer) -> None:
        self.verbatim = self._verbatim(tokenizer)
        self.questions = {
            name: found for name in ("forget", "retain") if (found := self._questions(name, tokenizer)) is not None
        }
        members = {name: self._part("privleak", name) for name in ("forget", "holdout")}
        self.members = {
            name: [_row(tokenizer, text(record, "text"), record, self.max_length) for record in records]
            for name, records in members.items()
            if records is not None
        }
        if len(self.members) == 1:
            raise UserError(f"{self.data}: has only one of privleak/forget and privleak/holdout; both are needed")
        if not (self.verbatim or self.questions or self.members):
            raise UserError(f"{self.data}: has none of verbmem/forget, knowmem/forget_qa, privleak/forget, ...")

    def _part(self, config: str, split: str) -> list[Record] | None:
        return read_part(self.data, config, split, limit=self.limit)

    def _verbatim(self, tokenizer: Tokenizer) -> list[tuple[list[int], str]]:
        """Prompts, and the references, cut as MUSE's code cuts them: to 128 tokens, the tokenizer's own among them.

        A tokenizer that puts a token before every text leaves 127 of its tokens.
        """
        found = []
        for record in self._part("verbmem", "forget") or ():
            tokens = tokenizer(text(record, "gt"), max_length=VERBATIM_TOKENS, truncation=True)["input_ids"]
            reference = str(tokenizer.decode(tokens, skip_special_tokens=True))
            found.append((_tokens(tokenizer, text(record, "prompt")), reference))
        return found

    def _questions(self, name: str, tokenizer: Tokenizer) -> list[tuple[list[int], str]] | None:
        """Few-shot prompts, and the answers."""
        asked = self._part("knowmem", f"{name}_qa")
        if asked is None:
            return None
        shots = read_part(self.data, "knowmem", f"{name}_qa_icl")
        if shots is None:
            raise UserError(f"{self.data}: has knowmem/{name}_qa but not knowmem/{name}_qa_icl, the examples before it")
        before = "".join(f"Question: {text(shot, 'question')}\nAnswer: {text(shot, 'answer')}\n\n" for shot in shots)
        return [
            (_tokens(tokenizer, f"{before}Question: {text(record, 'question')}\nAnswer: "), text(record, "answer"))
            for record in asked
        ]

    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int = 8, progress: bool = True
    ) -> dict[str, Any]:
        """verbmem, knowmem_forget, knowmem_retain: 100 times the mean ROUGE-L F1; min_k_auc; min_k of every text."""

        def overlap(asked: list[tuple[list[int], str]], length: int, stops: tuple[str, ...], label: str) -> float:
            said = continuations(
                model,
                tokenizer,
                [prompt for prompt, _ in asked],
                length,
                batch_size=batch_size,
                label=f"muse: {label}",
                progress=progress,
            )
            pairs = zip(asked, said, strict=True)
            return 100 * sum(rouge_l(wanted, cut(answer, stops)).f1 for (_, wanted), answer in pairs) / len(asked)

        found: dict[str, Any] = {}
        if self.verbatim:
            found["verbmem"] = overlap(self.verbatim, VERBATIM_TOKENS, (), "verbatim")
        for name, asked in self.questions.items():
            found[f"knowmem_{name}"] = overlap(asked, ANSWER_TOKENS, STOPS, f"knowledge, {name}")
        if self.members:
            found["min_k"] = {
                name: [
                    min_k(scores.log_probs.tolist())
                    for scores in row_scores(
                        model, rows, batch_size=batch_size, label=f"muse: privacy, {name}", progress=progress
                    )
                ]
                for name, rows in self.members.items()
            }
            found["min_k_auc"] = auc(found["min_k"]["forget"], found["min_k"]["holdout"])
        return found

    def compare(self, found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
        """Gives privleak: against the reference model's AUC, or the given one."""
        expected = reference["min_k_auc"] if reference is not None and "min_k_auc" in reference else self.retrain_auc
        if "min_k_auc" not in found or not expected:
            return {}
        return {"privleak": priv_leak(found["min_k_auc"], expected), "privleak_reference_auc": expected}


def _tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Without the end-of-sequence token that some tokenizers put behind every text."""
    tokens = list(tokenizer(prompt)["input_ids"])
    own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return tokens[:-1] if tokens[-1:] == [tokenizer.eos_token_id] != list(own[-1:]) else tokens


def _row(tokenizer: Tokenizer, document: str, record: Record, max_length: int) -> dict[str, list[int]]:
    """Every token but the first bears loss; no end-of-sequence token is put behind."""
    tokens = _tokens(tokenizer, document)[:max_length]
    if len(tokens) < 2:
        raise UserError(f"{record.where}: a text of fewer than two tokens")
    return {"input_ids": tokens, "labels": [IGNORE_INDEX, *tokens[1:]]}
