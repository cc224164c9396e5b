"""One whole unlearning step, plain against ours: its time, and the memory that it needs beyond model and gradients.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --objective npo_kl --dtype bfloat16 --trainable all --hidden 1024

A step is forward, backward, AdamW (fused) and zero_grad on 4 forget and 4 retain documents of 512 tokens, every token
bearing loss, on a random Qwen3-MoE with a real vocabulary. Ours is `TraceTrainer.training_step` with uniform weights.
Plain is what unlearning codebases do: a forward for each of the two sets, logits, transformers' own loss; for "npo"
the reference is a second model, called in each step; for "npo_kl" the retain loss is the KL from it.
Both get the same batch of the same model, and are timed only when their losses and gradients agree.

Time: both take turns in each round of one process; the ratio is the median over rounds of ours / plain. Memory: a
fresh process for each, the highest resident set (on a GPU: allocation) during forward and backward, less what was
there before: model, optimiser, and the gradients of an earlier micro-batch, to which these are added. The second model
of plain and the references of ours were there before too; they are the column "kept". What ours computes once, before
the first step, is not part of a step.

What ours needs is activations, which plain needs as well: the ratio falls with more layers and rises with gradient
checkpointing. With a trainable head, its gradient is one more matrix of the head's size before it is added.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.machine import ROOT, describe
from benchmarks.run import RESULTS
from benchmarks.timing import interleave, median_ratio, peak_memory
from trace_kernels import release_workspace
from trace_unlearn import TraceConfig, TraceTrainer
from trace_unlearn.files import write_json

OBJECTIVES = {
    "grad_diff": TraceConfig(objective="grad_diff", weighting="uniform"),
    "npo": TraceConfig(objective="npo", weighting="uniform"),
    "npo_kl": TraceConfig(objective="npo", weighting="uniform", retain_loss="kl"),
}
GOALS = {"grad_diff": 8, "npo": None, "npo_kl": 12}  # memory, plain / ours, on a CPU
TIME_GOAL = 0.8  # ours / plain
TRAINABLE = {"experts": ".experts.", "attention": ".self_attn.", "all": ""}  # a part of the parameters' names
ARMS = ("ours", "plain")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--objective", default="all", choices=["all", *OBJECTIVES])
    parser.add_argument("--trainable", default="experts", choices=[*TRAINABLE], help="but for 'all' the head is frozen")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=512, help="512 to 1024; everything else follows from it")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--documents", type=int, default=4, help="of each set")
    parser.add_argument("--tokens", type=int, default=512, help="a document")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in both")
    parser.add_argument("--full", action="store_true", help="the shape of Qwen3-30B-A3B: 61 GB in bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--output", type=Path, default=RESULTS / "end_to_end.json")
    parser.add_argument("--peak-of", choices=ARMS, help=argparse.SUPPRESS)  # what a fresh process is asked for
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The model, random, in the proportions of Qwen3-30B-A3B: 128 experts, top-8, heads of 128."""
    hidden, layers = (2048, 48) if options.full else (options.hidden, options.layers)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=options.vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=hidden * 3 // 8,
        tie_word_embeddings=False,
        output_router_logits=False,
        use_cache=False,
    )
    with torch.device(options.device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, options.dtype))
        try:
            model = Qwen3MoeForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINABLE[options.trainable] in name)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


