"""Names on the hub where it does not answer: a cache is made by hand, in the layout of huggingface_hub."""

import datasets
import pytest
import tiny
from huggingface_hub import constants

from trace_unlearn.errors import UserError
from trace_unlearn.sources import hub
from trace_unlearn.sources.data import load_tokens
from trace_unlearn.sources.model import check_inputs, load_model, load_tokenizer

CARD = """---
configs:
- config_name: forget
  data_files: [{split: train, path: forget.jsonl}]
- config_name: retain
  data_files: [{split: train, path: retain.jsonl}]
---
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """Gives the empty folder of a downloaded repository; the hub does not answer."""

    def no_network():
        asked.append(1)
        raise ConnectionError("no network")

    asked = []
    monkeypatch.setattr(hub.huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "_ask", no_network)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    hub._say.cache_clear()

    def make(kind, name):
        folder = tmp_path / "hub" / f"{kind}s--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return folder / "snapshots" / ("0" * 40)

    yield make
    assert asked


def test_a_downloaded_model_is_loaded(snapshot, caplog):
    tiny.save_checkpoint(snapshot("model", "someone/tiny"), "qwen3_moe")
    assert check_inputs("someone/tiny").model_type == "qwen3_moe"
    model = load_model("someone/tiny", device="cpu")
    assert load_tokenizer("someone/tiny", model).vocab_size == len(tiny.tokenizer())
    assert caplog.text.count("does not answer (no network): only what is cached is used") == 1


def test_an_incomplete_download_is_named(snapshot):
    folder = snapshot("model", "someone/tiny")
    tiny.save_checkpoint(folder, "qwen3_moe")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights there"):
        check_inputs("someone/tiny")


def test_downloaded_data_are_read(snapshot):
    folder = snapshot("dataset", "someone/facts")
    (folder / "README.md").write_text(CARD)
    for name, word in (("forget", "w1"), ("retain", "w2")):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{word} w3"}}\n')
    tokenizer = tiny.tokenizer()
    for name, word in (("forget", "w1"), ("retain", "w2")):
        (row,) = load_tokens(f"someone/facts:{name}", tokenizer, progress=False)
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True).split() == [word, "w3"]
    with pytest.raises(UserError, match="no data set of this name with the split 'test'"):
        load_tokens("someone/facts:forget", tokenizer, split="test", progress=False)
    assert not datasets.config.HF_HUB_OFFLINE or constants.HF_HUB_OFFLINE


def test_what_is_not_cached_is_said_at_once(snapshot):
    with pytest.raises(UserError, match=r"no/model: no such folder, the hub \(http.*\) cannot be asked"):
        load_model("no/model")
    with pytest.raises(UserError, match="no/data: no such file, and the hub gave no data set"):
        load_tokens("no/data", tiny.tokenizer(), progress=False)
