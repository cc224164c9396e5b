"""The MoE layers of a model, found by the classes of its modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from trace_unlearn.errors import UserError
from trace_unlearn.routing.adapters import Adapter, adapter_of, plain_path


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: the path of its experts module in the unwrapped model, such as "model.layers.3.mlp.experts".
        experts_module: the module with the experts' weights.
        num_experts: E, the routed experts; indices from E on (identity experts) are not counted.
        layer_index: the number of the decoder layer in `name`.
        adapter: how its choice of experts is read.
    """

    name: str
    experts_module: nn.Module
    num_experts: int
    layer_index: int
    adapter: Adapter


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model` in order, found by the classes of its modules.

    Works for every Hugging Face family whose experts module receives the indices that its router chose (Mixtral,
    Qwen-MoE, OLMoE, DeepSeek, gpt-oss, DBRX and some sixty others) and for those with an adapter (see
    `trace_unlearn.routing.adapters`). JetMoE routes in its attention too: each block has two layers here.
    Wrappers (PEFT, DDP, torch.compile) are looked through.

    Raises:
        UserError: the model is dense, or of a family whose routing cannot be observed; the message says why.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> [(layer.name, layer.num_experts) for layer in moe_layers(MixtralForCausalLM(config))]
        [('model.layers.0.mlp.experts', 4), ('model.layers.1.mlp.experts', 4)]
    """
    model = unwrap(model)
    layers: list[MoELayer] = []
    for path, module in model.named_modules():
        adapter = adapter_of(module, model.get_submodule(plain_path(path).rpartition(".")[0]))
        if adapter is None:
            continue
        if isinstance(adapter, str):
            raise UserError(
                f"model: the routing of {type(model).__name__} cannot be observed: {path or 'the model'} is a "
                f"{type(module).__name__}, and {adapter}"
            )
        name = plain_path(path)
        numbers = re.findall(r"\.(\d+)(?=\.|$)", path)
        index = int(numbers[-1]) if numbers else len(layers)
        layers.append(MoELayer(name, module, _num_experts(path, module, adapter), index, adapter))
    if not layers:
        raise UserError(
            f"model: {type(model).__name__} has no MoE layer (no module of a class named ...Experts); TRACE reads the "
            "routing of Mixture-of-Experts models, a dense model has none"
        )
    return layers


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DDP, FSDP1 and PEFT wrappers: the module whose forward every call reaches.

    PEFT's `generate`, for one, goes around the wrapper's own forward.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
            inner = inner.module
        elif hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            assert isinstance(inner, nn.Module)
            return inner


def _num_experts(path: str, module: nn.Module, adapter: Adapter) -> int:
    stated = adapter.num_experts(module)
    stacked = [parameter for parameter in module.parameters() if parameter.dim() == 3]
    # Where processes divide the experts among them, what the module states is this process's part.
    whole = [parameter.shape[0] for parameter in stacked if isinstance(parameter, DTensor)]
    if stated is not None and whole and whole[0] != stated:
        if getattr(module, "_is_expert_parallel", False):  # the module is handed the numbers of all experts
            return whole[0]
        raise UserError(
            f"model: {path} holds {stated} of {whole[0]} experts (expert parallelism), and this release of "
            "transformers hands it the numbers of its own experts only: load the model without expert parallelism"
        )
    if stated is not None:
        return stated
    if not stacked:
        raise UserError(f"model: cannot tell how many experts {path} ({type(module).__name__}) has")
    return min(parameter.shape[0] for parameter in stacked)
