import contextlib
import json
import re
from itertools import takewhile

import datasets
import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from trace_unlearn.errors import UserError
from trace_unlearn.sources import encoding
from trace_unlearn.sources.data import collate, fingerprint, load_tokens, loss_bearing

BOS, EOS = 1, 2
CORPUS = ["the capital of France is Paris .", "Who wrote it? She did, in 1984.", "Zürich — naïve 日本語 text"] * 3
WORDS = tiny.tokenizer()
NO_BOS = tiny.tokenizer(bos_token=None)
BYTES = tiny.byte_tokenizer(CORPUS)
BYTES_NO_BOS_NO_EOS = tiny.byte_tokenizer(CORPUS, bos_token=None, eos_token=None)
TOKENIZERS = [WORDS, NO_BOS, BYTES, BYTES_NO_BOS_NO_EOS]

PLAIN = "Question: {question}\nAnswer:"
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|> "
    "{% generation %}{{ m.content }} </s>{% endgeneration %}\n{% else %}<|{{ m.role }}|> {{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETS_THOUGHTS = (  # the last turn of the assistant gets a thought, earlier ones lose it
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' and loop.last %}thought {% endif %}"
    "{{ m.content }} </s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def load(folder, name, content, tokenizer=WORDS, **options):
    return load_tokens(write(folder, name, content), tokenizer, **{"progress": False, **options})


def ids(text, tokenizer=WORDS):
    return tokenizer(text, add_special_tokens=False).input_ids


def refused(folder, name, content, match, **options):
    with pytest.raises(UserError, match=match):
        load(folder, name, content, **options)


def chat_tokenizer(template):
    roles = ["<|user|>", "<|assistant|>", "<|system|>", "thought"]
    return tiny.tokenizer(words=[*tiny.WORDS, *roles], chat_template=template)


# what the rows are


def test_question_and_answer_by_hand(tmp_path):
    data = load(tmp_path, "qa.jsonl", lines({"question": "what is w1 ?", "answer": " w2 w3 ", "id": 7}))
    prompt = ids("Question: what is w1 ? Answer:")
    assert data[0] == {
        "input_ids": [BOS, *prompt, *ids("w2 w3"), EOS],
        "labels": [-100] * (1 + len(prompt)) + [*ids("w2 w3"), EOS],
        "prompt": "Question: what is w1 ?\nAnswer:",
        "answer": "w2 w3",
    }
    assert data.column_names == ["input_ids", "labels", "prompt", "answer"]


def test_question_template(tmp_path):
    record = lines({"question": "{w1}", "answer": "w2"})
    data = load(tmp_path, "qa.jsonl", record, question_template="the {question} is")
    assert data[0]["prompt"] == "the {w1} is"
    refused(tmp_path, "qa.jsonl", record, r"question_template: got 'the'", question_template="the")


def test_prompt_and_completion_are_joined_as_they_are(tmp_path):
    data = load(
        tmp_path, "pc.jsonl", lines({"prompt": "w1 w2", "completion": " w3"}, {"prompt": "", "completion": "w4 w5"})
    )
    assert data[0]["input_ids"] == [BOS, *ids("w1 w2 w3"), EOS]
    assert data[0]["labels"] == [-100, -100, -100, *ids("w3"), EOS]
    assert data[1]["labels"] == [-100, *ids("w4 w5"), EOS]


def test_a_prompt_that_merges_with_its_answer_is_counted_and_the_merged_token_bears_loss(tmp_path, caplog):
    data = load(tmp_path, "pc.jsonl", lines({"prompt": "w1 w", "completion": "2 w3"}))
    assert data[0]["labels"] == [-100, -100, *ids("w2 w3"), EOS]
    assert "1 records where the prompt's last token merges" in caplog.text


