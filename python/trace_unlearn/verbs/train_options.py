"""The options of the verb `train`, checked as far as they can be without reading anything."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations

from trace_unlearn.checks import check_integers, check_numbers, check_word, meant
from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import check_template
from trace_unlearn.sources.folder import refuse_inside
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.experts import check_words
from trace_unlearn.training.pace import INCREASE
from trace_unlearn.training.trainable import check_patterns

#: Where `training` differs from the defaults of transformers.TrainingArguments, and the fields that most runs set.
DEFAULTS: dict[str, Any] = {
    "learning_rate": None,  # the run finds its own
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": -1,
    "num_train_epochs": 5.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "seed": 0,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 1,
    "logging_steps": 10,
    "report_to": "none",
}
#: What other codebases call some of them, and what comes to mind.
RENAMED = {
    "steps": "training.max_steps",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "accumulation": "training.gradient_accumulation_steps",
    "schedule": "training.lr_scheduler_type",
    "keep_checkpoints": "training.save_total_limit",
    "log_steps": "training.logging_steps",
    "optimizer": "training.optim",
}
_FLAGS = {  # TrainingArguments takes any word for yes
    field.name
    for field in dataclasses.fields(TrainingArguments)
    if str(field.type).replace("typing.", "") in ("<class 'bool'>", "bool", "bool | None", "Optional[bool]")
} | {"gradient_checkpointing"}
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)} | {"gradient_checkpointing"}
INITIAL_RATE = 1e-5  # until the width of the model is known
_PUBLISH = "it would publish a run under way; `hf upload OWNER/NAME OUTPUT` publishes the finished folder"
_REFUSED = {
    "output_dir": "the run works in OUTPUT.training",
    "use_cpu": "`device` says it",
    **{
        f"hub_{name}": _PUBLISH for name in ("model_id", "strategy", "token", "private_repo", "always_push", "revision")
    },
    "remove_unused_columns": "the trainer sets it",
    "label_names": "the trainer sets it",
    "push_to_hub": _PUBLISH,
    "load_best_model_at_end": "best_forget_nll chooses the checkpoint",
    "save_only_model": "an interrupted run could not go on from such checkpoints as if nothing had happened",
    "eval_strategy": "nothing is evaluated while training: stop_forget_nll and best_forget_nll measure then, and "
    "`trace-unlearn evaluate` afterwards",
    "do_eval": "`trace-unlearn evaluate` does it",
}


@dataclasses.dataclass
class TrainOptions:
    """Makes a model forget: writes the unlearned checkpoint.

    A run that was interrupted goes on from its last complete checkpoint when the same command is given again.

    Args:
        model: a checkpoint folder or hub name of a Mixture-of-Experts language model (any causal language model with
            weighting "uniform").
        forget: the data to forget: a .jsonl, .json, .txt or .parquet file, or a hub name "owner/name[:config]"; not
            read by objective "finetune".
        retain: the data whose behaviour must stay, or with objective "finetune" the data to learn; not read by
            "grad_ascent".
        alternate: for objective "dpo": data like forget, record by record, with the answers to prefer (refusals, to
            make it IdkDPO).
        retain_eval: retain data to measure on and not to train on, where method stops by it or chooses a checkpoint;
            by default a tenth of retain (stop_documents at most) is held out.
        calibration: the folder that `calibrate` wrote; not needed with weighting "uniform".
        profile: the folder that `profile` wrote; needed for experts "topM".
        output: the checkpoint folder to write; must not exist. Until then the run works in OUTPUT.training.
        max_length: the most tokens of a document; as in `profile`.
        question_template: the prompt of question/answer records, as in `profile`.
        forget_limit: use only that many forget documents; as in `profile`.
        retain_limit: use only that many retain documents; as in `profile`.
        method: what is done to the model: the fields of `TraceConfig`.
        joint_forward: one forward for the forget and retain documents of a batch, where otherwise each has its own:
            faster, for the memory of more activations. Always so with FSDP and DeepSpeed.
        experts: train only these experts and their routers: LAYER.EXPERT (decoder layer), "selected" (all that the
            calibration selected) or "topM" (the M that the forget set activates most, as SEUF does with M = 1).
            method.anchor refers to them.
        trainable: regular expressions; only parameters in whose name one is found are trained. All by default.
        lora_rank: train adapters of this rank instead of the model's own weights; 0 for none. Merged at the end.
        lora_alpha: the adapters' scale is lora_alpha / lora_rank.
        lora_modules: ends of the names of the linear layers that get an adapter.
        lora_parameters: ends of the names of stacked expert weights that get one, such as "mlp.experts.down_proj".
        dtype: of the weights while they are trained: "auto" (float32 where there is memory for it, which loses no small
            update to rounding, and training.bf16 on a GPU if they are stored so; otherwise as the checkpoint),
            "float32", "bfloat16" or "float16". The written checkpoint has the dtype of the one that was read, unless
            another half precision is given here.
        device: "cpu", or "cuda" (choose one with CUDA_VISIBLE_DEVICES); by default a GPU where there is one.
        training: fields of transformers.TrainingArguments, such as training.max_steps. Batches count forget
            documents, and an epoch is a pass over the forget set. Without a learning_rate the run finds its own: it
            begins at 0.02 / hidden size (0.2 with lora_rank), doubles or halves the rate at every measure so that the
            forget loss rises in time, and stops when that has risen by method.stop_forget_increase (then 1.5); it has
            150 steps at least.
    """

    model: str
    forget: str | None = None
    retain: str | None = None
    alternate: str | None = None
    retain_eval: str | None = None
    calibration: str | None = None
    profile: str | None = None
    output: str = "model"
    max_length: int = 512
    question_template: str | None = None
    forget_limit: int | None = None
    retain_limit: int | None = None
    method: TraceConfig = dataclasses.field(default_factory=TraceConfig)
    joint_forward: bool = False
    experts: list[str] = dataclasses.field(default_factory=list)
    trainable: list[str] = dataclasses.field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_modules: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_parameters: list[str] = dataclasses.field(default_factory=list)
    dtype: str = "auto"
    device: str | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.method, Mapping):  # as JSON and YAML hold it
            self.method = TraceConfig(**self.method)

    @property
    def arguments(self) -> dict[str, Any]:
        """`training` with our defaults."""
        return {**DEFAULTS, **self.training}


def known_names() -> list[str]:
    """The options below `training`, which no field of ours lists."""
    return [f"training.{name}" for name in sorted(ARGUMENTS)]


def check(options: TrainOptions) -> TraceConfig:
    """The method's knobs; UserError for what can be told from the options alone. Which experts is not known yet."""
    config = _paced(options)
    check_integers(options, max_length=2, forget_limit=1, retain_limit=1)
    refuse_inside(options.output, options.model)
    check_words(options.experts, options.calibration, options.profile)
    if config.anchor_experts:
        raise UserError("method.anchor_experts: got some; give them as experts, which are trained and anchored to")
    if config.anchor and not options.experts:
        raise UserError(f"method.anchor: got {config.anchor}, but no experts to anchor to")
    for name, needed in config.needs.items():
        if needed and getattr(options, name) is None:
            raise UserError(f"{name}: got none, but objective {config.objective!r} needs it")
    if options.retain_eval is not None and not config.holds_out:
        raise UserError(
            f"retain_eval: got {options.retain_eval!r}, but nothing is measured on it; give stop_retain_increase, "
            "stop_retain_nll or best_forget_nll as well"
        )
    if config.routes_weigh and options.calibration is None:
        raise UserError(
            f"calibration: got none, but weighting {config.weighting!r} needs the folder that calibrate wrote"
        )
    if options.device not in (None, "cpu", "cuda"):
        raise UserError(f"device: got {options.device!r}, allowed: cpu, cuda (choose one with CUDA_VISIBLE_DEVICES)")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but torch sees no GPU here")
    check_adapted(options)
    check_template(options.question_template)
    check_numbers(options, "lora_alpha", above_0=True)
    _check_training(options)
    return config


