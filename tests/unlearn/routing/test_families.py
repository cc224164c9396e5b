"""RoutingRecorder on every MoE family that the installed transformers has.

The families are found in its source, so that a new one is tested, or fails until it is listed.
"""

from __future__ import annotations

import families
import family_table
import pytest
import torch
from activations import activations

from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers

#: Families that RoutingRecorder refuses, and a part of the reason that it gives.
REFUSED = {"nllb_moe": "experts 0 and 1 whatever the router chose"}

ALL = families.families()
OBSERVED = [family for family in ALL if family.module not in REFUSED]


def tokens_that_count(given, name="attention_mask"):
    return given[name].flatten().bool()


def used_experts(family, layer, seen, given):
    """[B * S, E] bool, from the weights that matter."""
    used = seen.of(layer.name, layer.num_experts)
    if family.module == "ernie4_5_vl_moe":  # each kind of tokens has its own experts
        vision = given["moe_mm_token_type_ids"].flatten().bool()
        every = torch.zeros(vision.shape[0], layer.num_experts, dtype=torch.bool)
        every[vision if ".vision_moe." in layer.name else ~vision] = used
        return every
    return used


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("family", OBSERVED, ids=str)
def test_counts_scores_and_routes_are_those_of_the_experts_used(family, pad):
    model = families.build(family)
    given = families.inputs(family, model, pad)
    layers = moe_layers(model)
    E = max(layer.num_experts for layer in layers)
    seq2seq = model.config.is_encoder_decoder
    table = None if seq2seq else torch.randn(len(layers), E, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), activations(model) as seen, RoutingRecorder(model, table, store_routes=not seq2seq) as rec:
        model(**given)
    assert sorted(layer.name for layer in rec.layers) == sorted(seen.calls)
    scores = 0.0
    for number, layer in enumerate(layers):
        used = used_experts(family, layer, seen, given)
        in_decoder = seq2seq and layer.name.startswith("decoder.")
        counting = tokens_that_count(given, "decoder_attention_mask" if in_decoder else "attention_mask")
        assert torch.equal(rec.counts[number, : layer.num_experts], used[counting].sum(0)), layer.name
        assert not rec.counts[number, layer.num_experts :].any()
        if not seq2seq:
            routes = rec.routes[:, :, number].flatten(0, 1)
            routes = routes.where(routes < layer.num_experts, -1)
            chosen = torch.zeros(routes.shape[0], E + 1, dtype=torch.bool).scatter_(1, routes + 1, True)[:, 1:]
            # Padding may be all zero, which all experts map to zero.
            assert torch.equal(chosen[counting, : layer.num_experts], used[counting]), layer.name
            scores = scores + used.float() @ table[number, : layer.num_experts]
    if not seq2seq:
        torch.testing.assert_close(rec.token_scores.flatten()[counting], scores[counting])
    # Otherwise the test could not tell one expert from another, or a slot without an expert from one with.
    assert int((rec.counts > 0).sum(1).max()) >= 3
    if family.module in ("zaya", "longcat_flash"):
        slots = int(given["attention_mask"].sum()) * model.config.num_experts_per_tok
        assert rec.counts.sum() < slots * len(layers)


@pytest.mark.parametrize("module", families.moe_modules())
def test_every_class_of_experts_is_run_or_listed(module):
    if all(family.module != module for family in ALL):
        pytest.skip("no text model, or broken in this transformers")
    built = {type(part).__name__ for f in ALL if f.module == module for part in families.build(f).modules()}
    experts = {name for name in families.classes_in(module) if name.endswith(("Experts", "CDMoE"))}
    assert experts
    assert experts <= built


#: Those that are observed by an adapter of their own, or whose routers do something that others do not.
ODD = [
    "DbrxForCausalLM",
    "DeepseekV4ForCausalLM",
    "DogeForCausalLM",
    "Gemma4ForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "JetMoeForCausalLM",
    "Llama4ForCausalLM",
    "LongcatFlashForCausalLM",
    "PhimoeForCausalLM",
    "ZayaForCausalLM",
]
odd = pytest.mark.parametrize("family", [family for family in ALL if str(family) in ODD], ids=str)


def counted(model, seen, masks):
    """[L, E] from the calls of several forwards."""
    layers = moe_layers(model)
    counts = torch.zeros(len(layers), max(layer.num_experts for layer in layers), dtype=torch.int64)
    for number, layer in enumerate(layers):
        assert len(seen.calls[layer.name]) == len(masks)
        for call, mask in enumerate(masks):
            used = seen.of(layer.name, layer.num_experts, call)
            counts[number, : layer.num_experts] += used[mask.flatten().bool()].sum(0)
    return counts


@odd
def test_bf16(family):
    model = families.build(family).to(torch.bfloat16)
    given = families.inputs(family, model)
    with torch.no_grad(), activations(model) as seen, RoutingRecorder(model) as rec:
        model(**given)
    assert torch.equal(rec.counts, counted(model, seen, [given["attention_mask"]]))


