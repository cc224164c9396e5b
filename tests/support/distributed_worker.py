"""What test_distributed.py runs in two processes, without GPUs.

accelerate shards models (FSDP, DeepSpeed) on accelerators only. `stand_in` lets the CPU and gloo stand in for them.
"""

import dataclasses
import json
import os
import sys

import pytest
import tiny
import torch
from accelerate import PartialState
from accelerate.state import GradientState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.training.trainer import TraceTrainer
from trace_unlearn.verbs.train import TrainOptions, main


class StopTrainingError(Exception):
    pass


_init = PartialState.__init__


def stand_in():
    # Without an accelerator a run asks for the CPU, which accelerate does not shard.
    PartialState.__init__ = lambda self, cpu=False, **given: _init(self, **given)
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def train(options, stop=None):
    """Trains; with `stop`, breaks off in the middle of that step and goes on by the same call, as after a kill."""
    if stop is not None:
        step = TraceTrainer.training_step

        def stopping(self, *args, **kwargs):
            if self.state.global_step == stop:
                raise StopTrainingError
            return step(self, *args, **kwargs)

        TraceTrainer.training_step = stopping
        try:
            main(TrainOptions(**options))
            raise AssertionError("was to be stopped")
        except StopTrainingError:
            GradientState._reset_state()  # it still refers to the data loader of the run that broke off
        finally:
            TraceTrainer.training_step = step
    seen, compute = [], TraceTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        index = inputs.get("retain_index")
        seen.append([] if index is None else [(self.state.global_step, i) for i in index.tolist() if i >= 0])
        return compute(self, model, inputs, *args, **kwargs)

    TraceTrainer.compute_loss = recording
    try:
        main(TrainOptions(**options))
    finally:
        TraceTrainer.compute_loss = compute
    mine = {(step, i) for pairs in seen for step, i in pairs if step < 3}  # the fourth begins another pass over 30
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    assert all(everyone)
    assert not set.intersection(*everyone), "the processes saw the same retain documents in the same step"


def counts():
    """The counts of the processes add up to those of one process that sees all their tokens."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ids = torch.randint(3, 80, (2 * world, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    whole = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids < 20, -100)}
    mine = {name: value[rank::world] for name, value in whole.items()}
    alone = tiny.model("qwen3_moe")
    with torch.no_grad(), RoutingRecorder(alone) as expected:
        alone(**whole)
    with torch.no_grad(), RoutingRecorder(alone) as own:
        alone(**mine)
    sharded = tiny.model("qwen3_moe").train()
    sharded.gradient_checkpointing_enable()
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    ddp = torch.nn.parallel.DistributedDataParallel(tiny.model("qwen3_moe").train())
    subgroups = [torch.distributed.new_group([i]) for i in range(world)]
    for model in (sharded, ddp):
        with RoutingRecorder(model) as rec:
            model(**mine, use_cache=False).loss.backward()
        assert torch.equal(rec.counts, own.counts)
        assert torch.equal(rec.reduced_counts(), expected.counts)
        assert torch.equal(rec.reduced_counts(subgroups[rank]), own.counts)
        assert not torch.equal(own.counts, expected.counts)


def divided(folder):
    """Tensor and expert parallelism of transformers: processes that see the same tokens, or have their own experts."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))["data"].get_group()
    ids = torch.randint(3, 68, (2 * world, 7), generator=torch.Generator().manual_seed(0))
    whole = {"input_ids": ids, "labels": ids.masked_fill(ids < 20, -100)}
    mine = {name: value[rank::world] for name, value in whole.items()}
    alone = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad(), RoutingRecorder(alone) as expected:
        alone(**whole)

    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=world))
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad(), RoutingRecorder(model) as rec:
        model(**whole)
    assert torch.equal(rec.counts, expected.counts)
    assert torch.equal(rec.reduced_counts(data), expected.counts)
    with pytest.raises(UserError, match="tensor-parallel"):  # it would count every token twice
        rec.reduced_counts()

    if "ep_size" not in {field.name for field in dataclasses.fields(DistributedConfig)}:
        config = DistributedConfig(tp_size=world, enable_expert_parallel=True)
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
        with pytest.raises(UserError, match="expert parallelism"):
            RoutingRecorder(model)
        return
    config = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    assert model.model.layers[0].mlp.experts.num_experts == tiny.NUM_EXPERTS // world
    with torch.no_grad(), RoutingRecorder(model) as rec:
        model(**mine)
    assert torch.equal(rec.reduced_counts(), expected.counts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for task in json.loads(sys.argv[1]):
        if task.pop("stand_in", True):
            stand_in()
        globals()[task.pop("task")](**task)
    os._exit(0)  # a gloo thread that frees its last tensor while the interpreter ends would abort the process
