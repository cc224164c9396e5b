"""The verb `train`: model, data and calibration in, an unlearned checkpoint out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainingArguments

import trace_kernels
from trace_unlearn import files
from trace_unlearn.checkpoints import last_complete
from trace_unlearn.config import TraceConfig
from trace_unlearn.data import check_disjoint, fingerprint, load_tokens
from trace_unlearn.errors import UserError
from trace_unlearn.expert_masks import check_words, chosen_experts, train_experts
from trace_unlearn.model import check_inputs, load_model, load_tokenizer
from trace_unlearn.pairs import check_alternates
from trace_unlearn.trainable import LoraOptions, add_lora, check_patterns, train_only
from trace_unlearn.trainer import TraceTrainer
from trace_unlearn.weights import Calibration, attach_weights

logger = logging.getLogger(__name__)

RECORD = "run.json"  # in the folder of a run under way: what it depends on
# What a resumed run may change: it does not touch the result.
_FREE = ("output", "log_steps", "save_steps", "keep_checkpoints", "device")
# Set from options of our own, so not to be given as `training`.
_RESERVED = ("output_dir", "remove_unused_columns", "label_names", "push_to_hub", "load_best_model_at_end")


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
        max_length: the most tokens of a document; as in `profile`.
        forget_limit: use only that many forget documents; as in `profile`.
        retain_limit: use only that many retain documents; as in `profile`.
        learning_rate: of AdamW.
        schedule: of the learning rate: "constant", "linear", "cosine", ... (transformers' names).
        warmup_steps: steps over which the learning rate rises.
        steps: optimisation steps; by default `epochs` decides.
        epochs: passes over the forget set.
        batch_size: forget documents a process and forward.
        accumulation: forwards an optimisation step.
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


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """All that is known before the model is loaded."""

    config: TraceConfig
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, datasets.Dataset]  # forget, retain, alternate: those that the objective uses
    calibration: Calibration | None
    facts: dict[str, Any]  # what the run depends on


def main(options: TrainOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: checks everything, loads, trains or resumes, writes the folder `options.output`."""
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        say = _silent
    config = check(options)
    experts = chosen_experts(options.experts, options.calibration, options.profile)
    config = dataclasses.replace(config, anchor_experts=experts)
    output, work = Path(options.output), Path(f"{options.output}.training")
    files.refuse_existing(output)
    does = [f"forgets {options.forget}"] if config.method.forget_loss is not None else []
    if config.method.uses_retain:
        does.append(f"{'keeps' if does else 'learns'} {options.retain}")
    weights = config.weighting if config.routes_weigh else "uniform"
    say(f"train: {options.model} {' and '.join(does)} -> {output} ({config.objective}, {weights} weights)")
    inputs = _read(options, config)
    arguments = _arguments(options, work)
    if first:
        _check_same_run(work, inputs.facts)
    try:
        trainer = _trainer(options, inputs, arguments, say)
        if first:
            files.write_json(work / RECORD, inputs.facts)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_unlearned(output, {**inputs.facts, "versions": _versions()})
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of memory: use a smaller batch_size with more accumulation (the result is the same), "
            "gradient_checkpointing, a smaller max_length, or lora_rank"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise UserError(
            f"{work} and {output}: cannot be written: {error}; the same command goes on from the last whole checkpoint"
        ) from error
    if first:
        shutil.rmtree(work, ignore_errors=True)
    say(f"written to {output}")


def _silent(message: str) -> None:
    pass