@pytest.mark.parametrize("pad", ["right", "left"])
@odd
def test_generate(family, pad):
    model = families.build(family)
    given = {**families.inputs(family, model, pad), "use_cache": True}
    with activations(model) as seen, RoutingRecorder(model) as rec:
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(rec.counts, counted(model, seen, [given["attention_mask"], *[torch.ones(3)] * 2]))


@pytest.mark.parametrize("reentrant", [False, True])
@odd
def test_gradient_checkpointing_counts_once(family, reentrant):
    model = families.build(family).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint it")
    given = families.inputs(family, model)
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)  # some routers sample in training
        with activations(model) as seen, RoutingRecorder(model) as rec:
            logits = model(**given).logits
            forward = rec.counts
            logits.float().mean().backward()
        assert torch.equal(rec.counts, forward)
        assert all(len(calls) == 1 + checkpointing for calls in seen.calls.values())  # the layers did run again
        counts.append(rec.counts)
    assert torch.equal(*counts)


@odd
def test_lora(family):
    from peft import LoraConfig, get_peft_model

    model = families.build(family)
    given = families.inputs(family, model)
    with torch.no_grad(), RoutingRecorder(model) as plain:
        model(**given)
    target = r".*\.(o_proj|kv_proj|Wqkv|out_proj)"
    lora = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.0, target_modules=target))
    assert [layer.name for layer in moe_layers(lora)] == [layer.name for layer in plain.layers]
    with RoutingRecorder(lora) as rec:
        lora(**given).logits.float().mean().backward()
    assert torch.equal(rec.counts, plain.counts)  # LoRA begins as the identity


def family_named(name):
    found = [family for family in ALL if str(family) == name]
    if not found:
        pytest.skip(f"this transformers has no {name}")
    return found[0]


def test_ernie_vl_text_alone_and_vision_alone():
    family = family_named("Ernie4_5_VLMoeTextModel")
    model = families.build(family)
    given = families.inputs(family, model)
    kinds = given.pop("moe_mm_token_type_ids")
    for vision in (None, torch.zeros_like(kinds), torch.ones_like(kinds)):
        with torch.no_grad(), RoutingRecorder(model, store_routes=True) as rec:
            model(**given, moe_mm_token_type_ids=vision)
        is_vision = vision is not None and bool(vision.any())
        expected = int(given["attention_mask"].sum()) * families.TOP_K
        for layer, counts in zip(rec.layers, rec.counts, strict=True):
            assert counts.sum() == (expected if (".vision_moe." in layer.name) == is_vision else 0)
        assert rec.routes.shape == (3, 7, len(rec.layers), families.TOP_K)


def test_encoder_decoder():
    family = family_named("SwitchTransformersForConditionalGeneration")
    model = families.build(family)
    given = families.inputs(family, model)
    with torch.no_grad(), RoutingRecorder(model) as rec:
        model(**given)
    in_encoder = torch.tensor(["encoder" in layer.name.split(".") for layer in rec.layers])
    assert in_encoder.any()
    assert not in_encoder.all()
    # Given an encoder's output, the encoder does not run. Labels stand for the decoder's tokens, unshifted.
    encoded = model.get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])
    labels = torch.randint(3, families.VOCAB, (3, 4))
    labels[0, 1:] = -100
    with torch.no_grad(), activations(model) as seen, RoutingRecorder(model) as rec:
        model(encoder_outputs=encoded, attention_mask=given["attention_mask"], labels=labels)
    assert not rec.counts[in_encoder].any()
    for number, layer in enumerate(rec.layers):
        if not in_encoder[number]:
            used = seen.of(layer.name, layer.num_experts)
            assert torch.equal(rec.counts[number], used[(labels != -100).flatten()].sum(0))

    with pytest.raises(UserError, match=r"store_routes: .*encoder and decoder see different tokens"):
        RoutingRecorder(model, store_routes=True)
    with pytest.raises(UserError, match=r"table: .*encoder and decoder see different tokens"):
        RoutingRecorder(model, torch.ones(len(rec.layers), 8))
    with pytest.raises(RuntimeError, match="ran outside a forward"), RoutingRecorder(model):
        model.generate(given["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize("family", [f for f in ALL if f.module in REFUSED], ids=str)
def test_refused(family):
    model = families.build(family)
    with pytest.raises(UserError, match=REFUSED[family.module]):
        moe_layers(model)


def test_the_page_is_up_to_date():
    written = family_table.PAGE.read_text()
    if family_table.heading() not in written:
        pytest.skip("docs/families.md was made with another transformers")
    assert written == family_table.page(), "write it again: python tests/support/family_table.py"


def test_nllb_runs_two_experts_only():
    """The reason why it is refused; once this fails, an adapter can be written."""
    family = next(f for f in ALL if f.module == "nllb_moe")
    model = families.build(family)
    with torch.no_grad(), activations(model) as seen:
        model(**families.inputs(family, model))
    assert seen.calls
    for path in seen.calls:
        used = seen.of(path, families.NUM_EXPERTS)
        assert used[:, :2].any()
        assert not used[:, 2:].any()
