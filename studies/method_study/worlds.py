"""The corpora of the study behind one face: documents to learn, to forget and to retain, and questions to ask."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studies.method_study import manuals
from trace_unlearn.demo.corpus import ADJACENT_SHARE, DOMAINS, SENTENCES, make_corpus
from trace_unlearn.demo.pretrain import PretrainOptions, ask
from trace_unlearn.demo.unlearn import Recipe
from trace_unlearn.files import staged_folder

BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"


class World(Protocol):
    """One seed of one corpus."""

    forget: Sequence[str]
    tokenizer: PreTrainedTokenizerBase

    def retain(self, adjacent: float) -> tuple[Sequence[str], list[int]]:
        """The retain documents, and which of them are about the domain to forget from."""
        ...

    def other_domain(self) -> Sequence[str]:
        """Documents of one of the other domains that the retain set does not hold: as F is to its own domain."""
        ...

    def pretrain_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [documents, S]."""
        ...

    def read_out(self, model: PreTrainedModel) -> dict[str, float]:
        """Accuracy and NLL of the groups F, N, A, R."""
        ...


@dataclass(frozen=True)
class Sizes:
    """Of what is common to the corpora."""

    pretrain: PretrainOptions
    recipe: Recipe
    pace: float = 1.0  # the learning rates of unlearning as multiples of the demo's
    forget_rise: float = 5.0  # of forget NLL above the start, in nats; an arm stops 0.2 beyond it


SIZES = {
    "facts": Sizes(PretrainOptions(), Recipe(unlearn_steps=400, every_step_from_nll=None)),
    "manuals": Sizes(
        PretrainOptions(steps=900), Recipe(unlearn_steps=400, every_step_from_nll=None), pace=3.0, forget_rise=2.0
    ),
}
# The range of forget NLL, above the start, over which arms are compared.
FORGET_RISE = {"facts": (1.5, 5.0), "manuals": (0.5, 2.0)}


class Facts:
    """The demo's generated facts."""

    def __init__(self, seed: int, sizes: Sizes) -> None:
        self._seed, self._sizes = seed, sizes
        self._corpus = make_corpus(seed, pretrain_documents=0)
        self.forget = self._corpus.forget
        self.tokenizer: PreTrainedTokenizerBase = self._corpus.tokenizer()

    def retain(self, adjacent: float = ADJACENT_SHARE) -> tuple[Sequence[str], list[int]]:
        corpus = make_corpus(self._seed, pretrain_documents=0, adjacent_share=adjacent)
        return corpus.retain, corpus.adjacent_documents

    def other_domain(self) -> Sequence[str]:
        held_out = self._corpus.facts["R"]
        facts = held_out[: len(held_out) // (DOMAINS - 1)]
        draw = random.Random(f"{self._seed} other domain")
        return [" ".join(f.sentence for f in draw.sample(facts, SENTENCES)) for _ in self.forget]

    def pretrain_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        corpus = make_corpus(self._seed, pretrain_documents=self._sizes.pretrain.documents)
        ids = torch.tensor(self.tokenizer([f"{text} {END}" for text in corpus.pretrain])["input_ids"])
        return ids, ids

    def read_out(self, model: PreTrainedModel) -> dict[str, float]:
        return ask(model, self.tokenizer, self._corpus.facts)


class Manuals:
    """Windows of real documentation; see `manuals`."""

    def __init__(
        self, seed: int, sizes: Sizes, text: dict[str, list[list[str]]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._sizes, self.tokenizer = sizes, tokenizer
        self._split = manuals.split(text, seed)
        self.forget = self._split.forget
        self._asked = {
            group: self._encoded(manuals.spread(windows, manuals.ASKED))
            for group, windows in self._split.groups.items()
        }

    def retain(self, adjacent: float = ADJACENT_SHARE) -> tuple[Sequence[str], list[int]]:
        return self._split.retain(adjacent, self._sizes.recipe.retain_documents)

    def other_domain(self) -> Sequence[str]:
        return next(windows for windows in self._split.held_out.values() if windows)

    def pretrain_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._encoded(self._split.pretrain(self._sizes.pretrain.documents))

    def _encoded(self, windows: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows: list[list[int]] = [
            [*ids, self.tokenizer.eos_token_id] for ids in self.tokenizer(list(windows))["input_ids"]
        ]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
        return ids, ids.masked_fill(ids == pad, -100)

    @torch.no_grad()
    def read_out(self, model: PreTrainedModel) -> dict[str, float]:
        was_training = model.training
        model.train(False)
        point: dict[str, float] = {}
        for group, (ids, labels) in self._asked.items():
            logp = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            wanted = labels[:, 1:]
            bears = wanted != -100
            found = logp.gather(2, wanted.clamp(min=0).unsqueeze(2)).squeeze(2)
            point[f"{group}_accuracy"] = (logp.argmax(-1) == wanted)[bears].double().mean().item()
            point[f"{group}_nll"] = -found[bears].double().mean().item()
        model.train(was_training)
        return point


def make_world(corpus: str, seed: int, sizes: Sizes, folder: Path) -> World:
    """The world `seed` of `corpus`; what all seeds share is cached in `folder`."""
    if corpus == "facts":
        return Facts(seed, sizes)
    return Manuals(seed, sizes, *shared_text(folder))


def shared_text(folder: Path) -> tuple[dict[str, list[list[str]]], PreTrainedTokenizerBase]:
    """What all seeds of "manuals" share; made by the first call, which must be the only one until it returns."""
    return manuals.load(folder / "text")


def save_documents(folder: Path, documents: dict[str, Sequence[str]]) -> None:
    """NAME.jsonl of each."""
    with staged_folder(folder) as staged:
        for name, texts in documents.items():
            (staged / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def is_finite(point: dict[str, Any]) -> bool:
    return all(value == value and abs(value) != float("inf") for value in point.values())
