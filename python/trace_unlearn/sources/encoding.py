"""Turns records into rows of token ids and labels; data.py says what the rows are."""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trace_unlearn.errors import UserError
from trace_unlearn.sources.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
FORMS = (
    '{"text"}, {"question", "answer"}, {"prompt", "completion"}, {"messages": [{"role", "content"}]} or plain strings'
)

QUESTION_TEMPLATE = "Question: {question}\nAnswer:"
# What templates that print the date are told: by another date the same data would be other data tomorrow.
DATE = datetime.datetime(2024, 7, 26)
PIECE = 1 << 18  # characters that are tokenised at once
OVERLAP = 2048  # characters before a piece that are encoded with it
LONGEST_TOKEN = 256  # characters; longer ones are runs of white space

ALSO = "records have more than one form: {read} is read, {other} is not"
EMPTY = "empty records skipped"
TRUNCATED = "records truncated on the right to max_length"
NO_ROOM = "records skipped: their prompt alone fills max_length"
MERGED = "records where the prompt's last token merges with the answer's first characters: the merged token bears loss"
NO_ASSISTANT = "chats skipped: no turn of the assistant"


class Row(NamedTuple):
    """One row of the data set."""

    input_ids: list[int]
    labels: list[int]
    prompt: str
    answer: str


class Pair(NamedTuple):
    """A prompt without loss, the text that continues it, and the bare answer in it."""

    prompt: str
    completion: str
    answer: str


Messages = list[dict[str, Any]]


