"""A generated world of facts: what to forget, what must survive, and what the retain set knows of it.

Five domains hold entities with their own first and last names; a fact reads "the R of FIRST LAST is V .". A general
stream of a small random grammar is mixed in. Every document comes from one source and has `DOCUMENT_TOKENS` tokens.

Domain 0 is the one to forget from. Its entities fall into three groups:

- ``forget`` (F): the forget set.
- ``neighbour`` (N): must survive, and is never in the retain set.
- ``adjacent`` (A): must survive, and makes up a small share of the retain set.

Of the other domains one half of the entities is in the retain set, the other half is held out (R).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trace_unlearn.files import staged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOMAINS = 5
NAMES = 8  # first names of a domain, and as many last names
RELATIONS = ("home", "trade", "mentor", "emblem")
VALUES = 12  # values a relation can take
GROUP_SIZES = {"forget": 12, "neighbour": 24, "adjacent": 24}  # the entities of domain 0
OTHER_ENTITIES = 12  # entities of each other domain, half of them in the retain set
NOUNS, VERBS, ADJECTIVES = 40, 20, 20
SENTENCES = 5  # sentences of a document
SENTENCE_TOKENS = 8
DOCUMENT_TOKENS = 1 + SENTENCES * SENTENCE_TOKENS + 1  # <s>, the sentences, </s>
GENERAL_SHARE = 0.2  # of the documents, in pre-training and in the retain set
ADJACENT_SHARE = 0.05  # of the retain set
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
FACT_GROUPS = {"F": "to forget", "N": "neighbours", "A": "adjacent", "R": "held-out"}


@dataclass(frozen=True)
class Fact:
    """One fact: the sentence up to the value, and the value."""

    prompt: str
    answer: str

    @property
    def sentence(self) -> str:
        return f"{self.prompt} {self.answer} ."


@dataclass(frozen=True)
class Corpus:
    """The documents and facts of one generated world.

    Attributes:
        seed: what it was generated from.
        vocabulary: every word, special tokens first.
        facts: the facts to ask about, by the letters of `FACT_GROUPS`.
        pretrain: documents about everything.
        forget: documents about F alone.
        retain: documents about the retained half of the other domains, the general stream, and a few about A.
    """

    seed: int
    vocabulary: tuple[str, ...]
    facts: dict[str, tuple[Fact, ...]]
    pretrain: tuple[str, ...]
    forget: tuple[str, ...]
    retain: tuple[str, ...]

    @property
    def adjacent_documents(self) -> list[int]:
        """Which retain documents are about A."""
        sentences = {fact.sentence for fact in self.facts["A"]}
        return [i for i, text in enumerate(self.retain) if f"{text.split(' .')[0]} ." in sentences]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word-level tokenizer of this vocabulary; every text starts with ``<s>``."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        ids = {word: i for i, word in enumerate(self.vocabulary)}
        backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )

    def save(self, folder: Path) -> None:
        """Write forget.jsonl and retain.jsonl ({"text"}) and facts-F.jsonl and so on ({"prompt", "completion"})."""
        with staged_folder(folder) as staged:
            for name, documents in (("forget", self.forget), ("retain", self.retain)):
                _write_lines(staged / f"{name}.jsonl", [{"text": text} for text in documents])
            for group, facts in self.facts.items():
                records = [{"prompt": fact.prompt, "completion": f" {fact.answer}"} for fact in facts]
                _write_lines(staged / f"facts-{group}.jsonl", records)


def make_corpus(
    seed: int,
    *,
    pretrain_documents: int = 16000,
    forget_documents: int = 96,
    retain_documents: int = 384,
    adjacent_share: float = ADJACENT_SHARE,
) -> Corpus:
    """Generate the world of `seed`; the same seed gives the same world, whatever was generated before.

    `adjacent_share` of the retain set is about A, at the cost of the other domains; nothing else depends on it.

    Example:
        >>> corpus = make_corpus(0, pretrain_documents=10)
        >>> {group: len(facts) for group, facts in corpus.facts.items()}
        {'F': 48, 'N': 96, 'A': 96, 'R': 96}
        >>> corpus.facts["F"][0].sentence.split()[0::5]
        ['the', 'is']
    """
    words = _Words(random.Random(f"{seed} words"))
    rng = random.Random(f"{seed} facts")
    names = [(words.take(NAMES), words.take(NAMES)) for _ in range(DOMAINS)]
    values = {relation: words.take(VALUES) for relation in RELATIONS}
    grammar = (words.take(NOUNS), words.take(VERBS), words.take(ADJECTIVES))

    groups: dict[tuple[int, str], list[Fact]] = {}
    for domain, (first, last) in enumerate(names):
        sizes = GROUP_SIZES if domain == 0 else {"retained": OTHER_ENTITIES // 2, "held-out": OTHER_ENTITIES // 2}
        entities = rng.sample([f"{a} {b}" for a in first for b in last], sum(sizes.values()))
        for group, size in sizes.items():
            groups[domain, group] = [
                Fact(f"the {relation} of {entity} is", rng.choice(values[relation]))
                for entity in entities[:size]
                for relation in RELATIONS
            ]
            entities = entities[size:]

    def documents(stream: str, count: int, sources: list[tuple[float, list[Fact] | None]]) -> tuple[str, ...]:
        """`count` documents, each from one source, the sources in exact proportion; None is the general grammar."""
        draw = random.Random(f"{seed} {stream}")
        texts = []
        for facts in _in_proportion(draw, count, sources):
            if facts is None:
                sentences = [_general_sentence(draw, *grammar) for _ in range(SENTENCES)]
            else:
                sentences = [fact.sentence for fact in draw.sample(facts, SENTENCES)]
            texts.append(" ".join(sentences))
        return tuple(texts)

    domains = [[fact for (d, _), facts in groups.items() if d == domain for fact in facts] for domain in range(DOMAINS)]
    total = sum(len(facts) for facts in domains)
    everything = [((1 - GENERAL_SHARE) * len(facts) / total, facts) for facts in domains]
    others = (1 - GENERAL_SHARE - adjacent_share) / (DOMAINS - 1)
    kept = [(others, groups[domain, "retained"]) for domain in range(1, DOMAINS)]
    function_words = ("the", "a", "of", "is", ".", *RELATIONS)
    return Corpus(
        seed=seed,
        vocabulary=(*SPECIAL_TOKENS, *function_words, *words.taken),
        facts={
            "F": tuple(groups[0, "forget"]),
            "N": tuple(groups[0, "neighbour"]),
            "A": tuple(groups[0, "adjacent"]),
            "R": tuple(fact for domain in range(1, DOMAINS) for fact in groups[domain, "held-out"]),
        },
        pretrain=documents("pretrain", pretrain_documents, [*everything, (GENERAL_SHARE, None)]),
        forget=documents("forget", forget_documents, [(1.0, groups[0, "forget"])]),
        retain=documents(
            "retain", retain_documents, [*kept, (adjacent_share, groups[0, "adjacent"]), (GENERAL_SHARE, None)]
        ),
    )


class _Words:
    """Invented words, no two alike."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.taken: list[str] = []

    def take(self, count: int) -> list[str]:
        new: list[str] = []
        while len(new) < count:
            syllables = self._rng.choice((2, 3))
            word = "".join(self._rng.choice("bdfgklmnprstvz") + self._rng.choice("aeiou") for _ in range(syllables))
            if word not in self.taken and word not in new:
                new.append(word)
        self.taken += new
        return new


def _in_proportion(
    rng: random.Random, count: int, sources: list[tuple[float, list[Fact] | None]]
) -> list[list[Fact] | None]:
    """`count` sources in random order; the number of each is its share of `count`, rounded by largest remainder."""
    shares = [share * count for share, _ in sources]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    chosen = [facts for (_, facts), number in zip(sources, counts, strict=True) for _ in range(number)]
    rng.shuffle(chosen)
    return chosen


def _general_sentence(rng: random.Random, nouns: list[str], verbs: list[str], adjectives: list[str]) -> str:
    subject, object_ = rng.choice(nouns), rng.choice(nouns)
    return f"the {rng.choice(adjectives)} {subject} {rng.choice(verbs)} a {rng.choice(adjectives)} {object_} ."


def _write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
