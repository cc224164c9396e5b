"""fuse_routers on every MoE family of transformers: the same experts, weights and gradients, or a refusal."""

from __future__ import annotations

import copy
import pickle

import families
import pytest
import torch
import transformers

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.fusion.routers import _REFUSED
from trace_unlearn.integrations import fuse_routers, fused_routers_of
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers

#: Not fused; test_refusals_say_why has the reasons.
NOT_FUSED = {
    "cohere2_moe",
    "dbrx",
    "deepseek_v4",
    "diffusion_gemma",
    "doge",
    "gemma4",
    "inkling",
    "inkling2",
    "jetmoe",
    "kolibri1",
    "lfm2_moe",
    "llama4",
    "mistral4",
    "nllb_moe",
    "phimoe",
    "switch_transformers",
    "zaya",
}
if transformers.__version__.startswith("5.17."):  # their routers were others, or in another place
    NOT_FUSED |= {"aria", "jamba", "longcat_flash"}
FUSED = [family for family in families.families() if family.module not in NOT_FUSED]


def run(model, given):
    """The experts [n, L, k] by token, the output there, and all gradients."""
    model.zero_grad()
    with RoutingRecorder(model, store_routes=True) as rec:
        output = model(**given)
    output = output.logits if "logits" in output else output.last_hidden_state
    counting = given["attention_mask"].bool()
    seen = output[counting].float()
    (seen * torch.linspace(-1, 1, seen.numel()).view(seen.shape)).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return rec.routes[counting].sort(dim=-1).values, seen.detach(), gradients


@pytest.mark.parametrize("family", FUSED, ids=str)
def test_same_experts_output_and_gradients(family, monkeypatch):
    model = families.build(family)
    given = families.inputs(family, model)
    if "inputs_embeds" in given:
        given["inputs_embeds"] = given["inputs_embeds"].detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    routes, output, gradients = run(model, given)
    calls = []
    original = tk.router_topk
    monkeypatch.setattr(tk, "router_topk", lambda *a, **k: calls.append(1) or original(*a, **k))

    undo = fuse_routers(model)
    calls.clear()
    fused_routes, fused_output, fused_gradients = run(model, given)
    assert len(calls) == len(moe_layers(model))
    assert torch.equal(fused_routes, routes)
    torch.testing.assert_close(fused_output, output, rtol=1e-4, atol=1e-4 * output.abs().max().item())
    assert fused_gradients.keys() == gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        limit = 1e-3 * gradient.abs().max().item() + 1e-5 * largest
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=limit, msg=name)
    assert [type(module) for module in model.modules()] == kinds
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())

    with pytest.raises(UserError, match="fused already"):
        fuse_routers(model)
    undo()
    assert [type(module) for module in model.modules()] == kinds
    assert len(calls) == len(moe_layers(model))
    assert torch.equal(run(model, given)[1], output)
    with pytest.raises(RuntimeError, match="not fused any more"):
        undo()


@pytest.mark.parametrize("family", FUSED, ids=str)
def test_routers_in_bf16(family):
    """Router by router on the same hidden states: a model's layers would carry one rounding into the next choice."""
    model = families.build(family).to(torch.bfloat16)
    given = families.inputs(family, model)
    given = {name: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in given.items()}
    seen = []
    undo = fuse_routers(model)
    handles = [
        router.register_forward_pre_hook(lambda m, a, k: seen.append((m, a, k)), with_kwargs=True)
        for router in undo.routers
    ]
    with torch.no_grad():
        model(**given)
        for handle in handles:
            handle.remove()
        fused = [router(*args, **kwargs) for router, args, kwargs in seen]
        undo()
        plain = [router(*args, **kwargs) for router, args, kwargs in seen]
    assert len(fused) == len(moe_layers(model))
    for ours, theirs in zip(fused, plain, strict=True):
        assert [part.dtype for part in ours] == [part.dtype for part in theirs]
        place = next(i for i, part in enumerate(theirs) if not part.is_floating_point())
        logits = next(p for p in theirs if p.shape[-1] >= families.NUM_EXPERTS)
        weights = next(i for i, p in enumerate(theirs) if p.is_floating_point() and p is not logits)
        clear = torch.tensor([len(set(row)) == len(row) for row in logits.tolist()])
        assert clear.any()
        indices, order = ours[place].sort(dim=1)
        their_indices, their_order = theirs[place].sort(dim=1)
        assert torch.equal(indices[clear], their_indices[clear])
        mine = ours[weights].gather(1, order)[clear].float()
        torch.testing.assert_close(mine, theirs[weights].gather(1, their_order)[clear].float(), rtol=2**-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FUSED, ids=str)
def test_under_autocast_the_choice_is_the_routers_own(family):
    model = families.build(family)
    seen = []
    undo = fuse_routers(model)
    router = undo.routers[0]
    handle = router.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    model(**families.inputs(family, model))
    handle.remove()
    (hidden, *rest), named = seen[0]
    shape = (*(1 for _ in hidden.shape[2:]), 2000, hidden.shape[-1])
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        fused = router(hidden, *rest, **named)
        undo()
        plain = router(hidden, *rest, **named)
    assert [part.dtype for part in fused] == [part.dtype for part in plain]
    place = next(i for i, part in enumerate(plain) if not part.is_floating_point())
    logits = next(p for p in plain if p.shape[-1] >= families.NUM_EXPERTS)
    clear = torch.tensor([len(set(row)) == len(row) for row in logits.tolist()])
    assert torch.equal(fused[place].sort(dim=1).values[clear], plain[place].sort(dim=1).values[clear])