def _paced(options: TrainOptions) -> TraceConfig:
    """The method's knobs; without a learning rate those of a run that finds its own."""
    config = options.method
    method = config.method
    if options.arguments["learning_rate"] is not None or method.forget_loss is None or method.on_hidden_states:
        return config
    if config.measures_forget:
        return dataclasses.replace(config, pace=True)
    return dataclasses.replace(config, pace=True, stop_forget_increase=INCREASE)


def check_adapted(options: TrainOptions) -> None:
    """UserError where it is not clear what is trained."""
    ways = [name for name in ("experts", "trainable", "lora_rank") if getattr(options, name)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: got both; each says alone what is trained, so give one of them")
    check_patterns(options.trainable)
    check_integers(options, lora_rank=0)
    if options.lora_rank and not (options.lora_modules or options.lora_parameters):
        raise UserError("lora_modules: got none, and no lora_parameters either; lora_rank needs names to adapt")


def _check_training(options: TrainOptions) -> None:
    for name in options.training:
        if name in _REFUSED:
            raise UserError(f"training: {name!r} is not allowed: {_REFUSED[name]}")
        if name not in ARGUMENTS:
            hint = meant(name, known_names(), RENAMED)
            raise UserError(f"training: {name!r} is no field of transformers.TrainingArguments{hint}")
        value = options.training[name]
        if name in _FLAGS and value is not None and not isinstance(value, bool):
            raise UserError(f"training.{name}: got {value!r}, allowed are true and false")
    given = options.arguments
    least = dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"), 1)
    least |= {"warmup_steps": 0, "logging_steps": 1, "save_steps": 1, "seed": 0}
    if given["max_steps"] != -1:  # which is none
        least["max_steps"] = 1
    check_integers(given, "training.", **least)
    check_numbers(given, "learning_rate", "num_train_epochs", prefix="training.", above_0=True)
    check_numbers(given, "max_grad_norm", "weight_decay", prefix="training.")
    check_word("training.lr_scheduler_type", given["lr_scheduler_type"], [kind.value for kind in SchedulerType])
    if given["seed"] >= 2**32:
        raise UserError(f"training.seed: got {given['seed']}, allowed are integers from 0 to 2**32 - 1")
    if options.experts and given["weight_decay"]:
        raise UserError(
            f"training.weight_decay: got {given['weight_decay']}, allowed is 0 with experts: it would decay the others"
        )
    if options.method.best_forget_nll is not None and given["save_strategy"] == "no":
        raise UserError("training.save_strategy: got 'no', but best_forget_nll chooses one of the checkpoints")
    known = ("all", "none", *get_available_reporting_integrations())  # type: ignore[no-untyped-call]
    reporters = given["report_to"] or "none"
    for name in [reporters] if isinstance(reporters, str) else reporters:
        if name not in known:
            raise UserError(f"training: report_to: got {name!r}, allowed is what is installed: {', '.join(known)}")
    training_arguments(options, Path(f"{options.output}.training"))


def logs_of(options: TrainOptions) -> str | None:
    """Where TensorBoard's files go if it is asked for: beside the output, since the folder of a run under way goes."""
    given = options.arguments["report_to"] or "none"
    if {"tensorboard", "all"} & {*([given] if isinstance(given, str) else given)}:
        return f"{Path(options.output)}.logs"
    return None


def training_arguments(options: TrainOptions, work: Path, **found: Any) -> TrainingArguments:
    """What `options` mean to transformers, with what was found out about the model; UserError for what it refuses."""
    given = {
        "disable_tqdm": not sys.stderr.isatty(),  # a bar that is written into a file is a line each time
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),  # without one it does nothing but warn
        **options.arguments,
        **found,
    }
    if given["learning_rate"] is None:
        given["learning_rate"] = INITIAL_RATE
    if given["lr_scheduler_type"] == "constant" and given["warmup_steps"]:
        given["lr_scheduler_type"] = "constant_with_warmup"  # "constant" itself knows no warm-up
    if "activation_checkpointing" in ARGUMENTS:  # its newer name
        given.setdefault("activation_checkpointing", given.pop("gradient_checkpointing"))
    try:
        on_cpu = options.device == "cpu" or not torch.accelerator.is_available()
        arguments = TrainingArguments(output_dir=str(work), use_cpu=on_cpu, **given)
        _try_optimizer(arguments)
        return arguments
    except (ValueError, TypeError, ImportError, KeyError, AssertionError) as error:
        raise UserError(f"training: {error}") from error


def _try_optimizer(arguments: TrainingArguments) -> None:
    """Makes optimiser and schedule for one number: whatever they refuse, they refuse before a model is loaded."""
    if arguments.deepspeed or arguments.optim_target_modules:  # which have optimisers of their own, or need the model
        return
    number = torch.nn.Linear(1, 1)
    kind, given = Trainer.get_optimizer_cls_and_kwargs(arguments)
    if "layer_wise" in str(arguments.optim) or "optimizer_dict" in given:
        return
    optimizer, special = kind(number.parameters(), **given), arguments.lr_scheduler_kwargs
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(max(arguments.max_steps, 1)),
        num_training_steps=max(arguments.max_steps, 1),
        scheduler_specific_kwargs=special if isinstance(special, dict) else {},
    )