class Encoder:
    """Encodes records with one tokenizer; what it skips or cuts it counts in `notes`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, question_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.asks_by_chat = question_template is None and bool(tokenizer.chat_template)
        self.chat_template = _dated(tokenizer.get_chat_template()) if tokenizer.chat_template else None
        self.question_template = question_template or QUESTION_TEMPLATE
        self.eos: int | None = tokenizer.eos_token_id
        self.prefix = self._tokens_before_a_text()
        if max_length <= len(self.prefix):
            raise UserError(
                f"max_length: got {max_length}; the tokenizer alone puts {len(self.prefix)} tokens before a text"
            )

    def encode(self, records: Sequence[Record], notes: Counter[str]) -> Iterator[Row]:
        """The rows of a batch of records, in order."""
        parsed = [self._parse(record, notes) for record in records]
        texts: list[str] = []
        for item in parsed:
            if isinstance(item, str) and len(item) <= PIECE:
                texts.append(item)
            elif isinstance(item, Pair):
                most = PIECE + LONGEST_TOKEN * self.max_length  # what is beyond is cut off whatever it is
                texts += [item.prompt[:most], (item.prompt + item.completion)[:most]]
        tokens = iter(self._tokenize(texts, records))
        for record, item in zip(records, parsed, strict=True):
            if isinstance(item, str):
                yield from self._windows(next(tokens) if len(item) <= PIECE else self._by_pieces(item, record), notes)
            elif isinstance(item, Pair):
                yield from self._answered(next(tokens), next(tokens), item, notes)
            else:
                yield from self._chat(record, item, notes)

    def _parse(self, record: Record, notes: Counter[str]) -> str | Pair | Messages:
        value = record.value
        if isinstance(value, str):
            return _text(record, "", value)
        if not isinstance(value, dict):
            raise UserError(f"{record.where}: got {_kind(value)}; allowed are {FORMS}")
        forms = _forms(value)
        form = forms[0] if forms else None
        for other in forms[1:]:
            notes[ALSO.format(read=_words(forms[0]), other=_words(other))] += 1
        if form == ("messages",):
            return _messages(record)
        if form == ("prompt", "completion"):
            completion = _text(record, "completion", value["completion"])
            return Pair(_text(record, "prompt", value["prompt"]), completion, completion.strip())
        if form == ("question", "answer"):
            answer = _text(record, "answer", value["answer"]).strip()
            question = _text(record, "question", value["question"]).strip()
            if self.asks_by_chat and answer:
                return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return Pair(self.question_template.replace("{question}", question), f" {answer}", answer)
        if form == ("text",):
            return _text(record, "text", value["text"])
        fields = ", ".join(repr(field) for field in value) or "none"
        raise UserError(f"{record.where}: unknown fields: got {fields}; allowed are {FORMS}")

    def _windows(self, tokens: Iterable[int], notes: Counter[str]) -> Iterator[Row]:
        """The windows of a text, whose tokens are taken as they are needed."""
        stream = iter(tokens)
        head = list(itertools.islice(stream, max(len(self.prefix), 1)))
        if not head:
            notes[EMPTY] += 1
            return
        rest = self._with_end(stream if head == self.prefix else itertools.chain(head, stream))
        context = self.prefix or list(itertools.islice(rest, 1))
        stride = self.max_length - len(context)
        chunks = iter(lambda: list(itertools.islice(rest, stride)), [])
        number = 0
        for number, (chunk, following) in enumerate(itertools.pairwise(itertools.chain(chunks, [None])), 1):
            assert chunk is not None  # which comes last
            if number > 1 and following is None and chunk == [self.eos]:
                return  # a window of its own would teach to end after nothing
            yield Row(context + chunk, [IGNORE_INDEX] * len(context) + chunk, "", "")
            if not self.prefix:
                context = chunk[-1:]
        notes[EMPTY] += number == 0

    def _with_end(self, tokens: Iterable[int]) -> Iterator[int]:
        last = None
        for last in tokens:
            yield last
        if self.eos is not None and last != self.eos:
            yield self.eos

    def _by_pieces(self, text: str, record: Record) -> Iterator[int]:
        """The tokens of a long text, a piece at a time: all of them at once take a hundred times its size.

        A piece begins before white space that follows a letter, and is encoded with some of the text before it, so that
        its tokens are those of the whole text.
        """
        if not self.tokenizer.is_fast:  # which alone tells where a token stands
            yield from self._tokenize([text], [record])[0]
            return
        start = 0
        while start < len(text):
            end = _seam(text, start + PIECE)
            before = _seam(text, max(start - OVERLAP, 0)) if start else 0
            try:
                encoded = self.tokenizer(
                    text[before:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
            except Exception as error:  # whatever a foreign tokenizer raises
                raise UserError(f"{record.where}: the tokenizer cannot encode this: {error}") from error
            for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if before + first >= start:
                    yield token
            start = end

    def _answered(self, prompt: list[int], both: list[int], pair: Pair, notes: Counter[str]) -> Iterator[Row]:
        start = _common(prompt, both)
        if not pair.answer or start == len(both):
            notes[EMPTY] += 1
            return
        notes[MERGED] += start < len(prompt)
        if both[: len(self.prefix)] != self.prefix:
            both, start = self.prefix + both, start + len(self.prefix)
        both = self._ended(both)
        bearing = [i >= start for i in range(len(both))]
        yield from self._fitted(both, bearing, pair.prompt, pair.answer, notes)

    def _chat(self, record: Record, messages: Messages, notes: Counter[str]) -> Iterator[Row]:
        if not any(message["role"] == "assistant" for message in messages):
            notes[NO_ASSISTANT] += 1
            return
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{record.where}: a chat needs a tokenizer with a chat template, and this one has none; "
                "set tokenizer.chat_template, or write the records as prompt and completion"
            )
        rendered = self._render(record, messages)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt = self._render(record, messages[:last], add_generation_prompt=True)
        tokens, bearing = self._marked_by_template(record, messages)
        if not any(bearing):
            (tokens,) = self._tokenize([rendered], [record])
            bearing = self._marked_by_difference(record, messages, rendered, tokens)
        if not any(bearing):
            notes[EMPTY] += 1
            return
        yield from self._fitted(tokens, bearing, prompt, messages[last]["content"].strip(), notes)

    def _marked_by_template(self, record: Record, messages: Messages) -> tuple[list[int], list[bool]]:
        """The tokens and which of them the template's generation blocks mark; nothing without such blocks."""
        if not self.tokenizer.is_fast or not re.search(r"\{%-?\s*generation\b", str(self.chat_template)):
            return [], []
        marked = self._apply(record, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(marked["input_ids"]), [bool(bit) for bit in marked["assistant_masks"]]

    def _marked_by_difference(self, record: Record, messages: Messages, rendered: str, tokens: list[int]) -> list[bool]:
        """Marks what each turn of the assistant adds to the chat rendered up to it."""
        bearing = [False] * len(tokens)
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(record, messages[:i], add_generation_prompt=True)
            if not rendered.startswith(before):
                before = self._render(record, messages[:i])
            start = len(before)
            content = rendered.find(message["content"].strip(), start)
            if not rendered.startswith(before) or content < 0:
                raise UserError(
                    f"{record.where}: message {i + 1}: the chat template rewrites earlier turns, so the assistant's "
                    "cannot be located; use a template that marks them with {% generation %}"
                )
            through = self._render(record, messages[: i + 1])
            end = len(through)
            if not rendered.startswith(through):  # templates that drop the reasoning of earlier turns
                end = content + len(message["content"].strip())
                end += len(self._eos_after(rendered[end:]))
            else:
                end = start + len(self._without_layout(rendered[start:end]))
            first, stop = (
                _common(ids, tokens) for ids in self._tokenize([rendered[:start], rendered[:end]], [record] * 2)
            )
            bearing[first:stop] = [True] * (stop - first)
        return bearing

    def _eos_after(self, text: str) -> str:
        eos = self.tokenizer.eos_token
        return text[: text.index(eos) + len(eos)] if eos and text.lstrip().startswith(eos) else ""

    def _without_layout(self, turn: str) -> str:
        """A turn without the white space that the template puts after its end token, which no model has to generate."""
        eos = self.tokenizer.eos_token
        return turn.rstrip() if eos and turn.rstrip().endswith(eos) else turn

    def _fitted(
        self, tokens: list[int], bearing: list[bool], prompt: str, answer: str, notes: Counter[str]
    ) -> Iterator[Row]:
        notes[TRUNCATED] += len(tokens) > self.max_length
        if last_run(bearing)[0] >= self.max_length:
            prompt = answer = ""  # which is cut off as a whole
        tokens, bearing = tokens[: self.max_length], bearing[: self.max_length]
        bearing[0] = False
        if not any(bearing):
            notes[NO_ROOM] += 1
            return
        labels = [token if bears else IGNORE_INDEX for token, bears in zip(tokens, bearing, strict=True)]
        yield Row(tokens, labels, prompt, answer)

    def _ended(self, tokens: list[int]) -> list[int]:
        return tokens if self.eos is None or tokens[-1:] == [self.eos] else [*tokens, self.eos]

    def _tokens_before_a_text(self) -> list[int]:
        try:
            whole = list(self.tokenizer("a", verbose=False)["input_ids"])
            bare = list(self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
        except Exception as error:  # whatever a foreign tokenizer raises
            raise UserError(f"the tokenizer cannot encode a text: {error}") from error
        if not bare:
            return [token for token in whole if token != self.eos]
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def _tokenize(self, texts: list[str], records: Sequence[Record]) -> list[list[int]]:
        if not texts:
            return []
        try:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
        except Exception as error:  # whatever a foreign tokenizer raises
            span = records[0].where if len(records) == 1 else f"{records[0].where} to {records[-1].where}"
            raise UserError(f"{span}: the tokenizer cannot encode this: {error}") from error

    def _render(self, record: Record, messages: Messages, add_generation_prompt: bool = False) -> str:
        if not messages:
            return ""
        return str(self._apply(record, messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    def _apply(self, record: Record, messages: Messages, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)
        except Exception as error:  # templates raise what they like
            raise UserError(f"{record.where}: the chat template refuses these messages: {error}") from error


def _dated(template: str) -> str:
    """A chat template that takes every day for `DATE`; no function can be handed to it, so that its text is changed."""

    def date(found: re.Match[str]) -> str:
        return repr(DATE.strftime(found[2]))

    template = re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", date, template)
    if "strftime_now(" not in template:
        return template
    return "{% macro strftime_now(format) %}" + DATE.strftime("%d %b %Y") + "{% endmacro %}" + template


def _forms(value: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The fields of the forms that the record has, the first to be read; columns that other rows of a table need are
    null in it.
    """
    forms: list[tuple[str, ...]] = [("messages",), ("prompt", "completion"), ("question", "answer"), ("text",)]
    found = [fields for fields in forms if all(field in value for field in fields)]
    filled = [fields for fields in found if all(value[field] is not None for field in fields)]
    return filled or found[:1]


def _words(form: tuple[str, ...]) -> str:
    return " and ".join(map(repr, form))


def _seam(text: str, near: int) -> int:
    """The last position up to `near` where white space follows a letter or digit; `near` if there is none close by."""
    if near >= len(text):
        return len(text)
    for position in range(near, max(near - OVERLAP, 0), -1):
        if text[position].isspace() and text[position - 1].isalnum():
            return position
    return near


def _messages(record: Record) -> Messages:
    messages = record.value["messages"]
    if not isinstance(messages, list):
        raise UserError(f'{record.where}: field "messages" holds {_kind(messages)}; a list of messages is expected')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            got = ", ".join(map(repr, message)) if isinstance(message, dict) else _kind(message)
            raise UserError(f'{record.where}: message {i}: got {got}; each needs the fields "role" and "content"')
        for field in ("role", "content"):
            if not isinstance(message[field], str):
                raise UserError(
                    f'{record.where}: message {i}: "{field}" holds {_kind(message[field])}; text is expected'
                )
            _text(record, field, message[field])
    return messages


def _text(record: Record, field: str, value: Any) -> str:
    named = f'field "{field}"' if field else "the text"
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{record.where}: {named} holds {_kind(value)}; text is expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{record.where}: {named} holds half a surrogate pair at character {error.start + 1}"
        ) from error
    return value


def _kind(value: Any) -> str:
    kinds = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def last_run(bearing: Sequence[bool]) -> tuple[int, int]:
    """Where the last run of True begins, and where it ends; both 0 without any.

    >>> last_run([False, True, False, True, True, False])
    (3, 5)
    """
    end = max((i + 1 for i, bears in enumerate(bearing) if bears), default=0)
    return max((i + 1 for i in range(end) if not bearing[i]), default=0), end


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = zip(some, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
