"""fuse_loss on further families, and together with gradient checkpointing, peft and torch.compile on a MoE."""

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trace_unlearn.integrations import fuse_loss

V = 80
SIZES = {**tiny.COMMON, "vocab_size": V, "head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
DENSE = ("gemma3_text", "cohere2", "helium", "glm4", "opt", "bloom", "qwen3", "exaone4")
SPARSE = ("phimoe", "hunyuan_v1_moe", "ernie4_5_moe", "glm4_moe", "dots1", "minimax")


def batch():
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model, **extra):
    model.zero_grad()
    outputs = model(**batch(), **extra)
    outputs.loss.backward()
    return outputs.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_further_families(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **(EXPERTS if family in SPARSE else {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    plain = [loss_and_gradients(model, **extra) for extra in ({}, {"num_items_in_batch": 50})]
    assert plain[0][0] != plain[1][0]
    fuse_loss(model)
    for extra, expected in zip(({}, {"num_items_in_batch": 50}), plain, strict=True):
        assert_same(loss_and_gradients(model, **extra), expected)


def with_adapters(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, options)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("adapters", [True, False])
def test_gradient_checkpointing(adapters, reentrant):
    model = tiny.model("qwen3_moe", V).train()
    model = with_adapters(model) if adapters else model
    plain = loss_and_gradients(model)
    fuse_loss(model)
    layer = next(module for module in model.modules() if type(module).__name__.endswith("DecoderLayer"))
    runs = []
    layer.mlp.register_forward_pre_hook(lambda *args: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model), plain)
    assert len(runs) == 2  # the backward ran the layer again
    assert all(gradient.abs().max() > 0 for gradient in plain[1].values())


@pytest.mark.slow
def test_compiled_with_adapters():
    model = with_adapters(tiny.model("qwen3_moe", V))
    plain = loss_and_gradients(model)
    fuse_loss(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    outputs = compiled(**batch())
    outputs.loss.backward()
    assert outputs.logits is None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((outputs.loss.detach(), found), plain)
