"""What a training run needs of a device's memory, from a configuration alone; and what weights are trained in."""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trace_unlearn.training.forward import Forward
from trace_unlearn.training.trainable import LoraOptions, add_lora, train_only
from trace_unlearn.verbs.train_options import TrainOptions

HALF = ("bfloat16", "float16")
#: Numbers that the optimiser keeps for every trained one.
OPTIMIZERS = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
GB = 1e9


@dataclasses.dataclass
class PlanOptions:
    """Says what `train` needs of every device's memory, and what to change if it does not fit.

    It reads the configuration file of `run`. Of the model only its configuration is read. Weights, gradients and
    optimiser are exact; activations are a rough estimate.

    Args:
        train: what is to be trained, and how.
        sharding: "none", "ddp", "fsdp2", "zero2" or "zero3", see docs/many_devices.md.
        processes: how many.
        memory: of one device, in GB; by default what is found here.
    """

    train: TrainOptions
    sharding: str = "none"
    processes: int = 1
    memory: float | None = None

    @property
    def optimizer(self) -> str:
        return str(self.train.training.get("optim", "adamw_torch"))


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


def size(count: float) -> str:
    """A number of bytes in the unit that shows it.

    >>> size(23_400_000_000), size(12_345_678), size(1_500), size(0)
    ('23.40 GB', '12.35 MB', '1.50 kB', '0 B')
    """
    for unit, name in ((GB, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def stored_in(config: PreTrainedConfig) -> str:
    return str(config.dtype or torch.float32).removeprefix("torch.")


def trained_in(options: PlanOptions, config: PreTrainedConfig, memory: float) -> PlanOptions:
    """The options with the dtype that "auto" means: float32 where stored weights of half precision are trained and it
    fits, else as they are stored. On a GPU, bfloat16 weights are then computed with in bfloat16.
    """
    train, stored = options.train, stored_in(config)
    if train.dtype != "auto" or stored not in (*HALF, "float32"):
        return options
    if stored in HALF and not train.lora_rank:
        on_gpu = torch.cuda.is_available() and train.device != "cpu"
        computed = train.arguments["bf16"] or (stored == "bfloat16" and on_gpu)
        full = dataclasses.replace(train, dtype="float32", training={**train.training, "bf16": computed})
        if estimate(planned := dataclasses.replace(options, train=full), config).total <= memory:
            return planned
    return dataclasses.replace(options, train=dataclasses.replace(train, dtype=stored))


def estimate(options: PlanOptions, config: PreTrainedConfig) -> Plan:
    """The plan, from a model without storage."""
    train = options.train
    config = copy.deepcopy(config)  # in which the dtype is put down
    dtype: Any = getattr(torch, train.dtype) if train.dtype != "auto" else config.dtype or torch.float32
    with torch.device("meta"):  # which, unlike init_empty_weights, leaves tied weights tied
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        if train.lora_rank:
            ends = tuple(train.lora_modules), tuple(train.lora_parameters)
            model = add_lora(model, LoraOptions(train.lora_rank, modules=ends[0], parameters=ends[1]))
        elif train.trainable:
            train_only(model, train.trainable)
        # Without the anchor, which needs experts that a calibration may name, and no memory to speak of.
        forward = Forward(model, dataclasses.replace(train.method, anchor=0.0))
        forward.freeze_unused()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    master = options.sharding == "fsdp2" and train.arguments["bf16"]  # which accelerate then keeps in float32
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
    saved = sum(p.numel() * p.element_size() for p in (trained if train.lora_rank else parameters))
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
    method = train.method.method
    documents = (method.forget_loss is not None) + train.method.retain_per_forget * method.uses_retain
    documents += method.needs_alternate
    joint = train.joint_forward or options.sharding in ("fsdp2", "zero2", "zero3")
    at_once = documents if joint else 1 + method.needs_alternate
    plain_tokens, tokens = (
        train.arguments["per_device_train_batch_size"] * n * train.max_length for n in (documents, at_once)
    )
    text = config.get_text_config()
    refers = method.needs_reference or method.needs_divergence or method.on_hidden_states
    needs_reference = refers or train.method.retain_loss == "kl"
    return Plan(
        weights,
        gradients,
        optimizer,
        communication,
        _activations(text, tokens, dtype, train),
        plain_tokens * text.vocab_size * 8,
        sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" not in n)
        if needs_reference
        else 0,
        checkpoint,
    )


def _activations(text: Any, tokens: int, dtype: torch.dtype, train: TrainOptions) -> int:
    """Roughly what a forward keeps for its backward."""
    size = 2 if train.arguments["bf16"] else dtype.itemsize
    width, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None) or 4 * width
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    # Norms, attention's projections and residuals; the experts' inputs, outputs, gates and products.
    one_layer = tokens * size * (12 * width + chosen * (2 * width + 4 * inner))
    kept = (
        layers * tokens * width * size + one_layer if train.arguments["gradient_checkpointing"] else layers * one_layer
    )
    return int(kept + tokens * width * 4)  # and the stash of the loss


def memory_of(options: PlanOptions, on_cpu: bool = False) -> tuple[float, str]:
    """The bytes of a device's memory, and whose they are."""
    if options.memory is not None:
        return options.memory * GB, "given"
    if torch.cuda.is_available() and not on_cpu:
        return float(torch.cuda.mem_get_info()[1]), torch.cuda.get_device_name()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages / options.processes, "host memory, a process's share"
