"""The verb `train`: model, data and calibration in, an unlearned checkpoint out."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from trace_unlearn import files
from trace_unlearn.calibration.weights import Calibration, attach_weights
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import asked, check_disjoint, check_held_out, check_positions, fingerprint, load_tokens
from trace_unlearn.sources.folder import folder_of
from trace_unlearn.sources.model import check_inputs, load_model, load_tokenizer
from trace_unlearn.training.checkpoints import last_complete
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.early_stop import FORGET
from trace_unlearn.training.experts import chosen_experts, train_experts
from trace_unlearn.training.pace import LEAST_STEPS, rate_of_width
from trace_unlearn.training.pairs import check_alternates
from trace_unlearn.training.trainable import LoraOptions, add_lora, train_only
from trace_unlearn.training.trainer import TRACE, TraceTrainer
from trace_unlearn.verbs.lock import LOCK, alone
from trace_unlearn.verbs.memory import HALF, PlanOptions, memory_of, trained_in
from trace_unlearn.verbs.train_options import RENAMED, TrainOptions, check, known_names, logs_of, training_arguments
from trace_unlearn.versions import versions

__all__ = ["MAKES", "PLACES", "RENAMED", "TrainOptions", "check", "known_names", "main", "sources"]

logger = logging.getLogger(__name__)

LOGS = "TENSORBOARD_LOGGING_DIR"  # which transformers reads
RECORD = "run.json"  # in the folder of a run under way: what it depends on
# What a resumed run may change: it does not touch the result (but save_steps does where a checkpoint is chosen).
_FREE = ("output", "device", "training.logging_steps", "training.save_steps", "training.save_total_limit")
MAKES = "model"
PLACES = ("model", "forget", "retain", "calibration", "profile", "output")


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that is known before the model is loaded."""

    config: TraceConfig
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, datasets.Dataset]  # forget, retain, alternate, retain_eval: those that are used
    calibration: Calibration | None
    facts: dict[str, Any]  # what the run depends on
    dtype: str  # of the weights while they are trained
    stored: torch.dtype | None  # and as they are written
    arguments: dict[str, Any]  # TrainingArguments that follow from the model and the data


def sources(options: TrainOptions) -> dict[str, str]:
    """What it reads besides its places, by option."""
    given = {"alternate": options.alternate, "retain_eval": options.retain_eval}
    return {name: source for name, source in given.items() if source is not None}


