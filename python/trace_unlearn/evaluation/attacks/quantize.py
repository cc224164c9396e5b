"""Weights as they come back from a quantised checkpoint. Quantising has brought forgotten knowledge back elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import moe_layers, unwrap
from trace_unlearn.routing.routers import router_of

CHUNK = 1 << 24  # numbers of a weight that are rounded at a time: 64 MiB of float32


@torch.no_grad()
def quantize_(model: PreTrainedModel, bits: int, *, group_size: int = 128) -> int:
    r"""Rounds the weights of linear layers and experts to `bits` bits and back, in place.

    Round-to-nearest with an offset, per group of `group_size` neighbours along a weight's last axis:

    .. math:: \hat w = s \cdot \text{clip}(\text{round}((w - m) / s),\ 0,\ 2^b - 1) + m, \quad
              s = (\max w - m) / (2^b - 1), \quad m = \min w

    It is the weights-only scheme that GPTQ, AWQ and torchao's int4 start from, computed in plain torch. Biases, norms,
    embeddings, the output layer and the routers stay as they are, as in quantised checkpoints that people publish.

    Args:
        model: a causal language model.
        bits: 2 to 8.
        group_size: numbers that share a scale; the last group of a row may be shorter.

    Returns:
        How many numbers were rounded.

    Raises:
        UserError: bits or group_size out of range, no weight to round, or one that is not simply there: of a layer with
            adapters (merge them first), that is parametrised, or that is quantised already.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> quantize_(MixtralForCausalLM(config), 4)  # attention 4 * 16 * 16, experts 4 * 3 * 8 * 16
        2560
    """
    if not 2 <= bits <= 8:
        raise UserError(f"bits: got {bits}, allowed are integers from 2 to 8")
    if group_size < 1:
        raise UserError(f"group_size: got {group_size}, allowed are integers from 1")
    weights = _weights(model)
    if not weights:
        raise UserError("quantize: finds no linear layer and no experts in this model")
    for weight in weights:
        flat = weight.data.reshape(-1, weight.shape[-1])  # a view, or else copied back below
        rows = max(1, CHUNK // flat.shape[1])
        for start in range(0, len(flat), rows):
            flat[start : start + rows] = rounded(flat[start : start + rows], bits, group_size)
        if flat.data_ptr() != weight.data_ptr():
            weight.data.copy_(flat.view_as(weight))
    return sum(weight.numel() for weight in weights)


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The rows of `weight` [R, C] rounded as `quantize_` says, in its dtype.

    >>> rounded(torch.tensor([[0.0, 0.4, 1.1, 3.0]]), bits=2, group_size=4)
    tensor([[0., 0., 1., 3.]])
    """
    R, C = weight.shape
    groups = -(-C // group_size)
    padded = torch.nn.functional.pad(weight.float().unsqueeze(0), (0, groups * group_size - C), mode="replicate")[0]
    values = padded.view(R, groups, group_size)
    low = values.amin(-1, keepdim=True)
    scale = (values.amax(-1, keepdim=True) - low) / (2**bits - 1)
    codes = ((values - low) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    back: torch.Tensor = (codes * scale + low).view(R, -1)[:, :C]
    return back.to(weight.dtype)


def _weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of linear layers and stacked experts, each once, without the output layer's and the routers'."""
    inner = unwrap(model)
    _check_plain(inner)
    spared: set[int] = set()
    experts: list[nn.Module] = []
    try:
        layers = moe_layers(inner)
    except UserError:  # a dense model, or one whose routing is not known: its linear layers are
        layers = []
    for layer in layers:
        experts.append(layer.experts_module)
        spared |= {id(parameter) for parameter in router_of(inner, layer)[1].parameters()}
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for embedding in (head, model.get_input_embeddings()):
        spared |= {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    found: dict[int, torch.Tensor] = {}
    for module in inner.modules():
        if isinstance(module, nn.Linear):
            found[id(module.weight)] = module.weight
    for module in experts:
        found.update({id(p): p for name, p in module.named_parameters() if p.dim() == 3 and "bias" not in name})
    return [weight for key, weight in found.items() if key not in spared]


def _check_plain(model: nn.Module) -> None:
    """UserError where rounding what is stored is not rounding what is computed with."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise UserError(
                f"quantize: {name} has adapters, whose product with the weight is what a checkpoint would hold; "
                "merge them first (model = model.merge_and_unload())"
            )
        if nn.utils.parametrize.is_parametrized(module):
            raise UserError(
                f"quantize: {name} computes its weight anew at each forward; remove its parametrizations first"
            )
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and not _is_plain(weight):
            kind = type(weight).__name__ if type(weight) is not nn.Parameter else weight.dtype
            raise UserError(f"quantize: the weight of {name} is quantised or stored otherwise already ({kind})")


def _is_plain(weight: Any) -> bool:
    return type(weight) is nn.Parameter and weight.is_floating_point() and weight.element_size() > 1