def check(options: TrainOptions) -> TraceConfig:
    """The method's knobs; UserError for what can be told from the options alone. Which experts is not known yet."""
    check_words(options.experts, options.calibration, options.profile)
    names = {field.name for field in dataclasses.fields(TraceConfig)} - {"anchor_experts"}
    some = ((0, 0),) if options.experts else ()
    config = TraceConfig(**{name: getattr(options, name) for name in names}, anchor_experts=some)
    for name, needed in config.needs.items():
        if needed and getattr(options, name) is None:
            raise UserError(f"{name}: got none, but objective {config.objective!r} needs it")
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
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in options.training:
        if name not in known:
            raise UserError(f"training: {name!r} is no field of transformers.TrainingArguments")
        if name in _RESERVED or name in _own_arguments(options, Path()):
            raise UserError(f"training: {name!r} is set by an option of its own")
    return config


def _read(options: TrainOptions, config: TraceConfig) -> _Inputs:
    """Everything but the model, checked."""
    model_config = check_inputs(options.model, moe=config.routes_weigh or bool(config.anchor_experts))
    tokenizer = load_tokenizer(options.model, model_config)
    calibration, digest = None, None
    if options.calibration is not None and config.routes_weigh:
        calibration, digest = Calibration.load(options.calibration), _digest(Path(options.calibration))
    limits = {"forget": options.forget_limit, "retain": options.retain_limit, "alternate": options.forget_limit}
    sets = {
        name: load_tokens(getattr(options, name), tokenizer, max_length=options.max_length, limit=limits[name])
        for name, needed in config.needs.items()
        if needed
    }
    if "forget" in sets and "retain" in sets:
        check_disjoint(sets["forget"], sets["retain"])
    if "alternate" in sets:
        check_alternates(sets["forget"], sets["alternate"])
    prints = {f"{name}_fingerprint": fingerprint(documents) for name, documents in sets.items()}
    if calibration is not None:
        _check_calibration(options, calibration, model_config.model_type, prints["forget_fingerprint"])
        sets["retain"] = attach_weights(sets["retain"], calibration)
    facts = {
        "method": _method(config, calibration is not None),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE},
        **prints,
        "experts": [list(pair) for pair in config.anchor_experts],
        "calibration": None
        if calibration is None
        else {"sha256": digest, "rule": calibration.rule, "ess": calibration.ess, **calibration.choices},
    }
    return _Inputs(config, tokenizer, sets, calibration, facts)


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


def _own_arguments(options: TrainOptions, work: Path) -> dict[str, Any]:
    checkpointing = "gradient_checkpointing"
    if "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}:
        checkpointing = "activation_checkpointing"  # its newer name
    return {
        "output_dir": str(work),
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.schedule,
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


def _arguments(options: TrainOptions, work: Path) -> TrainingArguments:
    defaults = {"report_to": "none", "logging_nan_inf_filter": False}
    try:
        return TrainingArguments(**{**defaults, **options.training, **_own_arguments(options, work)})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training: {error}") from error


def _check_same_run(work: Path, facts: Mapping[str, Any]) -> None:
    """Refuses to go on with a run of other options or other data."""
    if not (work / RECORD).exists():
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
    model: Any = load_model(options.model, dtype=options.dtype, device=device)
    if options.lora_rank:
        torch.manual_seed(options.seed)
        modules, parameters = tuple(options.lora_modules), tuple(options.lora_parameters)
        model = add_lora(model, LoraOptions(options.lora_rank, options.lora_alpha, modules, parameters))
    elif options.trainable:
        train_only(model, options.trainable)
    experts = inputs.config.anchor_experts
    rows = train_experts(model, experts) if experts else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count, total = rows or sum(p.numel() for p in trained), sum(p.numel() for p in model.parameters())
    say(f"{count:,} of {total:,} parameters are trained, on {arguments.device}")
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained):
        logger.warning(
            "the trained weights are in half precision, where small updates are lost to rounding; dtype float32 with "
            "bf16 keeps them"
        )
    return TraceTrainer(
        model,
        arguments,
        config=inputs.config,
        **inputs.sets,
        calibration=inputs.calibration if options.weighting == "live" else None,  # else attached already
        processing_class=inputs.tokenizer,
    )


def _versions() -> dict[str, str]:
    return {
        "trace_kernels": trace_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
