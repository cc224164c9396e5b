"""`router_topk` against the routers of transformers: selection, weights and gradient of each family."""

import importlib

import pytest
import torch

import trace_kernels as tk
from trace_kernels.ops.router_topk.cases import FAMILIES

transformers = pytest.importorskip("transformers")

HIDDEN, EXPERTS, K = 32, 32, 6
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": K}
GROUPS = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2}
#: Family: configuration class, its arguments, router class.
ROUTERS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS}, "MixtralTopKRouter"),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": EXPERTS, "norm_topk_prob": True}, "Qwen3MoeTopKRouter"),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS}, "OlmoeTopKRouter"),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**GROUPS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        "DeepseekV2TopkRouter",
    ),
    "deepseek_v3": ("DeepseekV3Config", {**GROUPS, "routed_scaling_factor": 2.5}, "DeepseekV3TopkRouter"),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": EXPERTS}, "GptOssTopKRouter"),
}


def router_of(family, dtype):
    config_class, arguments, router_class = ROUTERS[family]
    config = getattr(transformers, config_class)(**SIZES, **arguments)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    router = getattr(module, router_class)(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.normal_(std=0.3, generator=generator)
    return router.to(dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ROUTERS)
def test_reproduces_the_router(family, dtype, backend):
    router = router_of(family, dtype)
    hidden = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(11)).to(dtype)
    logits, theirs, their_indices = router(hidden)
    # Their topk breaks ties arbitrarily: rows with two equal logits (many, in bfloat16) are left out.
    clear = torch.tensor([len(set(row.tolist())) == EXPERTS for row in logits.detach()])
    assert clear.sum() > (100 if dtype == torch.float32 else 5)

    leaf = logits.detach().requires_grad_()
    bias = getattr(router, "e_score_correction_bias", None)
    ours, indices = tk.router_topk(leaf, K, selection_bias=bias, **FAMILIES[family], backend=backend)
    assert ours.dtype == theirs.dtype
    # Their order within a row is unspecified (sorted=False): bring both into the order of the experts.
    theirs, their_indices = by_expert(theirs, their_indices)
    ours, indices = by_expert(ours, indices)
    assert torch.equal(indices[clear], their_indices[clear])
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if theirs.dtype == torch.float32 else {"rtol": 2**-7, "atol": 0}
    torch.testing.assert_close(ours[clear], theirs[clear], **tolerance)

    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)).to(ours.dtype) * clear[:, None]
    (expected,) = torch.autograd.grad(theirs, logits, upstream)
    (gradient,) = torch.autograd.grad(ours, leaf, upstream)
    scale = expected.abs().max().item()
    assert scale > 0
    tolerance = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tolerance * scale)


def by_expert(weights, indices):
    indices, order = indices.sort(dim=1)
    return weights.gather(1, order), indices