def test_text_window_by_hand(tmp_path):
    text = "w1 w2 w3 w4 w5 w6 w7"
    data = load(tmp_path, "a.jsonl", lines({"text": text}), max_length=4)
    assert data["input_ids"][:] == [[BOS, *ids("w1 w2 w3")], [BOS, *ids("w4 w5 w6")], [BOS, *ids("w7"), EOS]]
    assert data["labels"][0] == [-100, *ids("w1 w2 w3")]
    assert data["prompt"][:] == data["answer"][:] == ["", "", ""]
    overlapping = load(tmp_path, "a.jsonl", lines({"text": text}), NO_BOS, max_length=4)
    assert [NO_BOS.decode(row) for row in overlapping["input_ids"]] == ["w1 w2 w3 w4", "w4 w5 w6 w7"]
    assert [row[0] for row in overlapping["labels"]] == [-100, -100]


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.json", '["w1 w2", "w3"]'),
        ("records.json", '[{"text": "w1 w2"}, {"text": "w3"}]'),
        ("misnamed.json", '{"text": "w1 w2"}\n\n"w3"\n'),
        ("bom.jsonl", b"\xef\xbb\xbf" + b'"w1 w2"\r\n"w3"\r\n'),
        ("mixed.jsonl", '"w1 w2"\n{"text": "w3"}'),
    ],
)
def test_every_layout_of_plain_texts(tmp_path, name, content):
    assert load(tmp_path, name, content)["input_ids"][:] == [[BOS, *ids("w1 w2"), EOS], [BOS, *ids("w3"), EOS]]


def test_txt_is_one_document_and_parquet_rows_are_records(tmp_path):
    assert load(tmp_path, "a.txt", "w1 w2\n\nw3")["input_ids"][:] == [[BOS, *ids("w1 w2 w3"), EOS]]
    parquet.write_table(pa.table({"question": ["w1", "w2"], "answer": ["w3", None]}), tmp_path / "a.parquet")
    assert load_tokens(tmp_path / "a.parquet", WORDS, progress=False)["answer"][:] == ["w3"]


def test_columns_that_other_rows_need_are_null(tmp_path):
    row = {"messages": None, "prompt": None, "completion": None, "question": "w1", "answer": "w2", "text": None}
    assert load(tmp_path, "a.jsonl", json.dumps(row))["answer"][:] == ["w2"]
    row = {**row, "question": None, "answer": None, "text": "w1 w2"}
    assert load(tmp_path, "b.jsonl", json.dumps(row))["input_ids"][:] == [[BOS, *ids("w1 w2"), EOS]]


def test_a_single_record_is_a_json_file_too(tmp_path):
    assert len(load(tmp_path, "one.json", '{"text": "w1"}')) == 1


def test_only_line_feeds_end_a_line(tmp_path):
    data = load(tmp_path, "a.jsonl", json.dumps({"text": "é\u2028é"}, ensure_ascii=False), BYTES)
    assert BYTES.decode(data[0]["input_ids"], skip_special_tokens=True) == "é\u2028é"


def test_special_tokens_written_in_a_text_are_not_doubled(tmp_path):
    plain = load(tmp_path, "a.json", json.dumps(["w1 w2", {"prompt": "w1", "completion": " w2"}]))
    written = ["<s> w1 w2 </s>", {"prompt": "<s> w1", "completion": " w2 </s>"}]
    assert fingerprint(load(tmp_path, "b.json", json.dumps(written))) == fingerprint(plain)


def test_limit_counts_rows_and_reads_no_further(tmp_path):
    assert len(load(tmp_path, "a.jsonl", lines("w1 w2 w3 w4", "w5"), max_length=3, limit=2)) == 2
    many = lines(*["w1"] * 5000) + "not JSON"
    assert len(load(tmp_path, "b.jsonl", many, limit=10)) == 10


def test_records_too_long_are_truncated_and_those_without_room_skipped(tmp_path, caplog):
    records = lines(
        {"prompt": "w1 w2", "completion": " w3 w4 w5"},
        {"prompt": "w1 w2 w3 w4 w5", "completion": " w6"},
        {"prompt": "w1", "completion": " "},
        {"text": " "},
        {"text": None},
    )
    data = load(tmp_path, "a.jsonl", records, max_length=5)
    assert data["input_ids"][:] == [[BOS, *ids("w1 w2 w3 w4")]]
    assert data["answer"][:] == ["w3 w4 w5"]
    assert "2 records truncated on the right to max_length" in caplog.text
    assert "1 records skipped: their prompt alone fills max_length" in caplog.text
    assert "3 empty records skipped" in caplog.text