@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"]
)
def test_generate(name):
    family = next(family for family in FUSED if str(family) == name)
    model = families.build(family)
    given = {**families.inputs(family, model, "left"), "use_cache": True}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**given, **options)
    undo = fuse_routers(model)
    assert torch.equal(model.generate(**given, **options), expected)
    undo()


@pytest.mark.parametrize("family", [f for f in families.families() if f.module in NOT_FUSED - {"nllb_moe"}], ids=str)
def test_refusals_say_why(family):
    model = families.build(family)
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=r"cannot be fused: |of this transformers") as error:
        fuse_routers(model)
    reason = str(error.value).partition("cannot be fused: ")[2]
    unknown = ("it has no router module that is known", "")
    assert any(why in reason for why in _REFUSED.values()) or reason in unknown
    assert [type(module) for module in model.modules()] == kinds


def test_a_router_that_changed_is_refused(monkeypatch):
    family = next(family for family in FUSED if str(family) == "MixtralForCausalLM")
    model = families.build(family)
    router = type(model.model.layers[0].mlp.gate)
    original = router.forward

    def changed(self, hidden):
        logits, weights, indices = original(self, hidden)
        return logits, weights * 1.01, indices

    monkeypatch.setattr(router, "forward", changed)
    with pytest.raises(UserError, match="MixtralTopKRouter of this transformers routes in another way"):
        fuse_routers(model)
    monkeypatch.setattr(router, "forward", lambda self, hidden: original(self, hidden)[:2])
    with pytest.raises(UserError, match="returns something else"):
        fuse_routers(model)


def test_dense_models_and_weights_elsewhere_are_refused():
    import tiny

    with pytest.raises(UserError, match="has no MoE layer"):
        fuse_routers(tiny.model("llama"))
    with torch.device("meta"):
        model = tiny.model("mixtral")
    with pytest.raises(UserError, match="fuse before sharding or offloading"):
        fuse_routers(model)


def mixtral():
    return families.build(next(family for family in FUSED if str(family) == "MixtralForCausalLM"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_independent(copied, monkeypatch):
    model = mixtral()
    undo = fuse_routers(model)
    twin = copied(model)
    calls = []
    original = tk.router_topk
    monkeypatch.setattr(tk, "router_topk", lambda *a, **k: calls.append(1) or original(*a, **k))
    ids = torch.arange(8)[None]
    logits = model(input_ids=ids).logits
    with torch.no_grad():
        for router in undo.routers:
            router.weight.zero_()
    calls.clear()
    torch.testing.assert_close(twin(input_ids=ids).logits, logits)
    assert len(calls) == len(moe_layers(twin))
    undo()
    assert fused_routers_of(model) is None
    twin(input_ids=ids)
    assert len(calls) == 2 * len(moe_layers(twin))
    fused_routers_of(twin)()
    assert fused_routers_of(twin) is None
    torch.testing.assert_close(twin(input_ids=ids).logits, logits)
    assert len(calls) == 2 * len(moe_layers(twin))
    fuse_routers(twin)


def test_replicas_use_their_own_weights():
    model = mixtral()
    undo = fuse_routers(model)
    router = undo.routers[0]
    replica = router._replicate_for_data_parallel()
    replica.weight = 2 * router.weight.detach()
    hidden = torch.randn(4, router.weight.shape[1])
    assert torch.equal(replica(hidden)[0], 2 * router(hidden)[0])


@pytest.mark.parametrize("fuse_first", [True, False])
def test_adapters_on_the_routers(fuse_first):
    """With LoRA on a router's weight, the effective one is read."""
    peft = pytest.importorskip("peft")
    model, ids = mixtral(), torch.arange(8)[None]
    options = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False}
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}
    torch.manual_seed(0)
    undo = fuse_routers(model) if fuse_first else None
    adapted = peft.get_peft_model(model, peft.LoraConfig(**targets, **options))
    adapted.eval()
    undo = undo or fuse_routers(adapted)
    fused = adapted(input_ids=ids).logits
    fused.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("gate" in name for name in gradients)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(input_ids=ids).logits, fused)
    undo()
    adapted.zero_grad()
    plain = adapted(input_ids=ids).logits
    plain.square().sum().backward()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    for name, p in adapted.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max().item())


@torch.no_grad()
def test_how_many_tokens_ties_send_elsewhere():
    """The number in the docstring of fuse_routers: 3.1 % in bfloat16, none in float32."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    n, stated = 20_000, 0.031
    torch.manual_seed(0)
    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=64, num_experts=128, num_experts_per_tok=8))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(n, 64)
    for dtype in (torch.float32, torch.bfloat16):
        logits, _, theirs = router.to(dtype)(hidden.to(dtype))
        ours = tk.router_topk(logits, 8)[1]
        others = (ours.sort(1).values != theirs.sort(1).values).any(1)
        assert torch.equal(logits.gather(1, ours).sort(1).values, logits.gather(1, theirs).sort(1).values)
        if dtype == torch.float32:
            assert not others.any()
    # The tokens share the router's weights, so that they vary more than independent ones.
    assert others.float().mean().item() == pytest.approx(stated, abs=6 * (stated * (1 - stated) / n) ** 0.5)
