r"""Runs open-unlearning's `src/train.py` with TRACE's trainers.

    python -m trace_unlearn.integrations.open_unlearning --checkout ../open-unlearning --config-name=unlearn.yaml \
        trainer=TraceNPO experiment=unlearn/tofu/default task_name=trace_npo

Everything after the checkout is for Hydra, as for `python src/train.py`. Packages that open-unlearning imports whether
it needs them or not (deepspeed, lm_eval) may be absent.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import runpy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning import register
from trace_unlearn.integrations.open_unlearning.fused import SHARDED

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trace_unlearn.integrations.open_unlearning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkout", required=True, type=Path, help="a folder with open-unlearning")
    options, for_hydra = parser.parse_known_args(arguments)
    try:
        if any(name.startswith("trainer=Trace") for name in for_hydra) and _launched_sharded():
            raise UserError(SHARDED)
        script = prepare(options.checkout)
        sys.argv = [str(script), "--config-dir", str(CONFIGS), *for_hydra]
        runpy.run_path(str(script), run_name="__main__")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _launched_sharded() -> bool:
    """Whether `accelerate launch` asked for it; the trainers ask again, since their arguments may, too."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))


def prepare(checkout: Path) -> Path:
    """Makes the checkout importable, registers the trainers; returns the script to run. Goes to its folder."""
    checkout = checkout.resolve()
    script = checkout / "src" / "train.py"
    if not script.is_file():
        raise UserError(f"--checkout: {checkout} holds no src/train.py, allowed is a folder with open-unlearning")
    sys.path.insert(0, str(script.parent))
    os.chdir(checkout)  # its configuration names folders relative to it
    with _stand_ins():
        try:
            register()
            importlib.import_module("evals")
        except ModuleNotFoundError as error:
            raise UserError(f"open-unlearning: its requirement {error.name} is not installed") from error
    if int(transformers.__version__.split(".")[0]) >= 5:
        _speak_of_transformers_5()
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
    raise UserError(f"open-unlearning: this needs {package}, which is not installed")


def _speak_of_transformers_5() -> None:
    """What a checkout made for transformers 4 says otherwise: options that are gone, and what a chat template gives."""
    trainer: Any = importlib.import_module("trainer")
    model: Any = importlib.import_module("model")
    known = inspect.signature(transformers.TrainingArguments.__init__).parameters

    def training_arguments(**given: Any) -> transformers.TrainingArguments:
        gone = sorted(given.keys() - known.keys())
        if gone:
            print(f"open-unlearning: transformers {transformers.__version__} has no {', '.join(gone)}: left out")
        # YAML's null is spelt None in its configuration, and a string is no number of anything under DDP.
        kept: dict[str, Any] = {
            name: given[name] if given[name] != "None" else None for name in given.keys() & known.keys()
        }
        return transformers.TrainingArguments(**kept)

    get_tokenizer = model.get_tokenizer

    def lists_of_tokens(*args: Any, **kwargs: Any) -> Any:
        tokenizer = get_tokenizer(*args, **kwargs)
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        return tokenizer

    trainer.TrainingArguments = training_arguments
    model.get_tokenizer = lists_of_tokens


if __name__ == "__main__":
    sys.exit(main())