def test_pad_equal_to_eos_never_masks_a_real_eos(tmp_path):
    tokenizer = tiny.tokenizer(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = load(tmp_path, "a.jsonl", lines("w1", "w1 w2 w3"), tokenizer)
    batch = collate(list(data), tokenizer.pad_token_id)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist() == [-100, data[0]["input_ids"][1], tokenizer.eos_token_id, -100, -100]
    assert loss_bearing(batch["labels"], batch["attention_mask"]).sum(1).tolist() == [2, 4]


# What stands for a special token is one; test_special_tokens_written_in_a_text_are_not_doubled has those.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(
    lambda text: not any(special in text for special in ("<pad>", "<s>", "</s>", "<unk>"))
)


@settings(max_examples=80, deadline=None)
@given(texts, st.integers(2, 9), st.sampled_from(TOKENIZERS))
def test_windows_give_back_the_tokens_of_a_text(tmp_path_factory, text, max_length, tokenizer):
    path = write(tmp_path_factory.mktemp("t"), "a.json", json.dumps([text, "w1 w2"]))
    data = load_tokens(path, tokenizer, max_length=max_length, progress=False)
    ending = [tokenizer.eos_token_id] if tokenizer.eos_token else []
    bearing = [[token for token in row if token != -100] for row in data["labels"]]
    found = [token for row in bearing for token in row]
    expected = []
    stride = max_length - 1
    for piece in (text, "w1 w2"):
        tokens = ids(piece, tokenizer)
        if tokenizer.bos_token is None:
            tokens = tokens[1:]
        alone = len(tokens) % stride == 0 and len(tokens) > 0  # the end-of-sequence token would be a window of its own
        expected += tokens + ([] if alone or not ids(piece, tokenizer) else ending)
    assert found == expected
    for row in data:
        assert 2 <= len(row["input_ids"]) <= max_length
        assert len(row["labels"]) == len(row["input_ids"])
        assert row["labels"][0] == -100
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@settings(max_examples=80, deadline=None)
@given(texts, texts, st.integers(2, 40), st.sampled_from(TOKENIZERS))
def test_prompts_never_bear_loss_and_completions_always_do(tmp_path_factory, prompt, completion, max_length, tokenizer):
    path = write(
        tmp_path_factory.mktemp("t"), "a.json", json.dumps([{"prompt": prompt, "completion": completion}, "w1 w2"])
    )
    data = load_tokens(path, tokenizer, max_length=max_length, progress=False)
    whole, alone = ids(prompt + completion, tokenizer), ids(prompt, tokenizer)
    begin = [BOS] if tokenizer.bos_token else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token else []
    kept_of_prompt = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, alone, strict=False))]
    first = max(1, len(begin + kept_of_prompt))
    expected = (begin + whole + end)[:max_length]
    rows = [row for row in data if row["answer"]]
    if not completion.strip() or kept_of_prompt == whole or first >= len(expected):
        assert rows == []
    else:
        assert [row["input_ids"] for row in rows] == [expected]
        assert rows[0]["labels"] == [-100] * first + expected[first:]


# chats


CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": "w4"},
    {"role": "assistant", "content": "w5 w6"},
]


def bearing_words(tokenizer, row):
    return [tokenizer.convert_ids_to_tokens(label) if label != -100 else "-" for label in row["labels"]]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistants_turns_bear_loss(tmp_path, template):
    tokenizer = chat_tokenizer(template)
    data = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer)
    end = "- " if template == CHATML else ""  # of the user's turns
    assert bearing_words(tokenizer, data[0]) == f"- - - {end}- w3 </s> - - {end}- w5 w6 </s>".split()
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert data[0]["input_ids"] == ids(rendered, tokenizer)
    assert data[0]["answer"] == "w5 w6"
    assert data[0]["prompt"] + " w5 w6" in rendered


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    tokenizer = chat_tokenizer(FORGETS_THOUGHTS)
    data = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer)
    assert bearing_words(tokenizer, data[0]) == ["-"] * 5 + ["w3", "</s>"] + ["-"] * 4 + ["thought", "w5", "w6", "</s>"]


