import json
import logging
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trace_unlearn.errors import UserError
from trace_unlearn.sources.model import check_inputs, load_model, load_tokenizer


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of a checkpoint, to be damaged."""

    def build(family="qwen3_moe", **changes):
        folder = tmp_path / f"{family}-copy"
        shutil.copytree(checkpoint(family, **changes), folder)
        return folder

    return build


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_every_family_loads_as_saved(checkpoint, family):
    folder = checkpoint(family)
    assert check_inputs(folder).model_type == family
    model = load_model(folder)
    tokenizer = load_tokenizer(folder, model)
    assert not model.training
    assert model.dtype == torch.float32
    original = tiny.model(family, len(tokenizer))
    for (name, loaded), (_, made) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(loaded, made), name
    text = "the capital of w1 is w2"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_dtype(checkpoint, tmp_path):
    folder = checkpoint("mixtral")
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    load_model(folder, dtype=torch.float16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float16
    with pytest.raises(UserError, match="dtype: got 'int8'; allowed are auto, float32, bfloat16, float16"):
        load_model(folder, dtype="int8")


def test_device_and_device_map(checkpoint):
    folder = checkpoint("olmoe")
    assert load_model(folder, device="cpu").device == torch.device("cpu")
    assert load_model(folder, device_map="cpu").device == torch.device("cpu")
    with pytest.raises(UserError, match="device and device_map: got both"):
        load_model(folder, device="cpu", device_map="auto")
    with pytest.raises(UserError, match="device: got 'gpu9'; it is not there"):
        load_model(folder, device="gpu9")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device: got 'cuda'; it is not there"):
            load_model(folder, device="cuda")


def test_a_dense_model_is_refused_before_its_weights_are_read(checkpoint, tmp_path):
    folder = checkpoint("llama")
    with pytest.raises(UserError, match=r"a dense model \(llama\): its configuration names no experts"):
        check_inputs(folder)
    assert check_inputs(folder, moe=False).model_type == "llama"
    assert load_model(folder).config.model_type == "llama"


def test_places_without_a_checkpoint(tmp_path):
    for call in (check_inputs, load_model, load_tokenizer):
        with pytest.raises(UserError, match=r"absent: no such folder"):
            call(tmp_path / "absent")
        with pytest.raises(UserError, match=r"nobody/nothing: no such folder, the hub .* cannot be asked"):
            call("nobody/nothing")
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"file: a file; a checkpoint is a folder"):
            call(tmp_path / "file")
    with pytest.raises(UserError, match=r"no config\.json there, so no checkpoint"):
        check_inputs(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"it holds an adapter; merge it"):
        check_inputs(tmp_path)


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    content = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "theirs.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match="needs Python code of its own, which is not run here"):
        check_inputs(tmp_path, weights=False)


@pytest.mark.parametrize(
    "content, match",
    [
        ("{", r"config\.json: line 1, column 2: not valid JSON"),
        ("[]", r"config\.json: not a model's configuration"),
        ('{"model_type": "no_such_model"}', r"cannot load its configuration: .*no_such_model"),
    ],
)
def test_damaged_config(copy, content, match):
    folder = copy()
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=match):
        check_inputs(folder)


def test_missing_damaged_and_incomplete_weights(copy, checkpoint):
    folder = copy()
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is mapped, and cut below
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder)
    name = next(name for name in tensors if name.endswith("gate.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"its files lack 1 of the model's weights: {name}"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"no weights there \(\*\.safetensors or"):
        check_inputs(folder)


def test_a_missing_shard(checkpoint, tmp_path):
    load_model(checkpoint("qwen3_moe")).save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    with pytest.raises(
        UserError, match=rf"the weights are incomplete: 1 of {len(shards)} files are missing: {shards[1].name}"
    ):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: not an index of weights"):
        load_model(tmp_path)


def test_a_config_that_contradicts_the_weights(copy):
    folder = copy()
    edit(folder / "config.json", lambda config: config.update(hidden_size=64))
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder)


def test_weights_of_another_model_are_warned_about(copy, caplog):
    folder = copy()
    weights = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    save_file({**tensors, "stray.weight": torch.ones(2)}, weights, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_model(folder)
    assert "weights that the model does not have are ignored: stray.weight" in caplog.text


# tokenizers


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_a_folder_without_tokenizer(copy, family):
    folder = copy(family)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer there: none of tokenizer\.json"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_a_tokenizer_larger_than_the_embedding(checkpoint, copy):
    folder = copy()
    tiny.tokenizer(words=[f"t{i}" for i in range(200)]).save_pretrained(folder)
    config = check_inputs(folder)
    expected = rf"its token ids go up to 203, and the embedding has {config.vocab_size} rows"
    for model in (config, load_model(folder)):
        with pytest.raises(UserError, match=expected):
            load_tokenizer(folder, model)
    assert len(load_tokenizer(folder)) == 204


def test_a_tokenizer_that_just_fits(tmp_path):
    words = tiny.tokenizer()
    words.save_pretrained(tmp_path)
    load_tokenizer(tmp_path, tiny.config("mixtral", len(words)))
    with pytest.raises(UserError, match="the tokenizer does not match the model"):
        load_tokenizer(tmp_path, tiny.config("mixtral", len(words) - 1))


def test_a_tokenizer_much_smaller_than_the_embedding_is_warned_about(checkpoint, caplog, tmp_path):
    tiny.tokenizer(words=["a", "b"]).save_pretrained(tmp_path)
    load_tokenizer(tmp_path, check_inputs(checkpoint("qwen3_moe")))
    assert "the tokenizer has 6 tokens and the embedding" in caplog.text


@pytest.mark.parametrize(
    "special, expected", [({"pad_token": None}, "</s>"), ({"pad_token": None, "eos_token": None}, "<s>")]
)
def test_padding_falls_back(tmp_path, special, expected):
    tiny.tokenizer(**special).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == expected
