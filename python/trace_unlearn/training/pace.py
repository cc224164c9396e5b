"""A learning rate that need not be known: it follows the model's width, and then what is measured.

Adam moves every weight by about the learning rate in a step, and a layer's output by about that times its width. So
where a model of hidden size 2048 is unlearned at 1e-5, as is usual, one of hidden size 64 hardly moves at that rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

WIDTH_TIMES_RATE = 0.02  # 1e-5 at hidden size 2048, 5e-6 at 4096
ADAPTERS = 10.0  # low-rank adapters begin at zero and take a larger rate
INCREASE = 1.5  # nats per token: where a paced run stops by default
LEAST_STEPS = 150  # of a paced run: so many are there to find the rate; it stops when enough is forgotten
LARGEST = 256.0  # times the rate that the width gives, up and down
FAST = 1 / 3  # of the way in one interval is too fast


def rate_of_width(hidden_size: int, *, adapters: bool = False) -> float:
    """The learning rate to begin with.

    >>> rate_of_width(2048), rate_of_width(64), rate_of_width(2048, adapters=True)
    (9.8e-06, 0.00031, 9.8e-05)
    """
    return float(f"{WIDTH_TIMES_RATE * (ADAPTERS if adapters else 1.0) / hidden_size:.2g}")


def factor(measured: Sequence[tuple[int, float]], goal: float, steps: int) -> float:
    """What multiplies the learning rate from now on.

    Between two measures the forget loss should rise by what is left to `goal` over the intervals that are left. Where
    it rises by less the rate is doubled; where it rises by more than a third of the whole way, it is halved. What the
    function says depends on the measures alone, so that a resumed run takes the same steps.

    Args:
        measured: (step, mean forget loss) of all measures, the first at step 0.
        goal: the forget loss to come to.
        steps: the steps of the whole run.

    >>> factor([(0, 0.0)], 1.5, 100), factor([(0, 0.0), (10, 0.01)], 1.5, 100)
    (1.0, 2.0)
    >>> factor([(0, 0.0), (10, 0.01), (20, 0.4)], 1.5, 100), factor([(0, 0.0), (10, 0.6)], 1.5, 100)
    (2.0, 0.5)
    """
    found = 1.0
    for (before, old), (step, now) in itertools.pairwise(measured):
        intervals = max((steps - step) / (step - before), 1.0)
        if now - old < (goal - now) / intervals:
            found *= 2
        elif now - old > FAST * (goal - measured[0][1]):
            found /= 2
        found = min(max(found, 1 / LARGEST), LARGEST)
    return found
