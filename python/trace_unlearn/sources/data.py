"""From files and hub data to token windows with labels.

A record has one of five forms; further fields are ignored; where several forms fit, the first in this table is taken:

| Form | What bears loss |
|---|---|
| ``{"messages": [{"role": ..., "content": ...}, ...]}`` | the assistant's turns, by the chat template |
| ``{"prompt": ..., "completion": ...}`` | the completion and the end-of-sequence token |
| ``{"question": ..., "answer": ...}`` | the answer and the end-of-sequence token; the prompt is the chat template's, or
``question_template`` where that is given or there is no chat template |
| ``{"text": ...}`` | every token that another one precedes, and the end-of-sequence token |
| a plain string | as ``text`` |

A text, and a whole .txt file is one text, is cut into windows of at most ``max_length`` tokens. Every window begins
with the tokens that the tokenizer puts before a text (BOS); where it puts none, with the last token of the window
before. So each token of the text bears loss exactly once, except that without BOS nothing predicts the first. The other
forms are never cut: one too long is truncated on the right, and a warning counts them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from trace_unlearn.checks import check_integers
from trace_unlearn.errors import UserError
from trace_unlearn.sources.encoding import IGNORE_INDEX, PIECE, Encoder, Row
from trace_unlearn.sources.records import Record, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"),
    }
)
BATCH = 256


def load_tokens(
    source: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    split: str = "train",
    limit: int | None = None,
    question_template: str | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    r"""Reads `source` and tokenises it.

    Args:
        source: a .jsonl, .json, .txt or .parquet file, or a hub name ``owner/name[:config]``.
        tokenizer: the model's.
        max_length: the most tokens of a row, at least 2.
        split: of a hub data set.
        limit: stop after this many rows (windows count one each).
        question_template: the prompt of question/answer records, with {question} in it; the answer follows after one
            space. By default they are chats of one turn where the tokenizer has a chat template, else
            "Question: {question}\\nAnswer:".
        progress: whether to show a bar.

    Returns:
        A data set of rows ``input_ids``, ``labels`` (both lists of the same length; labels[i] is input_ids[i] where
        position i-1 bears the loss of predicting it, else -100; labels[0] is always -100), ``prompt`` and ``answer``
        (of the last answer in the row; both empty for plain texts).

    Raises:
        UserError: for a source that cannot be read, a record of another form, a chat without a chat template, and a
            source without any usable record. Empty records are skipped and counted in a warning.

    >>> import json, tempfile; from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> raw = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4}, unk_token="<unk>"))
    >>> raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    >>> path = tempfile.mkdtemp() + "/forget.jsonl"
    >>> with open(path, "w") as file:
    ...     _ = file.write(json.dumps({"prompt": "a b", "completion": " c"}))
    >>> load_tokens(path, tokenizer, progress=False)[0]
    {'input_ids': [1, 2, 3, 0], 'labels': [-100, -100, 3, 0], 'prompt': 'a b', 'answer': 'c'}
    """
    check_integers({"max_length": max_length, "limit": limit}, max_length=2, limit=1)
    check_template(question_template)
    encoder = Encoder(tokenizer, max_length, question_template)
    tables: list[pa.Table] = []
    notes: Counter[str] = Counter()
    unknown = 0
    total = 0
    rows = islice(_rows(source, encoder, split, notes, progress), limit)
    while batch := list(islice(rows, 1000)):
        tables.append(pa.Table.from_pylist([row._asdict() for row in batch], schema=FEATURES.arrow_schema))
        total += sum(len(row.input_ids) for row in batch)
        if tokenizer.unk_token_id is not None:
            unknown += sum(row.input_ids.count(tokenizer.unk_token_id) for row in batch)
    for note, count in sorted((+notes).items()):
        logger.warning("%s: %d %s", source, count, note)
    if not tables:
        raise UserError(f"{source}: no usable record: nothing in it bears loss")
    if unknown > 0.2 * total:
        logger.warning(
            "%s: %.0f %% of its tokens are unknown to the tokenizer (%s): is it the right one?",
            source,
            100 * unknown / total,
            tokenizer.unk_token,
        )
    return datasets.Dataset(pa.concat_tables(tables).replace_schema_metadata(FEATURES.arrow_schema.metadata))


def _rows(
    source: str | os.PathLike[str], encoder: Encoder, split: str, notes: Counter[str], progress: bool
) -> Iterator[Row]:
    records = read_records(source, split=split)
    with tqdm(
        desc=f"tokenising {os.path.basename(source)}", unit=" records", disable=None if progress else True
    ) as bar:
        for batch in _batches(records):
            yield from encoder.encode(batch, notes)
            bar.update(len(batch))


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """At most `BATCH` records each, and no more text than is tokenised at once, or one record."""
    batch: list[Record] = []
    size = 0
    for record in records:
        length = len(str(record.value))
        if batch and (len(batch) == BATCH or size + length > PIECE):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += length
    if batch:
        yield batch


def check_template(question_template: str | None) -> None:
    """UserError for a template that does not ask."""
    if question_template is not None and "{question}" not in question_template:
        raise UserError(f"question_template: got {question_template!r}; it must hold {{question}}")


def asked(*sets: datasets.Dataset) -> str | None:
    """The prompt of the first row that has one: how questions are asked."""
    for rows in sets:
        for prompt in rows["prompt"]:
            if prompt:
                return str(prompt)
    return None


def check_positions(config: PreTrainedConfig, **sets: datasets.Dataset) -> None:
    """UserError where a row is longer than the positions that the model was made for."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    for name, rows in sets.items():
        longest = max((len(ids) for ids in rows["input_ids"]), default=0)
        if isinstance(most, int) and 0 < most < longest:
            raise UserError(
                f"max_length: {name} has rows of {longest} tokens and the model {most} positions; allowed is at most "
                f"{most}"
            )


