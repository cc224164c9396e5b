"""Forcing tokens away from experts: does what they held live on in others?"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.predictions import Batch
from trace_unlearn.forwards import attach, detach
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers
from trace_unlearn.routing.routers import Pairs, RouterLogits, layers_of, router_of


class ExpertBan:
    """Takes experts out of the choice of a model's routers: their logits become -inf, all else is the model's own.

    An expert of logit -inf has probability or score 0. Where a selection bias lets it be chosen all the same, it
    contributes nothing: its weight is 0.

    Args:
        model: an MoE language model.

    Attributes:
        banned: for each MoE layer, in order, bool [E], or [T, E] for the T tokens of the next forward; None bans none.

    Raises:
        UserError: a model without routers that can be found.
        RuntimeError: during a forward, when a router computes its logits otherwise than by one linear map.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
        >>> model = MixtralForCausalLM(config)
        >>> with ExpertBan(model) as ban, RoutingRecorder(model) as seen:
        ...     ban.banned = [torch.tensor([True, False, True, False])]
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> seen.counts.tolist()
        [[0, 3, 0, 3]]
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = moe_layers(model)
        self.banned: Sequence[Tensor] | None = None
        self._attached = [
            (router_of(model, layer)[1], RouterLogits(functools.partial(self._without, number), layer))
            for number, layer in enumerate(self.layers)
        ]

    def __enter__(self) -> ExpertBan:
        for router, layer in self._attached:
            attach(router, layer)
        return self

    def __exit__(self, *error: object) -> None:
        for router, layer in self._attached:
            detach(router, layer)

    @contextlib.contextmanager
    def during(self, banned: Sequence[Tensor]) -> Iterator[None]:
        """Bans for the forwards inside, and none afterwards."""
        self.banned = banned
        try:
            yield
        finally:
            self.banned = None

    def _without(self, number: int, logits: Tensor) -> Tensor | None:
        if self.banned is None:
            return None
        banned = self.banned[number].to(logits.device)
        return logits.masked_fill(banned.view(*logits.shape) if banned.dim() > 1 else banned, -torch.inf)


Around = Callable[[Batch], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def avoiding(model: PreTrainedModel, pairs: Pairs) -> Iterator[Around]:
    """Gives what to put around a forward in which no token may use the (decoder layer, expert) of `pairs`.

    Raises:
        UserError: there is no such layer or expert, or a layer is left fewer experts than a token takes.
    """
    by_index = layers_of(model, pairs, "pairs")
    k = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)
    with ExpertBan(model) as ban:
        masks = []
        for layer in ban.layers:
            _, experts = by_index.get(layer.layer_index, (layer, []))
            masks.append(torch.tensor([expert in experts for expert in range(layer.num_experts)]))
            _check_left(layer.name, layer.num_experts - len(set(experts)), k if isinstance(k, int) else 1)

        @contextlib.contextmanager
        def around(batch: Batch) -> Iterator[None]:
            with ban.during(masks):
                yield

        yield around


@contextlib.contextmanager
def avoiding_chosen(model: PreTrainedModel) -> Iterator[Around]:
    """Gives what to put around a forward in which each token must do without the experts that it takes by itself.

    They are those of a forward of its own, before: GRIP's attack with all the experts of a token.
    """
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    with ExpertBan(model) as ban, RoutingRecorder(model, store_routes=True) as recorder:

        @contextlib.contextmanager
        def around(batch: Batch) -> Iterator[None]:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **keep)
            assert recorder.routes is not None
            routes = recorder.routes.flatten(0, 1)  # [T, L, k]
            masks = []
            for number, layer in enumerate(ban.layers):
                # Column E takes what is no expert.
                chosen = routes[:, number].masked_fill(routes[:, number] < 0, layer.num_experts)
                mask = torch.zeros(len(routes), layer.num_experts + 1, dtype=torch.bool, device=routes.device)
                masks.append(mask.scatter_(1, chosen.clamp(max=layer.num_experts), True)[:, :-1])
                _check_left(layer.name, layer.num_experts - routes.shape[2], routes.shape[2])
            with ban.during(masks):
                yield

        yield around


def _check_left(name: str, left: int, needed: int) -> None:
    if left < needed:
        raise UserError(f"reroute: {name} would be left {left} experts, and a token takes {needed}")
