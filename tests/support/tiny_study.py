"""A study of two models in seconds; started as a script, it can be killed."""

import dataclasses
import sys

from studies.method_study import work
from studies.method_study.__main__ import main
from studies.method_study.worlds import SIZES

TINY = {
    corpus: dataclasses.replace(
        sizes,
        pretrain=dataclasses.replace(sizes.pretrain, layers=2, experts=8, experts_per_token=2, steps=60),
        recipe=dataclasses.replace(sizes.recipe, unlearn_steps=6, evaluate_every=2),
    )
    for corpus, sizes in SIZES.items()
}


def run(output):
    work.default_sizes = lambda quick: TINY
    return main(["--output", str(output), "--models", "2", "--jobs", "1", "--only", "base"])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
