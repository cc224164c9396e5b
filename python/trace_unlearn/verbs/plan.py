"""The verb `plan`: what a training run needs of every device's memory, from the model's configuration alone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trace_unlearn.errors import UserError
from trace_unlearn.sources.model import check_inputs, check_placement
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.forward import Forward
from trace_unlearn.training.trainable import LoraOptions, add_lora, check_patterns, train_only

SHARDINGS = ("none", "ddp", "fsdp2", "zero2", "zero3")
#: Numbers that the optimiser keeps for every trained one.
OPTIMIZERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
GB = 1e9


@dataclasses.dataclass
class PlanOptions:
    """Says what `train` with the same options needs of every device's memory, and what to change if it does not fit.

    Nothing but the model's configuration is read. Weights, gradients and optimiser are exact; activations are a rough
    estimate.

    Args:
        model: a checkpoint folder or hub name; the folder needs no weights.
        objective: as in `train`.
        retain_loss: as in `train`.
        retain_per_forget: as in `train`.
        max_length: as in `train`.
        batch_size: as in `train`: of one process.
        joint_forward: as in `train`.
        trainable: as in `train`.
        lora_rank: as in `train`.
        lora_modules: as in `train`.
        lora_parameters: as in `train`.
        gradient_checkpointing: as in `train`.
        dtype: as in `train`.
        bf16: as in `train`.
        optimizer: "adamw_torch", "adamw_torch_fused" or "sgd".
        sharding: "none", "ddp", "fsdp2", "zero2" or "zero3", see docs/many_devices.md.
        processes: how many.
        memory: of one device, in GB; by default what is found here.
    """

    model: str
    objective: str = "grad_diff"
    retain_loss: str = "nll"
    retain_per_forget: int = 1
    max_length: int = 512
    batch_size: int = 4
    joint_forward: bool = False
    trainable: list[str] = dataclasses.field(default_factory=list)
    lora_rank: int = 0
    lora_modules: list[str] = dataclasses.field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora_parameters: list[str] = dataclasses.field(default_factory=list)
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    bf16: bool = False
    optimizer: str = "adamw_torch"
    sharding: str = "none"
    processes: int = 1
    memory: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one process."""

    weights: int
    gradients: int
    optimizer: int
    communication: int  # DDP's buckets, or the layers that are gathered while they compute
    activations: int  # an estimate
    logits_avoided: int  # of a plain loss: float32 logits and their gradient
    reference_avoided: int  # a second model
    checkpoint: int  # on disk, of all processes: one checkpoint to resume from

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.communication + self.activations


