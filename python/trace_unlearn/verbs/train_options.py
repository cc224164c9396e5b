"""The options of the verb `train`, checked as far as they can be without reading anything."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from trace_unlearn.errors import UserError
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.experts import check_words
from trace_unlearn.training.trainable import check_patterns

# Set from options of our own, so not to be given as `training`.
_RESERVED = ("output_dir", "remove_unused_columns", "label_names", "push_to_hub", "load_best_model_at_end")
_REFUSED = {
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
        output: the checkpoint folder to write; must not exist. Until then the run works in OUTPUT.training.
        calibration: the folder that `calibrate` wrote; not needed with weighting "uniform".
        objective: "grad_diff", "npo", "simnpo", "grad_ascent", "wga", "satimp", "ce_u", "dpo", "undial" or "rmu"; or
            "finetune", to learn retain instead (targets and retrained references). See docs/objectives.md.
        gamma: weight of the forget loss.
        alpha: weight of the retain loss.
        beta: the objective's own strength; by default as published.
        beta2: of satimp: the power of 1 - p.
        delta: of simnpo: the margin in nats a token.
        layer: of rmu: the decoder layer that is steered; by default a quarter of the way up.
        steering: of rmu: the length of the steering vector; set it to some multiple of the layer's hidden states.
        retain_loss: "nll" or "kl" (stay near the original model's distributions; its hidden states of the retain set
            are written to OUTPUT.training, except with lora_rank).
        weighting: "reference" (weights from the original model's routing), "live" (from the routing of each forward)
            or "uniform" (no TRACE).
        retain_per_forget: retain documents a forget document.
        stop_forget_nll: stop once the mean loss of forget tokens has risen to this many nats; never by default.
        stop_retain_nll: stop once that of held-out retain tokens has.
        stop_retain_increase: stop once that of held-out retain tokens has risen by so many nats.
        stop_every: steps between two measures of them.
        stop_documents: the measures take the first so many documents of a set.
        best_forget_nll: write the best checkpoint instead of the last model: of those whose forget tokens have at least
            this mean loss, the one with the lowest loss of held-out retain tokens; where none has, the one that forgot
            most. One is chosen from every save_steps steps; the best one and the last keep_checkpoints stay on disk.
        retain_eval: retain data to measure on and not to train on, for the options above; by default a tenth of retain
            (stop_documents at most) is held out.
        max_length: the most tokens of a document; as in `profile`.
        forget_limit: use only that many forget documents; as in `profile`.
        retain_limit: use only that many retain documents; as in `profile`.
        learning_rate: of AdamW.
        schedule: of the learning rate after the warm-up: "constant", "linear", "cosine", ... (transformers' names).
        warmup_steps: steps over which the learning rate rises.
        steps: optimisation steps; by default `epochs` decides.
        epochs: passes over the forget set, each rounded up to whole steps: what fills a pass's last step is the
            beginning of the next one.
        batch_size: forget documents a process and batch; no forward takes more documents than that.
        accumulation: such batches an optimisation step.
        joint_forward: one forward for the forget and retain documents of a batch, where else each has its own: faster,
            for the memory of more activations. Always so with FSDP and DeepSpeed.
        max_grad_norm: where gradients are clipped; 0 for never.
        weight_decay: of AdamW.
        experts: train only these experts and their routers: LAYER.EXPERT (decoder layer), "selected" (all that the
            calibration selected) or "topM" (the M that the forget set activates most, as SEUF does with M = 1).
        anchor: weight of the SEUF anchor loss that keeps forget tokens on these experts; 1 as published, 0 for none.
        profile: the folder that `profile` wrote; needed for experts "topM".
        trainable: regular expressions; only parameters in whose name one is found are trained. All by default.
        lora_rank: train adapters of this rank instead of the model's own weights; 0 for none. Merged at the end.
        lora_alpha: the adapters' scale is lora_alpha / lora_rank.
        lora_modules: ends of the names of the linear layers that get an adapter.
        lora_parameters: ends of the names of stacked expert weights that get one, such as "mlp.experts.down_proj".
        gradient_checkpointing: keep fewer activations and compute them again.
        dtype: of the model's weights: "auto" (as the checkpoint says), "float32", "bfloat16" or "float16".
        bf16: compute in bfloat16 whatever the weights are; with dtype float32 no small update is lost to rounding.
        device: "cpu", or "cuda" (choose one with CUDA_VISIBLE_DEVICES); by default a GPU where there is one.
        seed: of the order of documents and of all else that is random.
        save_steps: steps between checkpoints to resume from; 0 for none.
        keep_checkpoints: how many of them stay.
        log_steps: steps between log entries.
        training: any other field of transformers.TrainingArguments.
    """

    model: str
    forget: str | None = None
    retain: str | None = None
    output: str = "model"
    alternate: str | None = None
    calibration: str | None = None
    objective: str = "grad_diff"
    gamma: float = 1.0
    alpha: float = 1.0
    beta: float | None = None
    beta2: float = 1.0
    delta: float = 0.0
    layer: int | None = None
    steering: float = 2.0
    retain_loss: str = "nll"
    weighting: str = "reference"
    retain_per_forget: int = 1
    stop_forget_nll: float | None = None
    stop_retain_nll: float | None = None
    stop_retain_increase: float | None = None
    stop_every: int = 10
    stop_documents: int = 64
    best_forget_nll: float | None = None
    retain_eval: str | None = None
    max_length: int = 512
    forget_limit: int | None = None
    retain_limit: int | None = None
    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    steps: int | None = None
    epochs: float = 5.0
    batch_size: int = 4
    accumulation: int = 1
    joint_forward: bool = False
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    experts: list[str] = dataclasses.field(default_factory=list)
    anchor: float = 0.0
    profile: str | None = None
    trainable: list[str] = dataclasses.field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_modules: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_parameters: list[str] = dataclasses.field(default_factory=list)
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    bf16: bool = False
    device: str | None = None
    seed: int = 0
    save_steps: int = 100
    keep_checkpoints: int = 1
    log_steps: int = 10
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


