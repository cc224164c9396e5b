"""Which experts a model's own routers choose, observed while it runs."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.routing.adapters import Report, argument_names
from trace_unlearn.routing.hooks import Hook
from trace_unlearn.routing.layers import MoELayer, moe_layers, unwrap
from trace_unlearn.routing.routes import RoutesFile
from trace_unlearn.sources.data import loss_bearing
from trace_unlearn.sources.encoding import IGNORE_INDEX

__all__ = ["MoELayer", "RoutingRecorder", "moe_layers", "unwrap"]

# The tokens that layers see: an encoder-decoder model has two sequences, every other one.
_TOKENS, _ENCODER_TOKENS = 0, 1


class _DeviceState:
    """What the layers on one device that see the same tokens share.

    Allocated once: only the mask and the scores belong to a forward.
    """

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
    `loss_bearing`). Scores are given for all tokens. What gradient checkpointing repeats in the backward is not counted
    again. Under data parallelism the counts are those of this process; `reduced_counts` adds them up. In an
    encoder-decoder model the layers of the encoder count its tokens (attention_mask), the others the decoder's
    (decoder_attention_mask, and labels, which are not shifted there); token scores, routes and `generate` are for
    decoders alone.

    Args:
        model: a causal language model with MoE layers, wrapped or not. Forwards of its submodules alone are refused.
        table: [L, E] finite, for the scores.
        store_routes: True keeps the indices of the last forward. A path also writes those of the tokens that count, in
            the order of the forwards, to a new .npy file [N, L, k] (see `trace_unlearn.routing.routes`), whole once the
            context ends.

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

    def __init__(
        self, model: nn.Module, table: torch.Tensor | None = None, store_routes: bool | str | os.PathLike[str] = False
    ) -> None:
        self.layers = moe_layers(model)
        self._model = unwrap(model)
        self._names = argument_names(self._model)
        self._store_routes = store_routes
        config = getattr(self._model, "config", None)
        self._encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        if self._encoder_decoder and (table is not None or store_routes):
            what = "table" if table is not None else "store_routes"
            raise UserError(
                f"{what}: got one for {type(self._model).__name__}, whose encoder and decoder see "
                "different tokens; allowed are models with one sequence of tokens"
            )
        self._sequence = [
            _ENCODER_TOKENS if self._encoder_decoder and "encoder" in layer.name.split(".") else _TOKENS
            for layer in self.layers
        ]
        self._num_experts = max(layer.num_experts for layer in self.layers)
        self._table = self._checked(table)
        self._states: dict[tuple[torch.device, int], _DeviceState] = {}
        with torch.inference_mode(False):
            devices = [next(layer.experts_module.parameters()).device for layer in self.layers]
            for number, device in enumerate(devices):
                self._state_of(number, torch.device("cpu") if device.type == "meta" else device)
        self._handles: list[Any] = []
        self._file: RoutesFile | None = None
        self._open = False
        self._lock = threading.RLock()  # held during a forward
        self._holder: int | None = None  # the thread that runs one
        self._refused = 0  # forwards within that one
        self._forwards = 0
        self._shapes = [(0, 0), (0, 0)]  # B, S of each sequence in the forward under way, or the last one
        self._rows = [-1] * len(self.layers)  # tokens each layer reported in this forward
        self._routes: list[torch.Tensor | None] = [None] * len(self.layers)
        self._next_mask: torch.Tensor | None = None
        self._spoilt = False  # a forward that raised is counted in a part of the layers

    @property
    def counts(self) -> torch.Tensor:
        if self._spoilt:
            raise RuntimeError(
                "RoutingRecorder: a forward raised after some of the layers had counted its tokens; call reset() and "
                "count anew"
            )
        first, *others = self._states.values()
        total = first.counts.clone()
        for state in others:
            total += state.counts.to(total.device)
        return total

    def reduced_counts(self, group: torch.distributed.ProcessGroup | None = None) -> torch.Tensor:
        """[L, E] int64: `counts` summed over the processes of `group`; all of them must call it.

        The group holds processes that saw different tokens, each token once: the data-parallel ones (all of them under
        DDP, FSDP and ZeRO, and that is the default). Leave out those that saw the same tokens (tensor parallelism).
        Without torch.distributed it is `counts`.

        Raises:
            UserError: no group, and transformers divided the model's tensors among processes.
        """
        counts = self.counts
        if torch.distributed.is_initialized():
            divided = getattr(self._model, "_tp_size", None) or 1
            if group is None and divided > 1:
                raise UserError(
                    f"group: got None for a model divided among {divided} tensor-parallel processes, which see the "
                    "same tokens; allowed is the group of the processes that saw different ones"
                )
            if torch.distributed.get_backend(group) == "nccl" and counts.device.type == "cpu":  # offloaded experts
                counts = counts.cuda()
            torch.distributed.all_reduce(counts, group=group)
        return counts

    @property
    def token_scores(self) -> torch.Tensor | None:
        parts = [state.scores for state in self._states.values() if state.scores is not None]
        if not parts:
            return None
        total = parts[0].clone()
        for part in parts[1:]:
            total += part.to(total.device)
        return total.view(self._shapes[_TOKENS])

    @property
    def routes(self) -> torch.Tensor | None:
        given = [route for route in self._routes if route is not None]
        if len(given) != len(self.layers):
            return None
        k = max(route.shape[1] for route in given)
        padded = [nn.functional.pad(r.to(given[0].device).long(), (0, k - r.shape[1]), value=-1) for r in given]
        return torch.stack(padded, dim=1).view(*self._shapes[_TOKENS], len(given), k)

    def reset(self) -> None:
        """Sets the counts to zero."""
        self._spoilt = False
        for state in self._states.values():
            state.counts.zero_()

    def mask_next(self, mask: torch.Tensor) -> None:
        """Lets the next forward count the tokens of `mask` ([B, S] bool) instead of what its arguments say."""
        self._next_mask = mask

    def __enter__(self) -> RoutingRecorder:
        if self._handles:
            raise RuntimeError("this RoutingRecorder is already active: leave its `with` block before entering again")
        self._forwards = 0
        if self._store_routes and not isinstance(self._store_routes, bool):
            self._file = RoutesFile(self._store_routes, self._num_experts)
        model = self._model
        me = weakref.ref(self)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            recorder = me()
            if recorder is not None:
                recorder._before(args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder = me()
            if recorder is not None:
                recorder._after(output)

        try:
            self._handles.append(model.register_forward_pre_hook(Hook(before), with_kwargs=True))
            # Also after an exception: the gate must not stay open.
            self._handles.append(model.register_forward_hook(Hook(after), always_call=True))
            for number, layer in enumerate(self.layers):
                self._handles += layer.adapter.attach(model, layer.name, layer.experts_module, _reporter(me, number))
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:  # a forward in another thread comes to its end
            self._leave()
        if kind is None and self._forwards == 0:
            warnings.warn("RoutingRecorder saw no forward of its model, nothing was counted", stacklevel=2)

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._next_mask = None
        self._close()
        self._release()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()

    def _hold(self) -> None:
        """Lets a forward of another thread wait for the end of this one. What is compiled takes no lock."""
        self._lock.acquire()
        if not self._handles:  # the context ended meanwhile
            self._lock.release()
        elif self._holder is not None:
            self._refused += 1
            self._lock.release()
            raise RuntimeError(
                f"RoutingRecorder: a forward of {type(self._model).__name__} began within another, so its tokens "
                "cannot be told apart; after an interrupt, leave the `with` block and enter again"
            )
        else:
            self._holder = threading.get_ident()

    def _is_mine(self) -> bool:
        return torch.compiler.is_compiling() or self._holder in (None, threading.get_ident())

    def _release(self) -> None:
        if self._holder == threading.get_ident():
            self._holder, self._refused = None, 0
            self._lock.release()

    def _before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._hold()
            if self._holder is None:
                return
        given = dict(zip(self._names, args, strict=False)) | dict(kwargs)
        self._rows = [-1] * len(self.layers)
        self._routes = [None] * len(self.layers)
        prefix = "decoder_" if self._encoder_decoder else ""
        self._expect(_TOKENS, self._tokens(given, prefix), lambda: self._mask(given, prefix))
        if self._encoder_decoder:
            if given.get("encoder_outputs") is None:
                self._expect(
                    _ENCODER_TOKENS, self._tokens(given, ""), lambda: self._attention(given, "", _ENCODER_TOKENS)
                )
            else:
                self._rows = [0 if sequence == _ENCODER_TOKENS else -1 for sequence in self._sequence]
        self._open = True

    def _tokens(self, given: Mapping[str, Any], prefix: str) -> torch.Tensor:
        names = [prefix + "input_ids", prefix + "inputs_embeds", *(["labels"] if prefix else [])]
        tokens = next((given[name] for name in names if given.get(name) is not None), None)
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise RuntimeError(
                f"RoutingRecorder: the forward was given no {names[0]} [B, S] and no {names[1]} [B, S, H]"
            )
        return tokens

    def _expect(self, sequence: int, tokens: torch.Tensor, mask_of: Callable[[], torch.Tensor | None]) -> None:
        """Readies the states of one sequence for its B * S tokens."""
        self._shapes[sequence] = (tokens.shape[0], tokens.shape[1])
        mask = mask_of()
        for (_, which), state in self._states.items():
            if which != sequence:
                continue
            state.mask = None if mask is None else mask.reshape(-1).to(state.device)
            size = tokens.shape[0] * tokens.shape[1]
            state.scores = None
            if state.table is not None:
                state.scores = torch.zeros(size, dtype=torch.float32, device=state.device)
            state.gate.fill_(1)

    def _after(self, output: Any) -> None:
        if self._holder is None:
            self._end(output)
        elif self._holder == threading.get_ident():
            if self._refused:  # it was never begun
                self._refused -= 1
                return
            try:
                self._end(output)
            finally:
                self._release()

    def _end(self, output: Any) -> None:
        was_open = self._open
        counting = next((state.mask for state in self._states.values()), None)
        self._close()
        self._next_mask = None
        if output is None or not was_open:  # the forward raised
            self._spoilt = self._spoilt or any(rows > 0 for rows in self._rows)
            return
        self._forwards += 1
        silent = [layer.name for layer, rows in zip(self.layers, self._rows, strict=True) if rows < 0]
        if silent:
            raise RuntimeError(
                f"RoutingRecorder: {', '.join(silent)} did not report in this forward, so its counts would be wrong. "
                "Either the model does not run these layers here, or kernels route around the experts module, or "
                "the model was compiled and run before the recorder was entered (then call torch.compiler.reset())"
            )

        if self._file is not None:
            routes = self.routes
            assert routes is not None
            limits = torch.tensor([layer.num_experts for layer in self.layers], device=routes.device)[:, None]
            routes = routes.masked_fill(routes >= limits, -1).flatten(0, 1)
            self._file.append(routes if counting is None else routes[counting.to(routes.device)])

    def _close(self) -> None:
        self._open = False
        for state in self._states.values():
            state.gate.zero_()
            state.mask = None

    def _report(self, number: int, indices: torch.Tensor, rows: torch.Tensor | None) -> None:
        layer, sequence = self.layers[number], self._sequence[number]
        if not self._open or not self._is_mine():
            # Gradient checkpointing repeats the layer in the backward; else someone called a part of the model.
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1:
                raise RuntimeError(
                    f"RoutingRecorder: {layer.name} ran outside a forward of {type(self._model).__name__}; call "
                    "that model, or make the recorder from the part that you call"
                )
            return
        indices = indices.detach().reshape(-1, indices.shape[-1])
        B, S = self._shapes[sequence]
        if rows is not None and rows.shape[0] == indices.shape[0]:
            # The other tokens activate no expert of this layer.
            indices = indices.new_full((B * S, indices.shape[1]), -1).index_copy(0, rows, indices)
        if indices.shape[0] != B * S or self._rows[number] >= 0:
            again = " a second time" if self._rows[number] >= 0 else ""
            raise RuntimeError(
                f"RoutingRecorder: {layer.name} reported {indices.shape[0]} tokens{again}, the batch has "
                f"{B} x {S} = {B * S}, each once"
            )
        self._rows[number] = B * S
        state = self._state_of(number, indices.device)
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

    def _mask(self, given: Mapping[str, Any], prefix: str) -> torch.Tensor | None:
        """[B, S] bool: who counts; None for all."""
        B, S = self._shapes[_TOKENS]
        if self._next_mask is not None:
            mask, self._next_mask = self._next_mask, None
            if tuple(mask.shape) != (B, S) or mask.dtype != torch.bool:
                raise UserError(f"mask_next: got {mask.dtype} {list(mask.shape)}, allowed is bool [B, S] = [{B}, {S}]")
            return mask
        attention = self._attention(given, prefix, _TOKENS)
        labels = given.get("labels")
        if labels is None:
            return attention
        if tuple(labels.shape) != (B, S):
            raise UserError(f"labels: got shape {list(labels.shape)}, allowed is [B, S] = [{B}, {S}]")
        if attention is not None:
            attention = attention.to(labels.device)
        if self._encoder_decoder:  # position t of the decoder predicts label t
            bearing: torch.Tensor = labels != IGNORE_INDEX
            return bearing if attention is None else bearing & attention
        return loss_bearing(labels, attention)

    def _attention(self, given: Mapping[str, Any], prefix: str, sequence: int) -> torch.Tensor | None:
        """[B, S] bool: the tokens that are no padding; None for all."""
        B, S = self._shapes[sequence]
        name = prefix + "attention_mask"
        attention = given.get(name)
        if attention is None:
            return None
        if not isinstance(attention, torch.Tensor) or attention.dim() != 2 or attention.shape[1] < S:
            got = list(attention.shape) if isinstance(attention, torch.Tensor) else type(attention).__name__
            raise UserError(
                f"{name}: got {got}, allowed is [B, S] = [{B}, {S}] or longer by the cached tokens: from "
                "other masks one cannot tell padding; pass the mask with mask_next"
            )
        return attention[:, -S:] != 0  # with a cache the mask covers past tokens too

    def _state_of(self, number: int, device: torch.device) -> _DeviceState:
        key = (device, self._sequence[number])
        if key not in self._states:
            with torch.inference_mode(False):  # the next forward may be a normal one
                state = _DeviceState(len(self.layers), self._num_experts, device, self._table)
            for (_, sequence), other in self._states.items():
                if sequence != key[1]:
                    continue
                # Born in a forward that is under way.
                state.mask = None if other.mask is None else other.mask.to(device)
                state.scores = None if other.scores is None else torch.zeros_like(other.scores, device=device)
                state.gate.copy_(other.gate)
            self._states[key] = state
        return self._states[key]

    def _checked(self, table: torch.Tensor | None) -> torch.Tensor | None:
        if table is None:
            return None
        shape = [len(self.layers), self._num_experts]
        if not isinstance(table, torch.Tensor):
            raise UserError(f"table: got {type(table).__name__}, allowed is a tensor [L, E] = {shape} for this model")
        if list(table.shape) != shape:
            raise UserError(f"table: got shape {list(table.shape)}, allowed is [L, E] = {shape} for this model")
        table = table.detach().float()
        if not bool(torch.isfinite(table).all()):
            raise UserError("table: has NaN or infinite entries, allowed are finite numbers")
        return table


def _reporter(recorder: weakref.ref[RoutingRecorder], number: int) -> Report:
    def report(indices: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        found = recorder()
        if found is not None:
            found._report(number, indices, rows)

    return report
