r"""Runs open-unlearning's `src/train.py` with TRACE's trainers, or its `src/eval.py`.

    python -m trace_unlearn.integrations.open_unlearning --checkout ../open-unlearning --config-name=unlearn.yaml \
        trainer=TraceNPO experiment=unlearn/tofu/default task_name=trace_npo

    python -m trace_unlearn.integrations.open_unlearning --checkout ../open-unlearning --script eval \
        --config-name=eval.yaml experiment=eval/tofu/default task_name=trace_npo_eval

All else is for Hydra, as for `python src/train.py`. Packages that open-unlearning imports whether
it needs them or not (deepspeed, lm_eval) may be absent.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning import register
from trace_unlearn.integrations.open_unlearning.fused import SHARDED
from trace_unlearn.integrations.open_unlearning.versions import prepare_checkout

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trace_unlearn.integrations.open_unlearning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkout", required=True, type=Path, help="a folder with open-unlearning")
    parser.add_argument("--script", choices=("train", "eval"), default="train", help="which of its scripts to run")
    options, for_hydra = parser.parse_known_args(arguments)
    try:
        if any(name.startswith("trainer=Trace") for name in for_hydra) and _launched_sharded():
            raise UserError(SHARDED)
        script = prepare(options.checkout, options.script)
        sys.argv = [str(script), "--config-dir", str(CONFIGS), *for_hydra]
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _launched_sharded() -> bool:
    """Whether `accelerate launch` asked for it; the trainers ask again, since their arguments may, too."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))


def prepare(checkout: Path, name: str = "train") -> Path:
    """Makes the checkout importable, registers the trainers; returns the script to run. Goes to its folder."""
    checkout = checkout.resolve()
    script = checkout / "src" / f"{name}.py"
    if not script.is_file():
        raise UserError(f"--checkout: {checkout} holds no src/{name}.py, allowed is a folder with open-unlearning")
    sys.path.insert(0, str(script.parent))
    os.chdir(checkout)  # its configuration names folders relative to it
    with _stand_ins():
        try:
            register()
            importlib.import_module("evals")
            prepare_checkout()
        except ModuleNotFoundError as error:
            raise UserError(f"open-unlearning: its requirement {error.name} is not installed") from error
    return script


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Inside, packages that are imported and need not be used are there, though empty where they are not installed."""
    absent = {name for name in ("deepspeed", "lm_eval") if importlib.util.find_spec(name) is None}
    made: dict[str, Any] = {name: types.ModuleType(name) for name in _IMPORTED if name.split(".")[0] in absent}
    for name, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # read by those who ask whether it is installed
        for member in _IMPORTED[name]:
            raising = {"__init__": functools.partialmethod(_absent, name.split(".")[0])}
            setattr(module, member, type(member, (), raising))
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


_IMPORTED = {
    "deepspeed": ("DeepSpeedEngine",),
    "lm_eval": ("simple_evaluate",),
    "lm_eval.models": (),
    "lm_eval.models.hf_vlms": ("HFLM",),
    "lm_eval.tasks": ("TaskManager",),
}


def _absent(self: object, package: str, *args: Any, **kwargs: Any) -> None:
    without = ", or leave its evaluation out with '~eval.lm_eval'" if package == "lm_eval" else ""
    raise UserError(f"open-unlearning: this needs {package}, which is not installed: install it{without}")


if __name__ == "__main__":
    sys.exit(main())