class Step:
    """Both ways to make one step of one objective."""

    def __init__(self, options: argparse.Namespace, objective: str, folder: str, arms: tuple[str, ...]) -> None:
        self.objective, self.config = objective, OBJECTIVES[objective]
        self.model = build(options)
        self.second: Qwen3MoeForCausalLM | None = None
        if "plain" in arms and objective != "grad_diff":
            self.second = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.forget, self.retain = (documents(options, seed) for seed in (1, 2))
        if "ours" in arms:
            self.trainer = self._trainer(options, folder)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        generator = torch.Generator(options.device).manual_seed(3)
        with torch.no_grad():  # away from the reference, where NPO and KL have something to say
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.add_(noise.to(parameter.dtype), alpha=0.02)
        self.gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-7, fused=True)

    def _trainer(self, options: argparse.Namespace, folder: str) -> TraceTrainer:
        args = TrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=options.documents,
            use_cpu=options.device == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        forget, retain = (
            datasets.Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
            for rows in (self.forget, self.retain)
        )
        trainer = TraceTrainer(self.model, args, config=self.config, forget=forget, retain=retain)
        trainer.state.max_steps = 1
        trainer.begin_training()
        (batch,), totals = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        self.batch, self.totals = trainer._prepare_inputs(batch), totals
        return trainer

    def plain_loss(self) -> torch.Tensor:
        config = self.config
        if self.objective == "grad_diff":
            forget = -language_model_loss(self.model, self.forget)
        else:
            log_probs = document_log_probs(self.model, self.forget)
            with torch.no_grad():
                reference = document_log_probs(self.second, self.forget)
            forget = -2 / config.beta * F.logsigmoid(-config.beta * (log_probs - reference)).mean()
        if config.retain_loss == "kl":
            retain = divergence(self.model, self.second, self.retain)
        else:
            retain = language_model_loss(self.model, self.retain)
        return config.gamma * forget + config.alpha * retain

    def backward(self, arm: str) -> float:
        """The loss."""
        if arm == "ours":
            return self.trainer.training_step(self.model, dict(self.batch), self.totals).item()
        loss = self.plain_loss()
        loss.backward()
        return loss.item()

    def run(self, arm: str) -> None:
        self.backward(arm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def kept_bytes(self, arm: str) -> int:
        """What an arm keeps of the original model besides the model itself."""
        if arm == "plain":
            return 0 if self.second is None else sum(p.numel() * p.element_size() for p in self.second.parameters())
        head = self.trainer._forward._reference_weight
        return 0 if head is None else head.numel() * head.element_size()

    def check(self) -> None:
        """Both ways give the same loss and the same gradients, up to the rounding of the dtype."""
        losses, gradients = {}, {}
        for arm in ARMS:
            losses[arm] = self.backward(arm)
            gradients[arm] = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
            self.optimizer.zero_grad()
        exact = self.model.dtype == torch.float32
        # As a share of log(V): the loss of "grad_diff" is a difference, and NPO adds up hundreds of rounded numbers.
        if abs(losses["ours"] - losses["plain"]) > (5e-5 if exact else 1e-2) * math.log(self.model.config.vocab_size):
            raise SystemExit(f"{self.objective}: the losses differ, nothing is timed: {losses}")
        if gradients["ours"].keys() != gradients["plain"].keys():
            raise SystemExit(f"{self.objective}: other parameters get gradients, nothing is timed")
        for name, plain in gradients["plain"].items():
            error = ((gradients["ours"][name] - plain).norm() / plain.norm()).item()
            if not error <= (1e-3 if exact else 0.1):
                raise SystemExit(f"{self.objective}: the gradients of {name} differ by {error:.1e}, nothing is timed")


def documents(options: argparse.Namespace, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (options.documents, options.tokens)
    return torch.randint(options.vocabulary, shape, generator=generator).to(options.device)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def language_model_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = logits_of(model, ids)
    return ForCausalLMLoss(logits, ids, logits.shape[-1])


def document_log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = logits_of(model, ids)[:, :-1].float()
    return -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).sum(-1)


def divergence(model: torch.nn.Module, reference: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        expected = logits_of(reference, ids)[:, :-1].flatten(0, 1).float().log_softmax(-1)
    found = logits_of(model, ids)[:, :-1].flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


def peak_of(options: argparse.Namespace) -> dict[str, int]:
    """In a fresh process: bytes that one step of one arm needs beyond what was there before, gradients included."""
    arm = options.peak_of
    with tempfile.TemporaryDirectory() as folder:
        step = Step(options, options.objective, folder, (arm,))
        step.run(arm)  # loads libraries, makes the optimiser's state
        for parameter in step.model.parameters():  # an earlier micro-batch's; zeros_like would not touch its pages
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter).zero_()
        release_workspace()  # what the kernels keep from step to step counts
        found = peak_memory(lambda: step.backward(arm), torch.device(options.device))
        if found is None:
            raise SystemExit("this system does not tell a process's highest memory")
        return {"beyond": found, "kept": step.kept_bytes(arm), "gradients": step.gradient_bytes}


def memory(options: argparse.Namespace, objective: str) -> dict[str, dict[str, int]]:
    found = {}
    # Freed blocks go back to the system at once: the resident set is what is alive, not what the allocator keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for arm in ARMS:
        given = {"objective": objective, "peak-of": arm}
        for name in ("trainable", "dtype", "device", "hidden", "layers", "vocabulary", "documents", "tokens"):
            given[name] = getattr(options, name)
        command = [sys.executable, "-m", "benchmarks.end_to_end"]
        command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
        command += [f"--{name}" for name in ("checkpointing", "full") if getattr(options, name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    return found


def timing(options: argparse.Namespace, objective: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        step = Step(options, objective, folder, ARMS)
        step.check()
        calls = {arm: functools.partial(step.run, arm) for arm in ARMS}
        rounds = {"least_rounds": options.rounds, "most_rounds": options.rounds}
        times = interleave(calls, torch.device(options.device), warm_ups=1, **rounds)
    found = {arm: [round(sample) for sample in times[arm].samples] for arm in ARMS}
    return {"milliseconds": found, "time_ratio": 1 / median_ratio(times["ours"], times["plain"])}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.peak_of:
        print(json.dumps(peak_of(options)))
        return 0
    machine = describe(torch.device(options.device))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    shape = {name: getattr(options, name) for name in ("trainable", "dtype", "hidden", "layers", "vocabulary")}
    shape |= {name: getattr(options, name) for name in ("documents", "tokens", "checkpointing", "full")}
    print(", ".join(f"{key} {value}" for key, value in shape.items()))
    rows = []
    for objective in OBJECTIVES if options.objective == "all" else [options.objective]:
        row: dict[str, Any] = {"objective": objective, **shape}
        if options.only != "time":
            row["memory"] = memory(options, objective)
            row["memory_ratio"] = row["memory"]["ours"]["beyond"] / row["memory"]["plain"]["beyond"]
        if options.only != "memory":
            row |= timing(options, objective)
        rows.append(row)
        print_row(row)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {"machine": machine, "rows": rows})
    return 0


def print_row(row: dict[str, Any]) -> None:
    print(f"\n{row['objective']}: one whole step")
    for arm in ARMS:
        text = f"  {arm:<6}"
        if "memory" in row:
            peak = {name: value / 2**20 for name, value in row["memory"][arm].items()}
            text += f"{peak['beyond']:9.0f} MiB beyond model and gradients, {peak['kept']:6.0f} MiB kept"
        if "milliseconds" in row:
            text += f"{statistics.median(row['milliseconds'][arm]):9.0f} ms"
        print(text)
    if "memory_ratio" in row:
        goal = GOALS[row["objective"]]
        print(f"  memory plain / ours {1 / row['memory_ratio']:.1f}" + (f"   (goal {goal})" if goal else ""))
    if "time_ratio" in row:
        print(f"  time   ours / plain {row['time_ratio']:.2f}   (goal {TIME_GOAL})")


if __name__ == "__main__":
    sys.exit(main())