def main(options: TrainOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: checks everything, loads, trains or resumes, writes the folder `options.output`."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        say = _silent
    options = files.at_home(options)
    config = check(options)
    experts = chosen_experts(options.experts, options.calibration, options.profile)
    config = dataclasses.replace(config, anchor_experts=experts)
    output, work = Path(options.output), _work(options)
    if os.environ.get("WORLD_SIZE", "1") == "1" and remove_leftover(options):
        say(f"train: done already, {output} is there")
        return
    files.refuse_existing(output)
    does = [f"forgets {options.forget}"] if config.method.forget_loss is not None else []
    if config.method.uses_retain:
        does.append(f"{'keeps' if does else 'learns'} {options.retain}")
    weights = config.weighting if config.routes_weigh else "uniform"
    say(f"train: {options.model} {' and '.join(does)} -> {output} ({config.objective}, {weights} weights)")
    inputs = _read(options, config)
    if (prompt := inputs.facts["asked"]) is not None:
        say(f"questions are asked as {prompt!r}")
    arguments = training_arguments(options, work, **inputs.arguments)
    with _logging_to(logs_of(options)), _alone(work) if first else contextlib.nullcontext():
        _train(options, inputs, arguments, output, say)
        if first:
            shutil.rmtree(work, ignore_errors=True)
    say(f"written to {output}")


def check_data(options: TrainOptions, model: str) -> None:
    """UserError where the alternate documents are no pairs of the forget documents."""
    if options.alternate is None or options.forget is None or not check(options).needs["alternate"]:
        return
    tokenizer = load_tokenizer(model)
    sets = [
        load_tokens(
            source,
            tokenizer,
            max_length=options.max_length,
            limit=options.forget_limit,
            question_template=options.question_template,
            progress=False,
        )
        for source in (options.forget, options.alternate)
    ]
    check_alternates(*sets)


def _train(
    options: TrainOptions, inputs: _Inputs, arguments: TrainingArguments, output: Path, say: Callable[[str], None]
) -> None:
    work, first = _work(options), arguments.process_index == 0
    if first:
        _check_same_run(work, inputs.facts)
    try:
        trainer = _trainer(options, inputs, arguments, say)
        if first:
            files.write_json(work / RECORD, inputs.facts)
        trainer.train(resume_from_checkpoint=True)
        source = folder_of(options.model) if first else None
        facts = {**inputs.facts, "versions": versions()}
        trainer.save_unlearned(output, facts, source=source, dtype=inputs.stored)
        say(_outcome(trainer))
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: use a smaller training.per_device_train_batch_size with more "
            "training.gradient_accumulation_steps (the result is the same), training.gradient_checkpointing, a smaller "
            "max_length, or lora_rank"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(
            f"{work} and {output}: cannot be written: {error}; the same command goes on from the last whole checkpoint"
        ) from error


def _work(options: TrainOptions) -> Path:
    """Where the run works until the output is there."""
    return Path(f"{Path(options.output)}.training")  # a Path drops the slash at the end


def remove_leftover(options: TrainOptions) -> bool:
    """Whether these options' output is there; removes the folder of a run that was stopped before it could itself."""
    output, work = Path(options.output), _work(options)
    if not ((work / RECORD).is_file() and (output / TRACE).is_file()):
        return False
    begun, written = files.read_json(work / RECORD), files.read_json(output / TRACE)
    wanted = json.loads(json.dumps(_recorded(options)))
    if any(written.get(name) != value for name, value in begun.items()):
        return False
    if any(wanted.get(name) != value for name, value in begun["options"].items()):
        return False
    shutil.rmtree(work, ignore_errors=True)
    return True


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keeps other processes out of the run's folder, and removes it where nothing was made in it."""
    fresh = not work.exists()
    with files.explained(work, "write"):
        work.mkdir(parents=True, exist_ok=True)
    try:
        with alone(work):
            yield
    finally:
        if fresh and {path.name for path in work.glob("*")} <= {LOCK}:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _logging_to(folder: str | None) -> Iterator[None]:
    """Makes TensorBoard write there, unless the environment names another folder."""
    if folder is None or LOGS in os.environ:
        yield
        return
    os.environ[LOGS] = folder
    try:
        yield
    finally:
        del os.environ[LOGS]


def _silent(message: str) -> None:
    pass


def _read(options: TrainOptions, config: TraceConfig) -> _Inputs:
    """Everything but the model, checked."""
    model_config = check_inputs(options.model, moe=config.routes_weigh or bool(config.anchor_experts))
    tokenizer = load_tokenizer(options.model, model_config)
    calibration, digest = None, None
    if options.calibration is not None and config.routes_weigh:
        calibration, digest = Calibration.load(options.calibration), _digest(Path(options.calibration))
    limits = {"forget": options.forget_limit, "retain": options.retain_limit, "alternate": options.forget_limit}
    limits["retain_eval"] = config.stop_documents
    needs = {**config.needs, "retain_eval": options.retain_eval is not None}
    sets = {
        name: load_tokens(
            getattr(options, name),
            tokenizer,
            max_length=options.max_length,
            limit=limits[name],
            question_template=options.question_template,
        )
        for name, needed in needs.items()
        if needed
    }
    check_positions(model_config, **sets)
    if "forget" in sets and "retain" in sets:
        check_disjoint(sets["forget"], sets["retain"])
    if "retain_eval" in sets:
        check_held_out(sets["retain_eval"], sets["retain"])
    if "alternate" in sets:
        check_alternates(sets["forget"], sets["alternate"])
    prints = {f"{name}_fingerprint": fingerprint(documents) for name, documents in sets.items()}
    if calibration is not None:
        _check_calibration(options, calibration, model_config.model_type, prints["forget_fingerprint"])
        sets["retain"] = attach_weights(sets["retain"], calibration)
    facts = {
        "method": _method(config, calibration is not None),
        "options": _recorded(options),
        "model_digest": files.digest_of(options.model, "model"),
        **prints,
        "asked": asked(*sets.values()),
        "experts": [list(pair) for pair in config.anchor_experts],
        "calibration": None if calibration is None else {"sha256": digest, **calibration.facts()},
    }
    planned, stored = _precision(options, model_config)
    found = {"bf16": planned.arguments["bf16"], **_pace(options, config, model_config, sets)}
    facts |= {"trained_in": planned.dtype, **{name: found[name] for name in ("learning_rate", "bf16")}}
    return _Inputs(config, tokenizer, sets, calibration, facts, planned.dtype, stored, found)


def _precision(options: TrainOptions, model_config: PreTrainedConfig) -> tuple[TrainOptions, torch.dtype | None]:
    """The options with the dtype that weights are trained in, and the dtype to write; None as they come."""
    stored: Any = model_config.dtype
    if stored is None or getattr(model_config, "quantization_config", None) is not None:
        return options, None
    plan = PlanOptions(options)
    planned = trained_in(plan, model_config, memory_of(plan, on_cpu=options.device == "cpu")[0]).train
    return planned, getattr(torch, planned.dtype) if planned.dtype in HALF else stored


def _pace(
    options: TrainOptions,
    config: TraceConfig,
    model_config: PreTrainedConfig,
    sets: Mapping[str, datasets.Dataset],
) -> dict[str, Any]:
    """The learning rate to begin with, and the steps of a run that finds its own pace."""
    given = options.arguments
    if given["learning_rate"] is not None:
        return {"learning_rate": given["learning_rate"]}
    width = model_config.get_text_config().hidden_size
    found: dict[str, Any] = {"learning_rate": rate_of_width(width, adapters=bool(options.lora_rank))}
    if config.pace and given["max_steps"] == -1:
        step = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
        step *= int(os.environ.get("WORLD_SIZE", "1"))
        if math.ceil(given["num_train_epochs"] * math.ceil(len(sets["forget"]) / step)) < LEAST_STEPS:
            found["max_steps"] = LEAST_STEPS
    return found


def _outcome(trainer: TraceTrainer) -> str:
    """What training itself saw of the forgetting."""
    log = trainer.state.log_history
    if trainer.trace_config.method.forget_loss is None:
        return f"{trainer.state.global_step} steps"
    measured = [entry[FORGET] for entry in log if FORGET in entry]
    steps = f"after {trainer.state.global_step} of {trainer.state.max_steps} steps"
    if len(measured) < 2:
        return f"{steps}; whether it has forgotten, `trace-unlearn evaluate` tells"
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    told = f"NLL of forget documents {measured[0]:.3f} -> {measured[-1]:.3f} {steps}"
    if rates:
        told += f", learning rate up to {max(rates):.2g}"
    goal = trainer.trace_config.stop_forget_increase
    if goal is not None and not measured[-1] >= measured[0] + goal:
        told = f"NOT ENOUGH FORGOTTEN: {told}; it should rise by {goal}: give more steps, or a learning_rate"
    return told


def _recorded(options: TrainOptions) -> dict[str, Any]:
    """The options that the result follows from, flat, with the defaults of `training`."""
    free = {*_FREE} - ({"training.save_steps"} if options.method.best_forget_nll is not None else set())
    method, training = dataclasses.asdict(options.method), options.arguments
    flat = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("method", "training")}
    flat |= {f"method.{name}": value for name, value in method.items() if name != "anchor_experts"}
    flat |= {f"training.{name}": value for name, value in training.items()}
    return {name: value for name, value in flat.items() if name not in free}


