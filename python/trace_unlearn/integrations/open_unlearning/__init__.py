"""TRACE and losses without logits in open-unlearning: trainers for the reader's own checkout of it.

`python -m trace_unlearn.integrations.open_unlearning --checkout DIR ...` runs its `src/train.py` with them. Nothing of
its code is here: the classes are made at run time from its own.
"""

from __future__ import annotations

import importlib
from typing import Any

from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning.losses import METHODS, trainer_class

__all__ = ["register"]


def register() -> list[str]:
    """Adds TraceGradDiff, TraceNPO and so on to the trainers of open-unlearning; returns their names.

    Its folder `src` must be importable. A second call changes nothing.

    Raises:
        UserError: what is importable as `trainer` is something else.
    """
    trainer: Any = importlib.import_module("trainer")
    missing = [name for name in ("TRAINER_REGISTRY", *METHODS) if not hasattr(trainer, name)]
    if missing:
        raise UserError(
            f"open-unlearning: {getattr(trainer, '__file__', 'trainer')} has no {', '.join(missing)}; "
            "put its folder src first on sys.path"
        )
    names = []
    for name in METHODS:
        cls = trainer_class(getattr(trainer, name), name)
        trainer.TRAINER_REGISTRY.setdefault(cls.__name__, cls)
        names.append(cls.__name__)
    return names