def fingerprint(dataset: datasets.Dataset) -> str:
    """The SHA-256, in hexadecimal, of all input_ids and labels and of where rows end; other columns do not count."""
    hashes = {name: (hashlib.sha256(), hashlib.sha256()) for name in ("input_ids", "labels")}
    for batch in dataset.select_columns(list(hashes)).with_format("arrow").iter(batch_size=1000):
        for name, (lengths, values) in hashes.items():
            column = batch[name]
            lengths.update(pc.list_value_length(column).cast(pa.int64()).to_numpy().astype("<i8").tobytes())
            values.update(pc.list_flatten(column).cast(pa.int64()).to_numpy().astype("<i8").tobytes())
    whole = hashlib.sha256()
    for lengths, values in hashes.values():
        whole.update(lengths.digest() + values.digest())
    return whole.hexdigest()


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to the longest.

    The attention mask comes from the lengths, never from the ids: a padding token that is also the end-of-sequence
    token stays attended to where it is real.

    Returns:
        input_ids, attention_mask and labels, int64 [B, S]; and token_weight, float32 [B, S], when the rows have it.

    >>> collate([{"input_ids": [5, 0], "labels": [-100, 0]}, {"input_ids": [5], "labels": [-100]}], pad_token_id=0)
    {'input_ids': tensor([[5, 0],
            [5, 0]]), 'attention_mask': tensor([[1, 1],
            [1, 0]]), 'labels': tensor([[-100,    0],
            [-100, -100]])}
    """
    if not rows:
        raise ValueError("rows: got none; at least one is needed")
    padding: dict[str, tuple[float, torch.dtype]] = {
        "input_ids": (pad_token_id, torch.int64),
        "labels": (IGNORE_INDEX, torch.int64),
    }
    if any("token_weight" in row for row in rows):
        padding["token_weight"] = (0.0, torch.float32)
    lengths = [len(row["input_ids"]) for row in rows]
    columns = {}
    for name, (fill, dtype) in padding.items():
        columns[name] = torch.full((len(rows), max(lengths)), fill, dtype=dtype)
        for i, row in enumerate(rows):
            if name not in row or len(row[name]) != lengths[i]:
                given = len(row[name]) if name in row else "none"
                raise ValueError(f"rows[{i}][{name!r}]: {given} values for {lengths[i]} input_ids")
            columns[name][i, : lengths[i]] = torch.as_tensor(row[name], dtype=dtype)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": columns.pop("input_ids"), "attention_mask": mask.long(), **columns}


def loss_bearing(labels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Which positions bear loss: t does when labels[:, t+1] is not -100 and both t and t+1 are attended to.

    Args:
        labels: integer [B, S].
        attention_mask: [B, S], nonzero where a token is real; None means everywhere.

    Returns:
        bool [B, S]; the last position is always False.

    >>> loss_bearing(torch.tensor([[-100, -100, 7, 2, -100]]), torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[False,  True,  True, False, False]])
    """
    bearing = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    bearing[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    if attention_mask is not None:
        real = attention_mask != 0
        bearing[:, :-1] &= real[:, :-1] & real[:, 1:]
    return bearing


def shifted_targets(
    labels: torch.Tensor, attention_mask: torch.Tensor | None = None, token_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as the kernels take them: what position t predicts, and what its loss weighs.

    Args:
        labels: integer [B, S], -100 where no loss is borne; labels[:, t] is the token at t.
        attention_mask: [B, S], nonzero where a token is real; None means everywhere.
        token_weight: [B, S] float, of predicting t + 1 at position t, as `attach_weights` gives it; None means 1.

    Returns:
        target, int64 [B, S]: labels[:, t + 1], or -100 where position t bears no loss; weight, float32 [B, S]: 0 there.

    >>> shifted_targets(torch.tensor([[-100, 7, 2, -100]]), token_weight=torch.tensor([[0.5, 2.0, 1.0, 1.0]]))
    (tensor([[   7,    2, -100, -100]]), tensor([[0.5000, 2.0000, 0.0000, 0.0000]]))
    """
    bearing = loss_bearing(labels, attention_mask)
    target = labels.long().roll(-1, dims=1).masked_fill(~bearing, IGNORE_INDEX)
    weight = bearing.float() if token_weight is None else token_weight.float().masked_fill(~bearing, 0.0)
    return target, weight


def check_disjoint(forget: datasets.Dataset, retain: datasets.Dataset) -> int:
    """The number of forget rows that are also retain rows (same input_ids), warned about when not 0.

    Raises:
        UserError: when both sets hold the same rows, in whatever order.
    """
    forgotten, retained = _row_hashes(forget), _row_hashes(retain)
    if set(forgotten) == set(retained):
        raise UserError("the forget set equals the retain set: nothing can be forgotten and kept at once")
    shared = sum(row in retained for row in forgotten.elements())
    if shared:
        logger.warning(
            "%d of %d rows of the forget set are in the retain set too: they are trained both ways", shared, len(forget)
        )
    return shared


def check_held_out(held_out: datasets.Dataset, retain: datasets.Dataset) -> None:
    """UserError when a held-out row is among those that are trained on (same input_ids)."""
    retained = _row_hashes(retain)
    shared = sum(row in retained for row in _row_hashes(held_out).elements())
    if shared:
        raise UserError(
            f"retain_eval: {shared} of its {len(held_out)} rows are in retain too; leave them out of one of the two"
        )


def _row_hashes(dataset: datasets.Dataset) -> Counter[bytes]:
    hashes: Counter[bytes] = Counter()
    for batch in dataset.select_columns(["input_ids"]).with_format("numpy").iter(batch_size=1000):
        hashes.update(hashlib.sha256(ids.astype("<i8").tobytes()).digest() for ids in batch["input_ids"])
    return hashes
