"""The verb `plan`: what a training run needs of every device's memory, from the file that `run` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from trace_unlearn.checks import check_integers, check_numbers, check_word
from trace_unlearn.errors import UserError
from trace_unlearn.sources.model import check_inputs, check_placement
from trace_unlearn.verbs import run
from trace_unlearn.verbs.memory import (
    GB,
    HALF,
    OPTIMIZERS,
    Plan,
    PlanOptions,
    estimate,
    memory_of,
    size,
    stored_in,
    trained_in,
)
from trace_unlearn.verbs.run import RENAMED, known_names
from trace_unlearn.verbs.train_options import check_adapted

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["GB", "RENAMED", "Plan", "PlanOptions", "check", "estimate", "known_names", "main", "trained_in"]

SHARDINGS = ("none", "ddp", "fsdp2", "zero2", "zero3")


def add_arguments(parser: ArgumentParser) -> None:
    """The flags: those of `run`, and a plan's own."""
    parser.add_class_arguments(PlanOptions, as_group=False, skip={"train"})
    parser.add_argument("--forget", type=str, help="not read")
    parser.add_argument("--retain", type=str, help="not read")
    run.add_arguments(parser, skip={"forget", "retain"})


def options_from(namespace: Namespace) -> PlanOptions:
    """The options that the command line gave."""
    mine = {field.name: namespace[field.name] for field in dataclasses.fields(PlanOptions) if field.name != "train"}
    return PlanOptions(run.train_options(run.options_from(namespace)), **mine)


def main(options: PlanOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    config = check(options)
    memory, device = memory_of(options)
    kept, options = options.train.dtype, trained_in(options, config, memory)
    plan = estimate(options, config)
    shared = "" if options.processes == 1 else f", each of {options.processes} processes ({options.sharding})"
    say(f"plan: {options.train.model}{shared}")
    stored, dtype = stored_in(config), options.train.dtype
    if kept == "auto" and dtype not in ("auto", stored):
        say(f"the weights are trained in {dtype}, and written in {stored} as they are stored")
    elif dtype in HALF and not options.train.lora_rank:
        say(f"the weights are trained in {dtype}: small updates are lost to rounding")
    for name, value in (
        ("weights", plan.weights),
        ("gradients", plan.gradients),
        (f"optimiser ({options.optimizer})", plan.optimizer),
        ("communication buffers", plan.communication),
        ("activations (estimate)", plan.activations),
        ("in all", plan.total),
        (f"there is ({device})", memory),
        ("not needed here: a plain loss's logits", plan.logits_avoided),
        ("not needed here: a reference model", plan.reference_avoided),
        ("on disk: a checkpoint to resume from", plan.checkpoint),
    ):
        say(f"  {name:<40}{size(value):>13}")
    if plan.total <= memory:
        say("it fits")
        return
    ways = [(name, estimate(changed, config).total) for name, changed in _changes(options).items()]
    say("it does not fit; alone each of these needs:")
    for name, total in sorted(ways, key=lambda way: way[1]):
        say(f"  {name:<60}{size(total):>13}{'  fits' if total <= memory else ''}")
    raise UserError(
        f"memory: it does not fit: {size(plan.total)} are needed on a device, and there are {size(memory)} ({device})"
    )


def check(options: PlanOptions) -> PreTrainedConfig:
    """The model's configuration; UserError for options that do not fit each other."""
    train = options.train
    check_placement(train.dtype, "cpu")
    check_adapted(train)
    check_word("training.optim", options.optimizer, OPTIMIZERS)
    check_word("sharding", options.sharding, SHARDINGS)
    check_integers(train, max_length=1)
    check_integers(train.arguments, "training.", per_device_train_batch_size=1)
    check_integers(options, processes=1)
    check_numbers(options, "memory", above_0=True)
    if options.processes > 1 and options.sharding == "none":
        raise UserError(f"sharding: got 'none' with {options.processes} processes, allowed: {', '.join(SHARDINGS[1:])}")
    return check_inputs(train.model, moe=False, weights=False)


def _changes(options: PlanOptions) -> dict[str, PlanOptions]:
    """The plan's options with single changes that save memory, by what to call them."""
    train, given = options.train, options.train.arguments

    def trained(training: dict[str, Any] | None = None, **changes: Any) -> PlanOptions:
        changed = dataclasses.replace(train, training={**train.training, **(training or {})}, **changes)
        return dataclasses.replace(options, train=changed)

    ways: dict[str, PlanOptions] = {}
    checkpointing = {"gradient_checkpointing": True}
    if train.joint_forward:
        ways["joint_forward false"] = trained(joint_forward=False)
    if not given["gradient_checkpointing"]:
        ways["gradient_checkpointing true"] = trained(checkpointing)
    if (size := given["per_device_train_batch_size"]) > 1:
        name = f"per_device_train_batch_size 1, gradient_accumulation_steps {size}"
        ways[name] = trained({"per_device_train_batch_size": 1})
    if not train.lora_rank:
        adapters: dict[str, Any] = {"lora_rank": 8, "trainable": [], "experts": []}
        ways["lora_rank 8"] = trained(**adapters)
        ways["lora_rank 8, gradient_checkpointing true"] = trained(checkpointing, **adapters)
    if train.dtype in ("auto", "float32"):
        ways["dtype bfloat16"] = trained(dtype="bfloat16")
    for count in (2, 4, 8, 16):
        if count > options.processes:
            ways[f"fsdp2 over {count} devices"] = dataclasses.replace(options, sharding="fsdp2", processes=count)
    return ways