def main(options: PlanOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    config = check(options)
    plan = estimate(options, config)
    memory, device = _memory(options)
    shared = "" if options.processes == 1 else f", each of {options.processes} processes ({options.sharding})"
    say(f"plan: {options.model}{shared}")
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
        say(f"  {name:<40}{value / GB:10.2f} GB")
    if plan.total <= memory:
        say("it fits")
        return
    ways = [
        (name, estimate(dataclasses.replace(options, **changes), config).total)
        for name, changes in _changes(options).items()
    ]
    say("it does not fit; alone each of these needs:")
    for name, total in sorted(ways, key=lambda way: way[1]):
        say(f"  {name:<40}{total / GB:10.2f} GB{'  fits' if total <= memory else ''}")


def check(options: PlanOptions) -> PreTrainedConfig:
    """The model's configuration; UserError for options that do not fit each other."""
    TraceConfig(options.objective, retain_loss=options.retain_loss, retain_per_forget=options.retain_per_forget)
    check_placement(options.dtype, "cpu")
    check_patterns(options.trainable)
    if options.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer: got {options.optimizer!r}, allowed: {', '.join(OPTIMIZERS)}")
    if options.sharding not in SHARDINGS:
        raise UserError(f"sharding: got {options.sharding!r}, allowed: {', '.join(SHARDINGS)}")
    for name, least in (("batch_size", 1), ("max_length", 1), ("processes", 1), ("lora_rank", 0)):
        if (value := getattr(options, name)) < least:
            raise UserError(f"{name}: got {value}, allowed are integers from {least}")
    if options.processes > 1 and options.sharding == "none":
        raise UserError(f"sharding: got 'none' with {options.processes} processes, allowed: {', '.join(SHARDINGS[1:])}")
    if options.trainable and options.lora_rank:
        raise UserError("trainable and lora_rank: got both; each says alone what is trained, so give one of them")
    if options.memory is not None and not options.memory > 0:
        raise UserError(f"memory: got {options.memory}, allowed are numbers above 0")
    return check_inputs(options.model, moe=False, weights=False)


def estimate(options: PlanOptions, config: PreTrainedConfig) -> Plan:
    """The plan, from a model without storage."""
    dtype: Any = getattr(torch, options.dtype) if options.dtype != "auto" else config.dtype or torch.float32
    with torch.device("meta"):  # which, unlike init_empty_weights, leaves tied weights tied
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        if options.lora_rank:
            ends = tuple(options.lora_modules), tuple(options.lora_parameters)
            model = add_lora(model, LoraOptions(options.lora_rank, modules=ends[0], parameters=ends[1]))
        elif options.trainable:
            train_only(model, options.trainable)
        method_config = TraceConfig(options.objective, retain_loss=options.retain_loss)
        forward = Forward(model, method_config)
        forward.freeze_unused()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    master = options.sharding == "fsdp2" and options.bf16  # which accelerate then keeps in float32
    weights = sum(p.numel() * (4 if master and p.requires_grad else p.element_size()) for p in parameters)
    weights += forward.reference_bytes
    gradients = sum(p.numel() * (4 if master else p.element_size()) for p in trained)
    optimizer = OPTIMIZERS[options.optimizer] * gradients
    if options.sharding.startswith("zero") and dtype != torch.float32:  # DeepSpeed steps on float32 copies
        optimizer = (1 + OPTIMIZERS[options.optimizer]) * 4 * sum(p.numel() for p in trained)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 0)
    layer = max(sum(p.numel() * p.element_size() for p in child.parameters()) for child in layers)
    head = max(p.numel() * p.element_size() for p in parameters if p.dim() == 2)
    communication = {"none": 0, "ddp": gradients, "zero2": 0}.get(options.sharding, 2 * layer + head)
    saved = sum(p.numel() * p.element_size() for p in (trained if options.lora_rank else parameters))
    checkpoint = saved + optimizer
    share = options.processes
    weights, gradients, optimizer = (
        -(-size // share) if options.sharding in shardings else size
        for size, shardings in (
            (weights, ("fsdp2", "zero3")),
            (gradients, ("fsdp2", "zero2", "zero3")),
            (optimizer, ("fsdp2", "zero2", "zero3")),
        )
    )
    method = method_config.method
    documents = (method.forget_loss is not None) + options.retain_per_forget * method.uses_retain
    documents += method.needs_alternate
    joint = options.joint_forward or options.sharding in ("fsdp2", "zero2", "zero3")
    at_once = documents if joint else 1 + method.needs_alternate
    plain_tokens, tokens = (options.batch_size * n * options.max_length for n in (documents, at_once))
    text = config.get_text_config()
    refers = method.needs_reference or method.needs_divergence or method.on_hidden_states
    needs_reference = refers or options.retain_loss == "kl"
    return Plan(
        weights,
        gradients,
        optimizer,
        communication,
        _activations(text, tokens, dtype, options),
        plain_tokens * text.vocab_size * 8,
        sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" not in n)
        if needs_reference
        else 0,
        checkpoint,
    )


def _activations(text: Any, tokens: int, dtype: torch.dtype, options: PlanOptions) -> int:
    """Roughly what a forward keeps for its backward."""
    size = 2 if options.bf16 else dtype.itemsize
    width, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * width
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    # Norms, attention's projections and residuals; the experts' inputs, outputs, gates and products.
    one_layer = tokens * size * (12 * width + chosen * (2 * width + 4 * inner))
    kept = layers * tokens * width * size + one_layer if options.gradient_checkpointing else layers * one_layer
    return int(kept + tokens * width * 4)  # and the stash of the loss


def _memory(options: PlanOptions) -> tuple[float, str]:
    if options.memory is not None:
        return options.memory * GB, "given"
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1]), torch.cuda.get_device_name()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / options.processes, "host memory, a process's share"


def _changes(options: PlanOptions) -> dict[str, dict[str, Any]]:
    """Single changes that save memory, by what to call them."""
    ways: dict[str, dict[str, Any]] = {}
    if options.joint_forward:
        ways["joint_forward false"] = {"joint_forward": False}
    if not options.gradient_checkpointing:
        ways["gradient_checkpointing true"] = {"gradient_checkpointing": True}
    if options.batch_size > 1:
        ways[f"batch_size 1, accumulation {options.batch_size}"] = {"batch_size": 1}
    if not options.lora_rank:
        ways["lora_rank 8"] = {"lora_rank": 8, "trainable": []}
        ways["lora_rank 8, gradient_checkpointing true"] = {
            "lora_rank": 8,
            "trainable": [],
            "gradient_checkpointing": True,
        }
    if options.dtype in ("auto", "float32"):
        ways["dtype bfloat16"] = {"dtype": "bfloat16"}
    for count in (2, 4, 8, 16):
        if count > options.processes:
            ways[f"fsdp2 over {count} devices"] = {"sharding": "fsdp2", "processes": count}
    return ways