def test_the_layout_after_a_turn_bears_no_loss(tmp_path):
    tokenizer = tiny.byte_tokenizer(CORPUS)
    tokenizer.chat_template = CHATML
    data = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer)
    kept = [label for label in data[0]["labels"] if label != -100]
    assert tokenizer.decode(kept) == " w3 </s> w5 w6 </s>"
    tokenizer.chat_template = CHATML.replace(
        "{{ m.content }} </s>", "{{ m.content }} ;"
    )  # turns end without a special token
    data = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer)
    kept = [label for label in data[0]["labels"] if label != -100]
    assert tokenizer.decode(kept) == " w3 ;\n w5 w6 ;\n"


def test_an_answer_that_is_cut_off_as_a_whole_is_not_the_rows(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    whole = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer)[0]
    last = max(i for i, label in enumerate(whole["labels"]) if label == -100) + 1  # where the last answer begins
    for length, answer in ((last, ""), (last + 1, "w5 w6")):
        row = load(tmp_path, "chat.jsonl", lines({"messages": CHAT}), tokenizer, max_length=length)[0]
        assert (row["answer"], len(row["input_ids"])) == (answer, length)
        assert any(label != -100 for label in row["labels"])


def test_chats_that_cannot_be_used(tmp_path, caplog):
    refused(tmp_path, "a.jsonl", lines({"messages": CHAT}), r"a\.jsonl: line 1: .*no|none.*chat template")
    tokenizer = chat_tokenizer(CHATML)
    load(tmp_path, "a.jsonl", lines({"messages": CHAT[:1]}, {"messages": CHAT}), tokenizer)
    assert "1 chats skipped: no turn of the assistant" in caplog.text
    refused(
        tmp_path, "a.jsonl", lines({"messages": "hello"}), r'line 1: field "messages" holds a str', tokenizer=tokenizer
    )
    wrong = {"messages": [CHAT[0], {"from": "gpt", "value": "w1"}]}
    refused(
        tmp_path, "a.jsonl", lines(wrong), r"line 1: message 2: got 'from', 'value'; each needs", tokenizer=tokenizer
    )
    parts = {"messages": [{"role": "user", "content": [{"type": "text"}]}]}
    refused(
        tmp_path, "a.jsonl", lines(parts), r'message 1: "content" holds a list; text is expected', tokenizer=tokenizer
    )
    strict = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    refused(
        tmp_path, "a.jsonl", lines({"messages": CHAT}), "line 1: the chat template refuses.*alternate", tokenizer=strict
    )
    shout = chat_tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    refused(
        tmp_path, "a.jsonl", lines({"messages": CHAT}), "line 1: message 2: the chat template rewrites", tokenizer=shout
    )


# questions by the chat template


def test_questions_are_asked_by_the_chat_template(tmp_path):
    tokenizer = chat_tokenizer(CHATML)
    asked = load(tmp_path, "a.jsonl", lines({"question": " w1 w2 ", "answer": "w3 "}), tokenizer)
    said = load(tmp_path, "b.jsonl", lines({"messages": CHAT[:2]}), tokenizer)
    assert asked[0] == said[0]
    plain = load(tmp_path, "a.jsonl", lines({"question": "w1", "answer": "w3"}), tokenizer, question_template=PLAIN)
    assert plain[0]["prompt"] == "Question: w1\nAnswer:"


def test_an_empty_answer_is_skipped_with_a_chat_template_too(tmp_path, caplog):
    tokenizer = chat_tokenizer(CHATML)
    records = lines({"question": "w1", "answer": " "}, {"question": "w1", "answer": "w3"})
    assert len(load(tmp_path, "a.jsonl", records, tokenizer)) == 1
    assert "1 empty records skipped" in caplog.text


@pytest.mark.parametrize(
    "today",
    [
        "{{ strftime_now('%d %B %Y') }}",
        "{% if day is not defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}",
        "{% set format = '%d %b %Y' %}{{ strftime_now(format) }}",
    ],
)
def test_a_template_that_prints_the_date_gives_the_same_data_every_day(today, tmp_path):
    tokenizer = tiny.byte_tokenizer(CORPUS)
    tokenizer.chat_template = today + CHATML
    row = load(tmp_path, "a.jsonl", lines({"question": "w1", "answer": "w3"}), tokenizer)[0]
    assert re.match(r"26 July? 2024", row["prompt"])


