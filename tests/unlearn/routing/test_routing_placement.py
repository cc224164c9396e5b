"""RoutingRecorder where a model is loaded, placed or fed otherwise than whole, on one device, a row per document."""

from __future__ import annotations

import importlib.util

import pytest
import tiny
import torch
import transformers
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from profiled import documents, run
from recorded import VOCAB, batch, count, counted, router_outputs
from second_device import SECOND, SecondDevice, move
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorWithFlattening

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.predictions import row_scores
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers


def check(model, given, **options):
    """Counts, scores and routes against what the routers returned; the recorder, for more."""
    L = len(moe_layers(model))
    table = torch.randn(L, tiny.NUM_EXPERTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model, table, store_routes=True) as rec:
        model(**given, **options)
    seen = [indices.cpu() for indices in seen]
    assert len(seen) == L
    assert torch.equal(rec.counts.cpu(), count(seen, counted(given)))
    expected = torch.stack([table[layer][indices].sum(1) for layer, indices in enumerate(seen)]).sum(0)
    torch.testing.assert_close(rec.token_scores.cpu().flatten(), expected)
    assert torch.equal(rec.routes.cpu().flatten(0, 1), torch.stack(seen, dim=1))
    return rec


@pytest.mark.parametrize("far", [[0], [1], [0, 1]])
def test_layers_on_two_devices(far):
    """As accelerate dispatches them: a hook moves what comes in, and what goes out back."""
    model = tiny.model("qwen3_moe", VOCAB, experts_implementation="eager")
    given = batch(labels=True)
    expected = check(model, given).counts
    with SecondDevice():
        for number in far:
            move(model.model.layers[number])
            add_hook_to_module(model.model.layers[number], AlignDevicesHook(SECOND, io_same_device=True))
        rec = check(model, given, use_cache=False)
        assert torch.equal(rec.counts.cpu(), expected)
        by_device = {device: state.counts.cpu() for (device, _), state in rec._states.items()}
        assert {device.type for device in by_device} == {SECOND.type if i in far else "cpu" for i in (0, 1)}
        assert (by_device[SECOND].sum(1) > 0).nonzero().flatten().tolist() == far
        rec.reset()
        assert rec.counts.cpu().sum() == 0


@pytest.mark.parametrize("kind", ["cpu", "disk", "checkpoint"])
def test_offloaded_layers(kind, tmp_path):
    plain, model = (tiny.model("deepseek_v3", VOCAB) for _ in range(2))
    parts = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "layers.2", "norm"]
    places = {f"model.{part}": "disk" if part == "layers.1" else "cpu" for part in parts} | {"lm_head": "disk"}
    if kind == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif kind == "disk":
        dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    else:
        plain.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map=places, offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    given = batch(labels=True)
    assert torch.equal(check(model, given).counts, check(plain, given).counts)
    forget, retain = documents(5, 1), documents(9, 2)
    stats, expected = (run(one, forget, retain).retain_routes for one in (model, plain))
    assert torch.equal(stats, expected)
    scores, expected = (row_scores(one, list(retain), progress=False) for one in (model, plain))
    assert [score.nll for score in scores] == pytest.approx([score.nll for score in expected])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_route_as_each_alone(model, attention):
    """Several documents in a row, no attention mask, positions that begin anew: as transformers packs them."""
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in (5, 1, 9, 3)]
    packed = dict(DataCollatorWithFlattening()([{"input_ids": row, "labels": row} for row in rows]))
    assert packed["input_ids"].shape == (1, 18)
    table = torch.randn(len(moe_layers(model)), tiny.NUM_EXPERTS, generator=generator)
    with torch.no_grad(), RoutingRecorder(model, table, store_routes=True) as alone:
        each = []
        for row in rows:
            model(input_ids=torch.tensor([row]), labels=torch.tensor([row]))
            each.append((alone.routes[0], alone.token_scores[0]))
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model, table, store_routes=True) as rec:
        model(**packed, use_cache=False)  # with a cache transformers does not keep the documents apart
    routes, scores = map(torch.cat, zip(*each, strict=True))
    assert torch.equal(rec.counts, alone.counts)
    assert torch.equal(rec.routes[0], routes)
    torch.testing.assert_close(rec.token_scores[0], scores)
    assert torch.equal(rec.routes[0], torch.stack(seen, dim=1))
    # The last token of a document has no label of its own, and the first of the next one bears -100.
    assert rec.counts[0].sum() == (4 + 0 + 8 + 2) * tiny.TOP_K


@pytest.fixture
def model(family):
    return tiny.model(family, VOCAB)


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
WIDE = {"hidden_size": 64, "num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": 32}


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_bitsandbytes(bits, family, tmp_path):
    """It quantises matrices, and leaves stacked experts and the router as they are."""
    tiny.model(family, VOCAB, **WIDE).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert "bit" in type(model.model.layers[0].self_attn.q_proj).__name__
    assert model.model.layers[0].mlp.experts.gate_up_proj.dim() == 3
    check(model, batch(labels=True))


@needs_bitsandbytes
def test_stacked_experts_in_four_bits():
    """Which bitsandbytes does on request: the experts' class and parameters are others then."""
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = tiny.model("qwen3_moe", VOCAB, **WIDE)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.replace_parameter_4bit(layer.mlp.experts, name)
    assert not any(p.dim() == 3 for p in model.model.layers[0].mlp.experts.parameters())
    check(model, batch(labels=True))


def test_experts_of_a_quantiser_are_refused_where_the_family_has_a_way_of_its_own():
    """ZAYA tells by a weight of 0 that a token skips a layer; whoever reads indices alone would count expert 0."""
    if not hasattr(transformers, "ZayaConfig"):
        pytest.skip("this transformers has no ZAYA")
    FP8Experts = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Experts

    def quantised(family, **changes):
        kind = AutoConfig.for_model(family, num_hidden_layers=2, hidden_size=32, num_experts=4, **changes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(kind)
            for path, module in list(model.named_modules()):
                if type(module).__name__.endswith("Experts"):
                    model.set_submodule(path, FP8Experts(kind))
        return model

    with pytest.raises(UserError, match="a FP8Experts, and it stands where ZayaExperts was"):
        moe_layers(quantised("zaya", num_attention_heads=4, moe_intermediate_size=16, router_hidden_size=16))
    assert [layer.num_experts for layer in moe_layers(quantised("qwen3_moe"))] == [4, 4]
