"""`fuse_routers`: lets the routers of a Hugging Face MoE model choose experts with `trace_kernels.router_topk`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.forwards import Layer, attach, detach, layer_of, wrapped_by_another
from trace_unlearn.routing.adapters import plain_path
from trace_unlearn.routing.recorder import moe_layers, unwrap

_TRIAL_TOKENS = 64


def fuse_routers(model: nn.Module) -> FusedRouters:
    """Replaces score function, top-k and renormalisation of every router by one `router_topk` call.

    The experts chosen stay the same, but where two of them tie the lowest index wins, and torch follows no rule. In
    float32 ties do not occur in practice. In bfloat16 they do: with 128 experts of which 8 are taken, 3.1 % of random
    tokens get another set of experts, of equal logits. The weights stay the same up to rounding, and
    so do gradients. Parameters and state dict are untouched. Before a router is replaced, both ways are run on random
    tokens; so a transformers release that changed it is refused instead of changed silently. Under autocast, routers
    whose scores it rounds before the choice run as transformers has them.

    Args:
        model: a transformers MoE model, or a peft model around one, its weights on their devices (not sharded).

    Returns:
        The handle: `handle()` restores the routers.

    Raises:
        UserError: a dense model, one that is fused already, or a family whose router `router_topk` does not reproduce
            exactly; the message names it and says why. The model is then as before.

    Example:
        >>> import torch
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model, ids = MixtralForCausalLM(config).eval(), torch.arange(12).view(2, 6)
        >>> plain = model(input_ids=ids).logits
        >>> undo = fuse_routers(model)
        >>> torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)
        True
        >>> undo()
    """
    model = unwrap(model)
    fused: dict[nn.Module, _Fused] = {}
    for layer in moe_layers(model):
        parent = model.get_submodule(plain_path(layer.name).rpartition(".")[0])
        router, rule = _router_of([*parent.children(), *layer.experts_module.children()], layer.name)
        if router not in fused:
            fused[router] = _Fused(_kind(router), _trial(router, rule, layer.name))
    for router, layer_of_router in fused.items():
        attach(router, layer_of_router)
    return FusedRouters(fused)


def fused_routers_of(model: nn.Module) -> FusedRouters | None:
    """The handle of a model that `fuse_routers` changed before, or of a copy of one; otherwise None."""
    found = {module: layer for module in unwrap(model).modules() if (layer := layer_of(module, _Fused)) is not None}
    return FusedRouters(found) if found else None


class FusedRouters:
    """What `fuse_routers` returns. Calling it restores the model."""

    def __init__(self, fused: dict[nn.Module, _Fused]) -> None:
        self._fused = fused
        self.routers = list(fused)

    def __call__(self) -> None:
        for router, layer in self._fused.items():
            if layer_of(router, _Fused) is not layer:
                raise RuntimeError(f"{type(router).__name__} is not fused any more")
        for router, layer in self._fused.items():
            detach(router, layer)


@dataclass(frozen=True)
class _Rule:
    """One way to route: from hidden states to logits, from the router's attributes to `router_topk`'s options."""

    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    options: Callable[[Any], dict[str, Any]]
    bias: Callable[[Any], torch.Tensor | None] = lambda router: None
    weights: str = "logits"  # the dtype of the weights: that of the "logits", the "hidden" states, or "float32"
    given_bias: bool = False  # the selection bias is the second argument of the forward
    in_autocast: bool = True  # whether the choice is the router's own under autocast too, which may round its scores


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def _linear(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return F.linear(_flat(hidden).to(router.weight.dtype), router.weight, getattr(router, "bias", None))


def _float_linear(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    # Out of autocast, as these families want it, or as float32 arguments have it anyway with autocast off.
    bias = getattr(router, "bias", None)
    return F.linear(_flat(hidden).float(), router.weight.float(), None if bias is None else bias.float())


def _without_autocast(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return _float_linear(router, hidden)


def _laguna_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits = _linear(router, hidden).float()
    cap = router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def _hunyuan_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    hidden = _flat(hidden)
    logits: torch.Tensor = router.wg(hidden.float() if router.wg.weight.dtype == torch.float32 else hidden)
    return logits


def _longcat_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    return F.linear(_flat(hidden).float(), router.classifier.weight.float())


def _afmoe_logits(router: Any, hidden: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = router.gate(_flat(hidden))
    return logits.float()


def _always(**options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda router: options


def _deepseek_v2(router: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"renormalize": False, "scale": router.routed_scaling_factor}
    if router.topk_method == "group_limited_greedy":
        options |= {"num_groups": router.num_group, "topk_groups": router.topk_group}
    return options


def _grouped(router: Any, masked: float, **options: Any) -> dict[str, Any]:
    options = {"renormalize": getattr(router, "norm_topk_prob", True), "eps": 1e-20, **options}
    options["scale"] = getattr(router, "routed_scaling_factor", 1.0)
    if router.num_group is not None:
        options |= {"num_groups": router.num_group, "topk_groups": router.topk_group}
        options |= {"group_score": "sum_top2", "masked_group_value": masked}
    return options


def _own_bias(router: Any) -> torch.Tensor:
    bias: torch.Tensor = router.e_score_correction_bias
    return bias


_SIGMOID = {"score_function": "sigmoid"}
_FLAG = _Rule(_linear, lambda router: {"renormalize": router.norm_topk_prob})
_SOFTMAX = _Rule(_linear, _always())
_SOFTMAX_FLOAT = _Rule(_linear, _always(), weights="float32")
_CHOSEN = _Rule(_linear, _always(score_function="softmax_topk"))
_GRANITE = _Rule(
    lambda router, hidden: _linear(router, hidden).float(), _always(score_function="softmax_topk"), weights="hidden"
)
_V2 = _Rule(_float_linear, _deepseek_v2, in_autocast=False)
_V3 = _Rule(_float_linear, lambda router: _grouped(router, float("-inf"), **_SIGMOID), _own_bias, in_autocast=False)
_ERNIE = _Rule(
    _without_autocast, _always(), lambda router: router.moe_statics.e_score_correction_bias.squeeze(), weights="hidden"
)
_SIGMOID_BIAS = _Rule(_linear, _always(**_SIGMOID), _own_bias, weights="float32")

#: By the class of the router.
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            "FlexOlmoTopKRouter", "MellumTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter", "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3OmniMoeTalkerTextTopKRouter",
            "Qwen4ExpTextTopKRouter",
        ),
        _FLAG,
    ),
    **dict.fromkeys(("Qwen3_5MoeTopKRouter", "Qwen3OmniMoeTextTopKRouter", "Qwen3VLMoeTextTopKRouter"), _SOFTMAX),
    "JambaTopKRouter": _Rule(_linear, _always(renormalize=False), in_autocast=False),
    "HunYuanMoEV1Gate": _Rule(_hunyuan_logits, _always()),
    **dict.fromkeys(("MixtralTopKRouter", "MiniMaxTopKRouter"), _SOFTMAX_FLOAT),
    **dict.fromkeys(("AriaTextTopKRouter", "GptOssTopKRouter"), _CHOSEN),
    "OpenAIPrivacyFilterTopKRouter": _Rule(
        _float_linear, lambda router: {"score_function": "softmax_topk", "scale": 1.0 / router.top_k},
        in_autocast=False,
    ),
    **dict.fromkeys(
        ("GraniteMoeTopKRouter", "GraniteMoeSWATopKRouter", "GraniteMoeHybridTopKRouter", "GraniteMoeSharedTopKRouter"),
        _GRANITE,
    ),
    **dict.fromkeys(("DeepseekOcr2TextTopkRouter", "DeepseekV2TopkRouter", "UnlimitedOcrTextTopkRouter"), _V2),
    **dict.fromkeys(
        (
            "AXK1TopkRouter", "BailingHybridTopkRouter", "BeamTopKRouter", "DeepseekV3TopkRouter",
            "DeepseekV32TopkRouter", "Dots1TopkRouter", "Dots3NoteTextTopkRouter", "ExaoneMoeTopkRouter",
            "Glm4MoeTopkRouter", "Glm4MoeLiteTopkRouter", "Glm4vMoeTextTopkRouter", "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter", "HYV4TopkRouter", "KimiLinearTopkRouter", "MiMoV2FlashTopkRouter",
            "NemotronHTopkRouter", "SolarOpenTopkRouter",
        ),
        _V3,
    ),
    "AXK2TopkRouter": _Rule(
        _float_linear, lambda router: _grouped(router, 0.0, **_SIGMOID), _own_bias, in_autocast=False
    ),
    "MistralLarge4TextTopkRouter": _Rule(_float_linear, lambda router: _grouped(router, 0.0), in_autocast=False),
    **dict.fromkeys(("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"), _ERNIE),
    "LongcatFlashTopkRouter": _Rule(
        _longcat_logits, lambda router: {"renormalize": False, "scale": router.routed_scaling_factor}, _own_bias,
        in_autocast=False,
    ),
    **dict.fromkeys(("MiniMaxM3VLTopKRouter", "Step3p7TopKRouter"), _SIGMOID_BIAS),
    "MiniMaxM2TopKRouter": _Rule(
        _linear, _always(**_SIGMOID), weights="float32", given_bias=True
    ),
    "HYV3TopKRouter": _Rule(
        _float_linear,
        lambda router: {**_SIGMOID, "eps": 1e-20, "scale": router.router_scaling_factor},
        given_bias=True,
        in_autocast=False,
    ),
    "AfmoeTokenChoiceRouter": _Rule(
        _afmoe_logits, lambda router: {**_SIGMOID, "eps": 1e-20, "scale": router.route_scale}, given_bias=True
    ),
    "LagunaTopKRouter": _Rule(_laguna_logits, _always(**_SIGMOID), _own_bias, weights="hidden"),
    "MuseSparkTopkRouter": _Rule(
        lambda router, hidden: _float_linear(router, hidden) * router.output_multiplier,
        lambda router: {**_SIGMOID, "eps": router.norm_topk_prob_eps, "scale": router.routed_scaling_factor},
        _own_bias,
        in_autocast=False,
    ),
    "FlintTopKRouter": _Rule(_without_autocast, lambda router: {**_SIGMOID, "renormalize": router.norm_topk_prob}),
}  # fmt: skip

_ROUNDS = "it ranks the experts by scores that are rounded to the model's dtype"
#: Why the others stay as they are.
_REFUSED = {
    "Cohere2MoeTopKRouter": "its score function is a choice of the configuration",
    "DbrxRouter": "it returns logits, and the block chooses",
    "DeepseekV4TopKRouter": _ROUNDS,
    "DeepseekV4HashRouter": "the token's number chooses",
    "DiffusionGemmaTextRouter": "it returns the probabilities of all experts",
    "Gemma4TextRouter": "it returns the probabilities of all experts",
    "Inkling2TopKRouter": "its score function is a choice of the configuration",
    "InklingTopkRouter": "it normalises together with the shared experts",
    "JetMoeTopKGating": "it sorts the tokens by expert",
    "Kolibri1TopKRouter": "its bias is added to logits, not to scores",
    "Lfm2MoeTopKRouter": _ROUNDS,
    "Llama4Router": "it scores the inputs of all experts",
    "Mistral4TopkRouter": _ROUNDS,
    "PhimoeTopKRouter": "it samples by sparsemixer",
    "SwitchTransformersTop1Router": "its experts have a capacity",
    "ZayaRouter": "it carries a state from layer to layer",
}


def _router_of(candidates: list[nn.Module], layer: str) -> tuple[nn.Module, _Rule]:
    reason = "it has no router module that is known"
    for child in map(_base, candidates):
        kind = _kind(child)
        if layer_of(child, _Fused) is not None:
            raise UserError(f"fuse_routers: the router of {layer} is fused already")
        if kind in _RULES:
            if wrapped_by_another(child):
                raise UserError(
                    f"fuse_routers: the forward of {layer}'s router is replaced by another tool; fuse first, wrap then"
                )
            return child, _RULES[kind]
        reason = next((f"the router is a {kind}, and {why}" for name, why in _REFUSED.items() if kind == name), reason)
        if reason.startswith("it has") and kind.endswith(("Router", "Gate", "Gating")):
            reason = f"router_topk has not been compared with a {kind}"
    raise UserError(f"fuse_routers: {layer} of this model cannot be fused: {reason}")


def _kind(module: nn.Module) -> str:
    """The name of its class, or of the one that it had before it was parametrised."""
    cls = type(module)
    return (cls.__mro__[1] if nn.utils.parametrize.is_parametrized(module) else cls).__name__


def _base(module: nn.Module) -> nn.Module:
    """The module that peft put one of its own around, which still calls it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _choose(
    router: Any, rule: _Rule, hidden: torch.Tensor, given: tuple[Any, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = rule.logits(router, hidden)
    dtype = {"logits": logits.dtype, "hidden": hidden.dtype, "float32": torch.float32}[rule.weights]
    weights, indices = tk.router_topk(
        logits,
        router.top_k,
        selection_bias=given[0] if rule.given_bias else rule.bias(router),
        weights_dtype=dtype,
        **rule.options(router),
    )
    return logits, weights, indices


class _Fused(Layer):
    """A router's forward, by the rule of its class.

    Args:
        kind: the name of the class.
        order: the places of logits, weights and indices in what the router returns.
    """

    replaces = True

    def __init__(self, kind: str, order: list[int]) -> None:
        self.kind, self.order = kind, order

    def copied(self) -> _Fused:
        return _Fused(self.kind, self.order)

    def run(self, module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rule = _RULES[self.kind]
        hidden, *given = args if args else [kwargs["hidden_states"]]
        given += [value for name, value in kwargs.items() if name != "hidden_states"]
        if not rule.in_autocast and torch.is_autocast_enabled(hidden.device.type):
            return inner(*args, **kwargs)
        parts = _choose(module, rule, hidden, tuple(given))
        return tuple(parts[place] for place in self.order)


@torch.no_grad()
def _trial(router: Any, rule: _Rule, layer: str) -> list[int]:
    """Compares both ways on random tokens; tells in which order the router returns logits, weights and indices."""
    name = type(router).__name__
    weight = next(parameter for parameter in router.parameters() if parameter.dim() == 2)
    if weight.device.type == "meta" or isinstance(weight, DTensor):
        raise UserError(
            f"fuse_routers: the weights of {layer}'s router are not here; fuse before sharding or offloading"
        )
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        cls = type(weight)
        raise UserError(
            f"fuse_routers: the weight of {layer}'s router is a {cls.__module__}.{cls.__qualname__} of {weight.dtype}, "
            "which only its own code can multiply with; leave routers unquantised"
        )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_TRIAL_TOKENS, weight.shape[1], generator=generator, dtype=torch.float32)
    hidden = hidden.to(weight.device, _hidden_dtype(router))
    given: tuple[torch.Tensor, ...] = ()
    if rule.given_bias:
        given = (0.1 * torch.randn(weight.shape[0], generator=generator, dtype=torch.float32).to(weight.device),)
        hidden = hidden[None]  # those routers want [B, S, H]
    theirs = type(router).forward(router, hidden.clone(), *given)
    ours = _choose(router, rule, hidden, given)
    order = [_place(part, ours) for part in theirs]
    if sorted(order) != [0, 1, 2]:
        raise UserError(f"fuse_routers: {name} of this transformers returns something else than the one that is known")
    logits, weights, indices = (theirs[order.index(place)] for place in range(3))
    # Rows with two equal logits may be decided either way.
    clear = torch.tensor([len(set(row)) == len(row) for row in logits.float().tolist()], device=logits.device)
    by_expert, their_order = indices.sort(dim=1)
    ours_by_expert, our_order = ours[2].sort(dim=1)
    same = bool((by_expert == ours_by_expert)[clear].all())
    difference = weights.gather(1, their_order).float() - ours[1].gather(1, our_order).float()
    limit = 1e-5 if weights.dtype == torch.float32 and logits.dtype == torch.float32 else 0.02
    limit *= weights.float().abs().amax().item()
    near = bool((difference[clear].abs() <= limit).all())
    if given or rule.bias(router) is not None or "num_groups" in rule.options(router):
        near = near and bool(clear.any())
    else:  # experts that tie have the same weight; with many experts in bfloat16 every row has a tie somewhere
        sorted_difference = weights.sort(dim=1).values.float() - ours[1].sort(dim=1).values.float()
        near = near and bool((sorted_difference.abs() <= limit).all())
    if not (same and near and torch.equal(logits, ours[0])):
        raise UserError(f"fuse_routers: {name} of this transformers routes in another way than the one that is known")
    return order


def _hidden_dtype(router: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in router.parameters() if parameter.dim() == 2)


def _place(part: Any, ours: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> int:
    if not isinstance(part, torch.Tensor):
        return -1
    if not part.is_floating_point():
        return 2 if part.shape == ours[2].shape and part.dtype == ours[2].dtype else -1
    if part.shape == ours[0].shape and part.dtype == ours[0].dtype and torch.equal(part, ours[0]):
        return 0
    return 1 if part.shape == ours[1].shape and part.dtype == ours[1].dtype else -1