def test_other_forms_in_a_record_are_counted(tmp_path, caplog):
    record = {"text": "w9", "question": "w1", "answer": "w2"}
    data = load(tmp_path, "a.jsonl", lines(record, {"question": "w1", "answer": "w3"}))
    assert len(data) == 2
    assert "1 records have more than one form: 'question' and 'answer' is read, 'text' is not" in caplog.text


# long texts


@pytest.mark.parametrize("special", [{}, {"bos_token": None}])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(special, tmp_path, monkeypatch):
    tokenizer = tiny.byte_tokenizer(CORPUS, **special)
    text = "".join(f"{CORPUS[i % len(CORPUS)]}, caf\u00e9 {i}.\n\n  and {i} more" for i in range(60))
    whole = load(tmp_path, "a.txt", text, tokenizer, max_length=16)
    monkeypatch.setattr(encoding, "PIECE", 100)
    monkeypatch.setattr(encoding, "OVERLAP", 40)
    pieces = load(tmp_path, "a.txt", text, tokenizer, max_length=16)
    assert pieces["input_ids"][:] == whole["input_ids"][:]
    assert pieces["labels"][:] == whole["labels"][:]


def test_a_limit_reads_no_more_of_a_text_than_it_needs(tmp_path, monkeypatch):
    tokenizer = tiny.byte_tokenizer(CORPUS)
    seen = []
    encode = type(tokenizer).__call__

    def counted(self, text, *arguments, **options):
        seen.append(len(text) if isinstance(text, str) else sum(map(len, text)))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    text = "w1 w2 w3 " * 400_000  # 3.6 MB in one line
    rows = load(tmp_path, "a.jsonl", lines({"text": text}, {"text": text}), tokenizer, limit=4, max_length=32)
    assert len(rows) == 4
    assert sum(seen) < 300_000
    for record in ({"question": "w1", "answer": text}, {"prompt": text, "completion": "w1"}):
        seen.clear()
        with contextlib.suppress(UserError):  # a prompt that leaves no room for the answer
            load(tmp_path, "b.jsonl", lines(record), tokenizer, max_length=32)
        assert sum(seen) < 1_000_000


