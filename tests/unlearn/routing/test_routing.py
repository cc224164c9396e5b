"""RoutingRecorder against the indices that the routers themselves returned."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tiny
import torch
from recorded import VOCAB, batch, count, counted, router_outputs
from torch import nn
from transformers import AutoModelForCausalLM

from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers


@pytest.fixture(params=tiny.FAMILIES)
def model(request):
    return tiny.model(request.param, VOCAB)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_counts_and_scores_are_those_of_the_routers(model, pad, labels):
    given = batch(pad=pad, labels=labels)
    L = len(moe_layers(model))
    table = torch.randn(L, tiny.NUM_EXPERTS)
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model, table, store_routes=True) as rec:
        model(**given)
    assert torch.equal(rec.counts, count(seen, counted(given)))
    expected = torch.stack([table[layer][indices].sum(1) for layer, indices in enumerate(seen)]).sum(0)
    torch.testing.assert_close(rec.token_scores, expected.view(3, 7))
    assert torch.equal(rec.routes, torch.stack(seen, dim=1).view(3, 7, L, tiny.TOP_K))


def test_routes_to_a_file(tmp_path):
    model = tiny.model("deepseek_v3", VOCAB)
    first, second = batch(labels=True), batch(B=2, S=5, seed=1)
    path = tmp_path / "routes.npy"
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model, store_routes=path) as rec:
        model(**first)
        model(**second)
    routes = np.load(path, mmap_mode="r")
    assert routes.dtype == np.uint8
    expected = [torch.stack(seen[at : at + 2], dim=1)[counted(g).flatten()] for at, g in ((0, first), (2, second))]
    assert np.array_equal(routes, torch.cat(expected).numpy())
    assert np.bincount(routes[:, 0].ravel(), minlength=tiny.NUM_EXPERTS).tolist() == rec.counts[0].tolist()
    with pytest.raises(UserError, match="exists already"), rec:
        pass


def test_layers_in_order():
    layers = moe_layers(tiny.model("deepseek_v3", VOCAB))
    assert [layer.layer_index for layer in layers] == [1, 2]
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in (1, 2)]
    assert all(layer.num_experts == tiny.NUM_EXPERTS for layer in layers)


def test_counts_add_up_over_forwards_and_stay_after_the_context():
    model = tiny.model("mixtral", VOCAB)
    first, second = batch(S=5), batch(B=2, S=9, seed=1, labels=True)
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model) as rec:
        model(**first)
        model(**second)
    expected = count(seen[:2], counted(first)) + count(seen[2:], counted(second))
    assert torch.equal(rec.counts, expected)
    model(**first)
    assert torch.equal(rec.counts, expected)
    with rec:
        model(**first)
    assert torch.equal(rec.counts, expected + count(seen[:2], counted(first)))
    rec.reset()
    assert rec.counts.sum() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(model, reentrant):
    given = batch(labels=True)
    with router_outputs(model) as seen:
        with RoutingRecorder(model) as plain:
            model(**given)
        forward = list(seen)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        seen.clear()
        with RoutingRecorder(model, torch.ones(len(forward), tiny.NUM_EXPERTS)) as rec:
            # Two forwards of different sizes before their backwards: the replays must find nothing to add to.
            losses = [model(**given).loss, model(**batch(B=1, S=4)).logits.mean()]
            after_forward = rec.counts
            sum(losses).backward()
    assert len(seen) == 4 * len(forward)  # the routers did run again
    assert torch.equal(rec.counts, after_forward)
    extra = count(seen[len(forward) : 2 * len(forward)], counted(batch(B=1, S=4)))
    assert torch.equal(rec.counts, plain.counts + extra)
    assert torch.equal(rec.token_scores, torch.full((1, 4), float(tiny.TOP_K * len(forward))))


def test_bf16(model):
    model.to(torch.bfloat16)
    given = batch(labels=True)
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model) as rec:
        model(**given)
    assert torch.equal(rec.counts, count(seen, counted(given)))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_generate(pad):
    model = tiny.model("qwen3_moe", VOCAB)
    given = batch(pad=pad)
    with router_outputs(model) as seen, RoutingRecorder(model) as rec:
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [len(indices) for indices in seen] == [21, 21, 3, 3, 3, 3]
    expected = count(seen[:2], counted(given))
    for step in (2, 4):
        expected += count(seen[step : step + 2], torch.ones(3, 1, dtype=torch.bool))
    assert torch.equal(rec.counts, expected)


def test_no_attention_mask_positional_arguments_and_embeddings():
    model = tiny.model("olmoe", VOCAB)
    given = batch()
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model) as rec:
        model(given["input_ids"], given["attention_mask"])
        model(inputs_embeds=model.get_input_embeddings()(given["input_ids"]))
    everyone = torch.ones(3, 7, dtype=torch.bool)
    assert torch.equal(rec.counts, count(seen[:2], counted(given)) + count(seen[2:], everyone))


def test_mask_next_holds_for_one_forward():
    model = tiny.model("olmoe", VOCAB)
    given = batch(labels=True)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad(), router_outputs(model) as seen, RoutingRecorder(model) as rec:
        rec.mask_next(mask)
        model(**given)
        assert torch.equal(rec.counts, count(seen, mask))
        rec.reset()
        model(**given)
        assert torch.equal(rec.counts, count(seen[2:], counted(given)))
        rec.mask_next(mask[:2])
        with pytest.raises(UserError, match=r"mask_next.*allowed is bool"):
            model(**given)
        rec.mask_next(torch.zeros_like(mask))
    rec.reset()
    with torch.no_grad(), rec:
        model(**given)
    assert torch.equal(rec.counts, count(seen[2:4], counted(given)))


@pytest.mark.parametrize("target_parameters", [False, True])
def test_peft(target_parameters):
    from peft import LoraConfig, get_peft_model

    plain = tiny.model("qwen3_moe", VOCAB)
    given = batch(labels=True)
    with torch.no_grad(), RoutingRecorder(plain) as expected:
        plain(**given)
    choice = (
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
        if target_parameters
        else {"target_modules": ["q_proj", "v_proj"]}
    )
    model = get_peft_model(plain, LoraConfig(r=2, lora_dropout=0.0, **choice))
    assert [layer.name for layer in moe_layers(model)] == [layer.name for layer in expected.layers]
    with RoutingRecorder(model) as rec:
        model(**given).loss.backward()
    assert torch.equal(rec.counts, expected.counts)  # LoRA begins as the identity
    rec.reset()
    with rec:
        model.generate(**batch(), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert rec.counts.sum() == (18 + 3) * tiny.TOP_K * 2


def test_two_recorders_at_once():
    model = tiny.model("mixtral", VOCAB)
    with torch.no_grad(), RoutingRecorder(model) as one, RoutingRecorder(model, torch.ones(2, 8)) as two:
        model(**batch())
    assert one.counts.sum() == 18 * tiny.TOP_K * 2
    assert torch.equal(one.counts, two.counts)
    assert one.token_scores is None


def test_inference_mode_state_can_be_used_outside():
    model = tiny.model("mixtral", VOCAB)
    with torch.inference_mode():
        rec = RoutingRecorder(model, torch.ones(2, 8))
        with rec:
            model(**batch())
    with rec:
        model(**batch())
    assert rec.counts.sum() == 2 * 18 * tiny.TOP_K * 2
    rec._states.clear()
    with torch.inference_mode():  # where a layer has moved to another device
        state = rec._state_of(0, torch.device("cpu"))
    assert not state.counts.is_inference()


class BoomError(Exception):
    pass


def test_an_exception_in_the_forward_leaves_the_gate_closed():
    model = tiny.model("mixtral", VOCAB)

    def explode(module, args):
        raise BoomError

    rec = RoutingRecorder(model)
    handle = model.model.layers[1].register_forward_pre_hook(explode)
    with pytest.raises(BoomError), rec:
        model(**batch())
    assert all(state.gate.item() == 0 for state in rec._states.values())
    with rec:
        with contextlib.suppress(BoomError):
            model(**batch())
        assert all(state.gate.item() == 0 for state in rec._states.values())
        handle.remove()
        model(**batch())
        with pytest.raises(RuntimeError, match="a forward raised after some of the layers had counted"):
            _ = rec.counts
        rec.reset()
        model(**batch())
    assert rec.counts.sum() == 18 * tiny.TOP_K * 2


def test_a_layer_that_does_not_report_is_an_error():
    model = tiny.model("mixtral", VOCAB)
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: hidden  # what kernels that replace the whole block do
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.experts did not report"), RoutingRecorder(model):
        model(**batch())


def test_another_number_of_tokens_is_an_error():
    model = tiny.model("mixtral", VOCAB)
    mlp = model.model.layers[1].mlp

    class Half(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            self.inner(hidden[:, :3].contiguous())
            return hidden

    model.model.layers[1].mlp = Half(mlp)
    with (
        pytest.raises(RuntimeError, match=r"layers\.1\..*experts reported 9 tokens, the batch has 3 x 7"),
        RoutingRecorder(model),
    ):
        model(**batch())


def test_a_layer_that_runs_twice_is_an_error():
    model = tiny.model("mixtral", VOCAB)
    layers = model.model.layers
    layers[1] = layers[0]
    with pytest.raises(RuntimeError, match="a second time"), RoutingRecorder(model):
        model(**batch(), use_cache=False)


def test_a_part_of_the_model_called_alone_is_an_error():
    model = tiny.model("mixtral", VOCAB)
    with (
        pytest.raises(RuntimeError, match="ran outside a forward of MixtralForCausalLM"),
        RoutingRecorder(model),
    ):
        model.model(**batch())
    with RoutingRecorder(model.model) as rec:
        model.model(**batch())
    assert rec.counts.sum() == 18 * tiny.TOP_K * 2


def test_no_forward_warns():
    with pytest.warns(UserWarning, match="saw no forward"), RoutingRecorder(tiny.model("mixtral", VOCAB)):
        pass


def test_bad_arguments():
    model = tiny.model("mixtral", VOCAB)
    with pytest.raises(UserError, match=r"table: got shape \[8\], allowed is \[L, E\] = \[2, 8\]"):
        RoutingRecorder(model, torch.ones(8))
    with pytest.raises(UserError, match="table: has NaN"):
        RoutingRecorder(model, torch.full((2, 8), torch.nan))
    with RoutingRecorder(model) as rec:
        with pytest.raises(RuntimeError, match="already active"):
            rec.__enter__()
        with pytest.raises(UserError, match="attention_mask"):
            model(input_ids=batch()["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))
        model(**batch())


def test_dense_model_is_refused():
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layer"):
        moe_layers(tiny.model("llama", VOCAB))


def test_tokens_that_skip_a_layer_are_not_counted():
    """ZAYA's router gives them expert 0 with weight 0."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "ZayaConfig"):
        pytest.skip("this transformers has no ZAYA")
    config = transformers.ZayaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        router_hidden_size=16,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    routers = [module for module in model.modules() if type(module).__name__ == "ZayaRouter"]
    seen = []
    for router in routers:
        router.balancing_biases.zero_()  # the skip expert is as likely as others
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        router.register_forward_hook(lambda module, args, output: seen.append((output[1], output[2])))
    given = batch()
    with torch.no_grad(), RoutingRecorder(model) as rec:
        model(**given, use_cache=False)
    mask = given["attention_mask"].bool().flatten()
    expected = [torch.bincount(i[mask][w[mask] > 0], minlength=4) for w, i in seen]
    assert torch.equal(rec.counts, torch.stack(expected))
    assert 0 < rec.counts.sum() < mask.sum() * len(routers)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled(checkpointing):
    torch.compiler.reset()
    model = tiny.model("qwen3_moe", VOCAB, experts_implementation="batched_mm")
    given = batch(labels=True)
    with RoutingRecorder(model) as plain:
        model(**given)
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    table = torch.ones(2, tiny.NUM_EXPERTS)
    rec = RoutingRecorder(model, table)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not checkpointing)
    with rec:
        compiled(**given).loss.backward()
        assert torch.equal(rec.counts, plain.counts)
        compiled(**given).loss.backward()
        assert torch.equal(rec.counts, 2 * plain.counts)
        assert torch.equal(rec.token_scores, torch.full((3, 7), 2.0 * tiny.TOP_K))
        compiled(**batch(B=1, S=4)).logits.sum().backward()
    counts = rec.counts
    assert counts.sum() == 2 * plain.counts.sum() + 4 * tiny.TOP_K * 2
    compiled(**given)
    assert torch.equal(rec.counts, counts)


@pytest.mark.slow
def test_compiled_before_the_recorder_is_never_counted_wrongly():
    torch.compiler.reset()
    model = tiny.model("qwen3_moe", VOCAB, experts_implementation="batched_mm")
    compiled = torch.compile(model, backend="aot_eager")
    given = batch()
    with torch.no_grad():
        compiled(**given)
        with pytest.raises(RuntimeError, match=r"torch\.compiler\.reset"), RoutingRecorder(compiled):
            compiled(**given)
        torch.compiler.reset()
        with RoutingRecorder(compiled) as rec:
            compiled(**given)
    assert rec.counts.sum() == 18 * tiny.TOP_K * 2
