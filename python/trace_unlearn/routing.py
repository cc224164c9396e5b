"""Which experts a model's own routers choose, observed while it runs."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

import trace_kernels as tk
from trace_unlearn.data import loss_bearing
from trace_unlearn.errors import UserError

# The second argument of an experts module that receives the chosen experts as [T, k] indices.
_INDEX_ARGUMENTS = ("top_k_index", "router_indices")

_UNSUPPORTED = {
    "Llama4TextExperts": "its router scales the inputs of all experts and passes no indices",
    "FbgemmFp8Llama4TextExperts": "its router scales the inputs of all experts and passes no indices",
    "JetMoeParallelExperts": "its router sorts the tokens by expert and passes no indices",
    "SwitchTransformersExperts": "its router passes one-hot masks with a capacity, not indices",
    "NllbMoeExperts": "its router passes one-hot masks with a capacity, not indices",
    "DogeCDMoE": "it retrieves experts by product keys and has no router module",
    "Mxfp4GptOssExperts": "its kernels route by themselves; load the model with Mxfp4Config(dequantize=True)",
}


# Its router sends a token that skips the layer to expert 0 with weight 0.
_SKIPS_WITH_WEIGHT_ZERO = ("ZayaExperts",)


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        name: the path of its experts module in the unwrapped model, such as "model.layers.3.mlp.experts".
        experts_module: the module that receives (hidden_states, top_k_index, top_k_weights).
        num_experts: E, the routed experts; indices from E on (identity experts) are not counted.
        layer_index: the number of the decoder layer in `name`.
    """

    name: str
    experts_module: nn.Module
    num_experts: int
    layer_index: int


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model` in order, found by the classes of its modules.

    Works for every Hugging Face family whose experts module receives the indices that its router chose (Mixtral,
    Qwen-MoE, OLMoE, DeepSeek, gpt-oss, DBRX and some sixty others); wrappers (PEFT, DDP, torch.compile) are looked
    through.

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
        kind = type(module).__name__
        reason = next((why for name, why in _UNSUPPORTED.items() if kind.endswith(name)), None)
        if reason is None and (not kind.endswith("Experts") or kind.endswith("SharedExperts")):
            continue
        if reason is None and not _receives_indices(module):
            reason = f"it takes {inspect.signature(type(module).forward)}, not the indices of the chosen experts"
        if reason is not None:
            raise UserError(
                f"model: the routing of {type(model).__name__} cannot be observed: {path or 'the model'} is a {kind}, "
                f"and {reason}"
            )
        numbers = re.findall(r"\.(\d+)(?=\.|$)", path)
        name = re.sub(r"(\.base_layer)+$", "", path)
        layers.append(MoELayer(name, module, _num_experts(path, module), int(numbers[-1]) if numbers else len(layers)))
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


def _receives_indices(module: nn.Module) -> bool:
    return _argument_names(module)[1:2] in ([name] for name in _INDEX_ARGUMENTS)


def _argument_names(module: nn.Module) -> list[str]:
    """Of the class: an instance's forward may be replaced by a wrapper that takes anything."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _num_experts(path: str, module: nn.Module) -> int:
    for attribute in ("num_experts", "num_routed_experts"):
        if isinstance(value := getattr(module, attribute, None), int):
            return value
    stacked = [parameter.shape[0] for parameter in module.parameters() if parameter.dim() == 3]
    if not stacked:
        raise UserError(f"model: cannot tell how many experts {path} ({type(module).__name__}) has")
    return min(stacked)


class _DeviceState:
    """What the layers on one device share. Allocated once: only the mask and the scores belong to a forward."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device, table: torch.Tensor | None) -> None:
        self.device = device
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.gate = torch.zeros((), dtype=torch.int32, device=device)
        self.table = None if table is None else table.to(device)
        self.mask: torch.Tensor | None = None  # [T] bool
        self.scores: torch.Tensor | None = None  # [T] float32


class RoutingRecorder:
    r"""Counts the experts that a model's tokens activate, and adds up token scores, while the model runs.

    A context manager; inside it every forward of `model` (in training, generation, under torch.compile or gradient
    checkpointing) adds to `counts`. It sees the very indices that the routers chose:

    .. math::
        \text{counts}_{l,e} \mathrel{+}= \sum_t \text{mask}_t\, a_t(l,e), \qquad
        \text{score}_t = \sum_l \sum_j \text{table}[l, \text{index}_{l,t,j}]

    A token counts where the attention mask is 1, and, when labels are given, only where it bears loss (see
    `loss_bearing`). Scores are given for all tokens. What gradient checkpointing repeats in the backward is not
    counted again. Under data parallelism the counts are those of this process.

    Args:
        model: a causal language model with MoE layers, wrapped or not. Forwards of its submodules alone are refused.
        table: [L, E] finite, for the scores.
        store_routes: keep the indices of the last forward.

    Attributes:
        layers: the MoE layers, in the order of the first axis of everything here.
        counts: [L, E] int64, over all forwards since the last `reset`; kept after the context ends.
        token_scores: [B, S] float32 of the last forward, or None without a table.
        routes: [B, S, L, k] int64 of the last forward with `store_routes`, else None; -1 is no expert: it pads
            layers of smaller k, and marks tokens that skip a layer.

    Raises:
        UserError: a dense model, a family that cannot be observed, a table that does not fit.
        RuntimeError: during a forward, when an MoE layer did not report, or reported other tokens than the batch has.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = MixtralForCausalLM(config)
        >>> with RoutingRecorder(model) as rec:
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.tensor([[1, 1, 0]]))
        >>> rec.counts.sum(dim=1).tolist()  # 2 tokens, each of them to 2 experts
        [4, 4]
    """

    def __init__(self, model: nn.Module, table: torch.Tensor | None = None, store_routes: bool = False) -> None:
        self.layers = moe_layers(model)
        self._model = unwrap(model)
        self._names = _argument_names(self._model)
        self._store_routes = store_routes
        self._num_experts = max(layer.num_experts for layer in self.layers)
        self._table = self._checked(table)
        self._states: dict[torch.device, _DeviceState] = {}
        with torch.inference_mode(False):
            devices = [next(layer.experts_module.parameters()).device for layer in self.layers]
            self._layer_states = [self._state_on(torch.device("cpu") if d.type == "meta" else d) for d in devices]
        self._handles: list[Any] = []
        self._open = False
        self._forwards = 0
        self._shape = (0, 0)  # B, S of the forward under way, or the last one
        self._rows = [-1] * len(self.layers)  # tokens each layer reported in this forward
        self._routes: list[torch.Tensor | None] = [None] * len(self.layers)
        self._next_mask: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        first, *others = self._states.values()
        total = first.counts.clone()
        for state in others:
            total += state.counts.to(total.device)
        return total

    @property
    def token_scores(self) -> torch.Tensor | None:
        parts = [state.scores for state in self._states.values() if state.scores is not None]
        if not parts:
            return None
        total = parts[0].clone()
        for part in parts[1:]:
            total += part.to(total.device)
        return total.view(self._shape)

    @property
    def routes(self) -> torch.Tensor | None:
        given = [route for route in self._routes if route is not None]
        if len(given) != len(self.layers):
            return None
        k = max(route.shape[1] for route in given)
        padded = [nn.functional.pad(r.to(given[0].device).long(), (0, k - r.shape[1]), value=-1) for r in given]
        return torch.stack(padded, dim=1).view(*self._shape, len(given), k)

    def reset(self) -> None:
        """Sets the counts to zero."""
        for state in self._states.values():
            state.counts.zero_()

    def mask_next(self, mask: torch.Tensor) -> None:
        """Lets the next forward count the tokens of `mask` ([B, S] bool) instead of what its arguments say."""
        self._next_mask = mask

    def __enter__(self) -> RoutingRecorder:
        if self._handles:
            raise RuntimeError("this RoutingRecorder is already active: leave its `with` block before entering again")
        self._forwards = 0
        model = self._model
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            # Also after an exception: the gate must not stay open.
            model.register_forward_hook(self._after, always_call=True),
        ]
        for number, layer in enumerate(self.layers):
            self._handles.append(
                layer.experts_module.register_forward_pre_hook(self._experts_hook(number), with_kwargs=True)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._close()
        if kind is None and self._forwards == 0:
            warnings.warn("RoutingRecorder saw no forward of its model, nothing was counted", stacklevel=2)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise RuntimeError(
                "RoutingRecorder: the forward was given no input_ids [B, S] and no inputs_embeds [B, S, H]"
            )
        self._shape = (tokens.shape[0], tokens.shape[1])
        mask = self._mask(given)
        size = tokens.shape[0] * tokens.shape[1]
        for state in self._states.values():
            state.mask = None if mask is None else mask.reshape(-1).to(state.device)
            state.scores = None if state.table is None else torch.zeros(size, device=state.device)
            state.gate.fill_(1)
        self._rows = [-1] * len(self.layers)
        self._routes = [None] * len(self.layers)
        self._open = True

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        was_open = self._open
        self._close()
        if output is None or not was_open:  # the forward raised
            return
        self._forwards += 1
        silent = [layer.name for layer, rows in zip(self.layers, self._rows, strict=True) if rows < 0]
        if silent:
            raise RuntimeError(
                f"RoutingRecorder: {', '.join(silent)} did not report in this forward, so its counts would be wrong. "
                "Either the model does not run these layers here, or kernels route around the experts module, or "
                "the model was compiled and run before the recorder was entered (then call torch.compiler.reset())"
            )

    def _close(self) -> None:
        self._open = False
        for state in self._states.values():
            state.gate.zero_()
            state.mask = None

    def _experts_hook(self, number: int) -> Any:
        layer = self.layers[number]
        names = _argument_names(layer.experts_module)
        index_name, weight_name = names[1:3]
        skips = type(layer.experts_module).__name__.endswith(_SKIPS_WITH_WEIGHT_ZERO)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if not self._open:
                # Gradient checkpointing repeats the layer in the backward; else someone called a part of the model.
                if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
                    raise RuntimeError(
                        f"RoutingRecorder: {layer.name} ran outside a forward of {type(self._model).__name__}; call "
                        "that model, or make the recorder from the part that you call"
                    )
                return
            indices = args[1] if len(args) > 1 else kwargs[index_name]
            if skips:
                weights = args[2] if len(args) > 2 else kwargs[weight_name]
                indices = indices.masked_fill(weights == 0, -1)
            indices = indices.detach().reshape(-1, indices.shape[-1])
            expected = self._shape[0] * self._shape[1]
            if indices.shape[0] != expected or self._rows[number] >= 0:
                again = " a second time" if self._rows[number] >= 0 else ""
                raise RuntimeError(
                    f"RoutingRecorder: {layer.name} reported {indices.shape[0]} tokens{again}, the batch has "
                    f"{self._shape[0]} x {self._shape[1]} = {expected}, each once"
                )
            self._rows[number] = expected
            state = self._layer_states[number]
            if state.device != indices.device:
                state = self._state_on(indices.device)
            tk.record_routing_(
                indices,
                state.counts[number, : layer.num_experts],
                token_mask=state.mask,
                table=None if state.table is None else state.table[number, : layer.num_experts],
                token_score=state.scores,
                gate=state.gate,
            )
            if self._store_routes:
                self._routes[number] = indices

        return hook

    def _mask(self, given: Mapping[str, Any]) -> torch.Tensor | None:
        """[B, S] bool: who counts; None for all."""
        B, S = self._shape
        if self._next_mask is not None:
            mask, self._next_mask = self._next_mask, None
            if tuple(mask.shape) != (B, S) or mask.dtype != torch.bool:
                raise UserError(f"mask_next: got {mask.dtype} {list(mask.shape)}, allowed is bool [B, S] = [{B}, {S}]")
            return mask
        attention = given.get("attention_mask")
        if attention is not None:
            if not isinstance(attention, torch.Tensor) or attention.dim() != 2 or attention.shape[1] < S:
                got = list(attention.shape) if isinstance(attention, torch.Tensor) else type(attention).__name__
                raise UserError(
                    f"attention_mask: got {got}, allowed is [B, S] = [{B}, {S}] or longer by the cached tokens: from "
                    "other masks one cannot tell padding; pass the mask with mask_next"
                )
            attention = attention[:, -S:] != 0  # with a cache the mask covers past tokens too
        labels = given.get("labels")
        if labels is None:
            return attention
        if tuple(labels.shape) != (B, S):
            raise UserError(f"labels: got shape {list(labels.shape)}, allowed is [B, S] = [{B}, {S}]")
        return loss_bearing(labels, None if attention is None else attention.to(labels.device))

    def _state_on(self, device: torch.device) -> _DeviceState:
        if device not in self._states:
            state = _DeviceState(len(self.layers), self._num_experts, device, self._table)
            for other in self._states.values():  # born in a forward that is under way
                state.mask = None if other.mask is None else other.mask.to(device)
                state.scores = None if other.scores is None else torch.zeros_like(other.scores, device=device)
                state.gate.copy_(other.gate)
            self._states[device] = state
        return self._states[device]

    def _checked(self, table: torch.Tensor | None) -> torch.Tensor | None:
        if table is None:
            return None
        shape = [len(self.layers), self._num_experts]
        if list(table.shape) != shape:
            raise UserError(f"table: got shape {list(table.shape)}, allowed is [L, E] = {shape} for this model")
        table = table.detach().float()
        if not bool(torch.isfinite(table).all()):
            raise UserError("table: has NaN or infinite entries, allowed are finite numbers")
        return table