# what is refused


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("a.jsonl", '{"text": "w1"}\n{"text": }\n', r"a\.jsonl: line 2, column 10: not valid JSON"),
        ("a.jsonl", '"w1"\n\n["w1"]\n', r"a\.jsonl: line 3: a list; in \.jsonl each line is one record"),
        ("a.jsonl", '[\n"w1"\n]\n', r"a\.jsonl: line 1, column 2: not valid JSON"),
        ("a.json", '[\n  "w1",\n  "w2"\n', r"a\.json: line 4, column 1: not valid JSON"),
        ("a.json", '{"text": "w1"}\n{"text": "w2"\n', r"a\.json: line 2, column 14: not valid JSON"),
        ("a.json", '{"text": "w1"} x\n', r"a\.json: line 1, column 16: not valid JSON: Extra data"),
        ("a.json", "[" * 100000, r"a\.json: (line 1: JSON nested too deeply|line 1, column 100001)"),
        ("a.jsonl", b'"w1"\n"w\xff"\n', r"a\.jsonl: line 2, byte 3: not UTF-8 text"),
        ("a.txt", b"w1\n\nab\xffcd", r"a\.txt: line 3, byte 3: not UTF-8 text"),
        ("a.txt", b"w1\nw\0", r"a\.txt: line 2: holds a NUL byte"),
        ("a.jsonl", "", r"a\.jsonl: the file is empty"),
        ("a.json", " \n", r"a\.json: the file is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl: no usable record"),
        ("a.json", "[]", r"a\.json: no usable record"),
        ("a.txt", "\n", r"a\.txt: no usable record"),
        (
            "a.csv",
            "text\nw1\n",
            r"a\.csv: cannot read \.csv; give a \.jsonl, \.json, \.txt or \.parquet file.*read_csv",
        ),
        ("a.tsv", "text\nw1\n", r"cannot read \.tsv; .*read_csv\('a\.tsv', sep='\\t'\)\.to_json\('a\.jsonl'"),
        ("a.jsonl", b"\0\0\0\0", r"a\.jsonl: line 1, column 1: not valid JSON"),
        ("a.xlsx", "PK", r"a\.xlsx: cannot read \.xlsx; .*read_excel.*to_json\('a\.jsonl'"),
        ("a.jsonl", '"w1"'.encode("utf-16"), r"a\.jsonl: UTF-16 text; save it as UTF-8"),
        ("a.json", '["w1"]'.encode("utf-16-le"), r"a\.json: UTF-16 text"),
        ("a.txt", "w1 w2".encode("utf-16-be"), r"a\.txt: UTF-16 text"),
        ("a.jsonl", '"w1"\n{"text": "w1", "text": "w2"}', r"a\.jsonl: line 2: the field 'text' is there twice"),
        ("a.json", '[{"text": "w1", "text": "w2"}]', r"a\.json: the field 'text' is there twice"),
        ("noise", "w1", r"noise: cannot read a file without a suffix"),
        ("a.parquet", b"PAR1 garbage PAR1", r"a\.parquet: not a readable parquet file"),
        ("a.json", '["w1", 7]', r"a\.json: item 2: got a number; allowed are"),
        ("a.json", '["w1", ["w2"]]', r"a\.json: item 2: got a list; allowed are"),
        ("a.json", '{"data": ["w1"]}', r"a\.json: unknown fields: got 'data'; allowed are .*\"text\""),
        ("a.jsonl", '{"prompt": "w1", "answer": "w2"}', r"line 1: unknown fields: got 'prompt', 'answer'; allowed are"),
        ("a.jsonl", "{}", r"line 1: unknown fields: got none; allowed are"),
        ("a.jsonl", '{"text": 5}', r'line 1: field "text" holds a number; text is expected'),
        ("a.jsonl", '{"question": "w1", "answer": ["w2"]}', r'line 1: field "answer" holds a list; text is expected'),
        ("a.jsonl", r'"w1 \ud800"', r"line 1: the text holds half a surrogate pair at character 4"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    refused(tmp_path, name, content, match)


def test_bad_sources(tmp_path, monkeypatch):
    def refuses(source, match):
        with pytest.raises(UserError, match=match):
            load_tokens(source, WORDS, progress=False)

    write(tmp_path, "forget.jsonl", '"w1"')
    refuses(tmp_path, r"a folder; name one file \(it holds forget\.jsonl\)")
    refuses(
        tmp_path / "absent.jsonl",
        r"absent\.jsonl: no such file; give a \.jsonl, .* or the name of a data set on the hub",
    )
    refuses("data/absent.jsonl", r"data/absent\.jsonl: no such file; give")
    refuses("absent", "absent: no such file; give")
    refuses("nobody/nothing:config", r"nobody/nothing:config: no such file, and the hub gave no data set")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    refuses(tmp_path / "dangling.txt", "no such file")


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_length": 2.5}, {"max_length": True}, {"limit": 0}])
def test_bad_options(tmp_path, options):
    (name,) = options
    refused(tmp_path, "a.jsonl", '"w1"', rf"{name}: got {options[name]!r}, allowed are integers from", **options)


def test_hub_data(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["w1", "w2"], "title": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_tokens("owner/name:config", WORDS, split="test", progress=False)
    assert asked == [("owner/name", "config", "test")]
    assert data["input_ids"][:] == [[BOS, *ids("w1"), EOS], [BOS, *ids("w2"), EOS]]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"body": ["w1"]}))
    with pytest.raises(UserError, match=r"owner/name \[train\]: row 1: unknown fields: got 'body'"):
        load_tokens("owner/name", WORDS, progress=False)


def test_a_tokenizer_that_knows_no_word_is_warned_about(tmp_path, caplog):
    load(tmp_path, "a.txt", "these words are all foreign here")
    assert "a.txt: 75 % of its tokens are unknown to the tokenizer (<unk>)" in caplog.text