def check(options: TrainOptions) -> TraceConfig:
    """The method's knobs; UserError for what can be told from the options alone. Which experts is not known yet."""
    check_words(options.experts, options.calibration, options.profile)
    names = {field.name for field in dataclasses.fields(TraceConfig)} - {"anchor_experts"}
    some = ((0, 0),) if options.experts else ()
    config = TraceConfig(**{name: getattr(options, name) for name in names}, anchor_experts=some)
    for name, needed in config.needs.items():
        if needed and getattr(options, name) is None:
            raise UserError(f"{name}: got none, but objective {config.objective!r} needs it")
    if options.retain_eval is not None and not config.holds_out:
        raise UserError(
            f"retain_eval: got {options.retain_eval!r}, but nothing is measured on it; give stop_retain_increase, "
            "stop_retain_nll or best_forget_nll as well"
        )
    if config.best_forget_nll is not None and not options.save_steps:
        raise UserError("save_steps: got 0, but best_forget_nll chooses one of the checkpoints")
    if config.routes_weigh and options.calibration is None:
        raise UserError(
            f"calibration: got none, but weighting {config.weighting!r} needs the folder that calibrate wrote"
        )
    for name, least in (
        ("steps", 1),
        ("warmup_steps", 0),
        ("batch_size", 1),
        ("accumulation", 1),
        ("lora_rank", 0),
        ("save_steps", 0),
        ("keep_checkpoints", 1),
        ("log_steps", 1),
    ):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{name}: got {value}, allowed are integers from {least}")
    for name in ("learning_rate", "epochs", "lora_alpha"):
        if not (math.isfinite(value := getattr(options, name)) and value > 0):
            raise UserError(f"{name}: got {value}, allowed are finite numbers above 0")
    for name in ("max_grad_norm", "weight_decay"):
        if not (math.isfinite(value := getattr(options, name)) and value >= 0):
            raise UserError(f"{name}: got {value}, allowed are finite numbers from 0")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"seed: got {options.seed}, allowed are integers from 0 to 2**32 - 1")
    if options.device not in (None, "cpu", "cuda"):
        raise UserError(f"device: got {options.device!r}, allowed: cpu, cuda (choose one with CUDA_VISIBLE_DEVICES)")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: got 'cuda', but torch sees no GPU here")
    ways = [name for name in ("experts", "trainable", "lora_rank") if getattr(options, name)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)}: got both; each says alone what is trained, so give one of them")
    if options.experts and options.weight_decay:
        raise UserError(
            f"weight_decay: got {options.weight_decay}, allowed is 0 with experts: it would decay the others"
        )
    check_patterns(options.trainable)
    if options.lora_rank and not (options.lora_modules or options.lora_parameters):
        raise UserError("lora_modules: got none, and no lora_parameters either; lora_rank needs names to adapt")
    schedules = [kind.value for kind in SchedulerType]
    if options.schedule not in schedules:
        raise UserError(f"schedule: got {options.schedule!r}, allowed: {', '.join(schedules)}")
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in options.training:
        if name not in known:
            raise UserError(f"training: {name!r} is no field of transformers.TrainingArguments")
        if name in _RESERVED or name in _own_arguments(options, Path()):
            raise UserError(f"training: {name!r} is set by an option of its own")
        if name in _REFUSED:
            raise UserError(f"training: {name!r} is not allowed: {_REFUSED[name]}")
    _check_reporters(options.training.get("report_to") or "none")
    return config


def _check_reporters(given: Any) -> None:
    known = ("all", "none", *get_available_reporting_integrations())  # type: ignore[no-untyped-call]
    for name in [given] if isinstance(given, str) else given:
        if name not in known:
            raise UserError(f"training: report_to: got {name!r}, allowed is what is installed: {', '.join(known)}")


def _own_arguments(options: TrainOptions, work: Path) -> dict[str, Any]:
    schedule = options.schedule
    if schedule == "constant" and options.warmup_steps:
        schedule = "constant_with_warmup"  # "constant" itself knows no warm-up
    checkpointing = "gradient_checkpointing"
    if "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}:
        checkpointing = "activation_checkpointing"  # its newer name
    return {
        "output_dir": str(work),
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": options.warmup_steps,
        "max_steps": options.steps or -1,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_grad_norm": options.max_grad_norm,
        "weight_decay": options.weight_decay,
        checkpointing: options.gradient_checkpointing,
        "bf16": options.bf16,
        "use_cpu": options.device == "cpu",
        "seed": options.seed,
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or 500,
        "save_total_limit": options.keep_checkpoints,
        "logging_steps": options.log_steps,
    }


def training_arguments(options: TrainOptions, work: Path) -> TrainingArguments:
    """What `options` mean to transformers; UserError for what it refuses."""
    defaults = {
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),  # without one it does nothing but warn
    }
    try:
        return TrainingArguments(**{**defaults, **options.training, **_own_arguments(options, work)})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {error}") from error