def _method(config: TraceConfig, calibrated: bool) -> str:
    if config.method.forget_loss is None:
        return "fine-tuning"
    if not config.method.uses_retain:
        return "no retain loss"
    return "TRACE" if calibrated else "uniform retain weights"


def _check_calibration(options: TrainOptions, calibration: Calibration, model_type: str, forget: str) -> None:
    """UserError when it was made for another kind of model or other forget data; a warning for another name."""
    made = calibration.choices
    if made.get("model_type") not in (None, model_type):
        raise UserError(
            f"calibration: was made with {made.get('model')} of type {made['model_type']}, and {options.model} is of "
            f"type {model_type}; profile and calibrate again with this model"
        )
    if made.get("forget_fingerprint") not in (None, forget):
        raise UserError(
            "forget: the data is not what the calibration was made for (another file, tokenizer, max_length or limit); "
            "profile and calibrate again with this data"
        )
    if (name := made.get("model")) and Path(name).resolve() != Path(options.model).resolve():
        logger.warning("the calibration was made with %s: is %s the same model?", name, options.model)


def _digest(folder: Path) -> str:
    """The SHA-256 of a folder's files, names included."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def _check_same_run(work: Path, facts: Mapping[str, Any]) -> None:
    """Refuses to go on with a run of other options or other data."""
    if not (work / RECORD).exists():
        if {path.name for path in work.iterdir()} > {LOCK}:
            files.refuse_existing(work)
        return
    before, now = files.read_json(work / RECORD), json.loads(json.dumps(facts))  # both as JSON holds them
    if before == now or last_complete(work) is None:
        return
    options = {name for name, value in now["options"].items() if before.get("options", {}).get(name) != value}
    changed = sorted(options or {name for name in now if before.get(name) != now[name]})
    raise UserError(
        f"{work}: holds an interrupted run with other {', '.join(changed)}; give the same again to go on with it, or "
        "remove that folder to start anew"
    )


def _trainer(
    options: TrainOptions, inputs: _Inputs, arguments: TrainingArguments, say: Callable[[str], None]
) -> TraceTrainer:
    device = "cpu" if arguments.world_size > 1 or arguments.device.type == "cpu" else None
    model: Any = load_model(options.model, dtype=inputs.dtype, device=device)
    if options.lora_rank:
        torch.manual_seed(options.arguments["seed"])
        modules, parameters = tuple(options.lora_modules), tuple(options.lora_parameters)
        model = add_lora(model, LoraOptions(options.lora_rank, options.lora_alpha, modules, parameters))
    elif options.trainable:
        train_only(model, options.trainable)
    experts = inputs.config.anchor_experts
    rows = train_experts(model, experts) if experts else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count, total = rows or sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    kinds = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained}))
    written = "" if inputs.stored is None else f", and written in {str(inputs.stored).removeprefix('torch.')}"
    computed = ", computed in bfloat16" if arguments.bf16 else ""
    say(f"{count:,} of {total:,} parameters are trained in {kinds}{computed}{written}, on {arguments.device}")
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained):
        logger.warning(
            "the trained weights are in half precision, where small updates are lost to rounding: where there is too "
            "little memory for float32 (`trace-unlearn plan` says how much it needs), lora_rank trains in float32"
        )
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if "forget" in inputs.sets and step > (there := len(inputs.sets["forget"])):
        logger.warning("a step takes %d forget documents and there are %d: some are in it several times", step, there)
    return TraceTrainer(
        model,
        arguments,
        config=inputs.config,
        **inputs.sets,
        joint_forward=options.joint_forward,
        calibration=inputs.calibration if inputs.config.weighting == "live" else None,  # otherwise attached already
        processing_class=inputs.tokenizer,
    )
