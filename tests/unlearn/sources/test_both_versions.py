"""What transformers 4 reads in a checkpoint of transformers 5. OLDER_TRANSFORMERS names an interpreter with it."""

import json
import os
import subprocess

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trace_unlearn.sources.both_versions import write_for_both_versions

OLDER = os.environ.get("OLDER_TRANSFORMERS", "")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0}


def written(folder, family="qwen3_moe", **changes):
    tiny.save_checkpoint(folder, family, **changes)
    before = AutoConfig.from_pretrained(folder).to_dict()
    write_for_both_versions(folder)
    assert AutoConfig.from_pretrained(folder).to_dict() == before
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_for_both_versions(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    return json.loads((folder / "config.json").read_text())


def test_rotary_base_and_scaling_under_their_old_names(tmp_path):
    plain = written(tmp_path / "plain", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert (plain["rope_theta"], plain["rope_scaling"]) == (500000.0, None)
    scaled = written(tmp_path / "scaled", rope_parameters=YARN)
    assert scaled["rope_theta"] == 500000.0
    assert scaled["rope_scaling"] == {name: YARN[name] for name in YARN if name != "rope_theta"}
    assert scaled["rope_parameters"] == YARN


def test_dtype_and_experts_under_their_old_names(tmp_path):
    found = written(tmp_path / "model")
    assert found["torch_dtype"] == found["dtype"] == "float32"
    assert found["num_experts"] == tiny.NUM_EXPERTS


def config_after(tmp_path, **content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    write_for_both_versions(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_layers_of_two_kinds_and_parts(tmp_path):
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    found = config_after(tmp_path, text_config={"model_type": "gemma3_text", "rope_parameters": kinds})["text_config"]
    assert found["rope_theta"] == 1e6
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert found["rope_local_base_freq"] == 1e4
    assert found["rope_parameters"] == kinds


def test_names_of_gpt_neox(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
    found = config_after(tmp_path, model_type="gpt_neox", rope_parameters=rope)
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (2e4, 0.5)


def test_what_is_stated_stays(tmp_path):
    found = config_after(tmp_path, model_type="llama", rope_theta=7.0, rope_parameters={"rope_theta": 9.0})
    assert found["rope_theta"] == 7.0


def test_tokenizers(tmp_path):
    tokenizer = tiny.tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    tokenizer.save_pretrained(tmp_path)
    write_for_both_versions(tmp_path)
    found = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["chat_template"] == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("w1 <x> w2")["input_ids"] == tokenizer("w1 <x> w2")["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_a_folder_without_either(tmp_path):
    write_for_both_versions(tmp_path)
    assert not list(tmp_path.iterdir())


READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.arange(4, 60)[None]
torch.save(model(input_ids=ids).logits.detach(), sys.argv[2])
"""


@pytest.mark.skipif(not OLDER, reason="OLDER_TRANSFORMERS names no interpreter with transformers 4")
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500000.0}, YARN], ids=["base", "yarn"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama"])
def test_an_older_transformers_computes_the_same(family, rope, tmp_path):
    folder = tmp_path / "model"
    # Without a head_dim, Mixtral with YaRN fails in transformers 5 itself.
    written(folder, family, rope_parameters=rope, head_dim=8)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [OLDER, "-c", READ, str(folder), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "does not recognize this architecture" in done.stderr:
        pytest.skip("it does not know this family")
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model(input_ids=torch.arange(4, 60)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
