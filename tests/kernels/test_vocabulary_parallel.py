"""Heads split over two processes: losses and gradients are those of the whole head, on every backend that runs here."""

import functools
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.library import opcheck

import trace_kernels as tk
from trace_kernels.ops.linear_cross_entropy.log_prob import linear_log_prob_op
from trace_kernels.ops.linear_kl.op import linear_kl_op
from trace_kernels.runtime import native

T, H, V = 23, 12, 37
SPLITS = (5, V - 5)  # uneven
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2}


def slice_of(rank):
    return slice(0, SPLITS[0]) if rank == 0 else slice(SPLITS[0], V)


def inputs(dtype, spread=1.0):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = (normal(T, H) * spread).to(dtype), normal(V, H).to(dtype)
    target = torch.randint(V, (T,), generator=generator)
    target[3], target[4], target[5], target[6] = -100, 0, V - 1, SPLITS[0]
    token_weight = normal(T)
    token_weight[7] = 0
    hidden[3] = hidden[7] = float("nan")  # rows that do not count may hold anything
    return hidden, weight, target, token_weight, normal(V), normal(T, 7).to(dtype), normal(V, 7).to(dtype)


def leaves(*tensors):
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def compare(name, got, expected, dtype):
    """Nothing, or what is wrong, within the rounding of the dtype relative to the largest entry."""
    scale = max(expected.abs().max().item(), 1e-6)
    error = (got.double() - expected).abs().max().item() / scale
    return [] if error <= TOLERANCE[dtype] else [f"{name}: relative error {error:.3g}"]


def npo(log_prob, target):
    """A loss whose gradient per token is known only when all log-probabilities are."""
    rows = log_prob * (target != -100)
    return -torch.nn.functional.logsigmoid(-0.1 * (rows.sum() + 30)) - 0.01 * (rows**2).sum()


def check_loss(rank, function, backend, dtype, *, bias=False, trainable=True, weights_need_gradient=False, **options):
    hidden, weight, target, token_weight, offset, *_ = inputs(dtype, options.pop("spread", 1.0))
    offset = offset if bias else None

    def call(hidden, weight, offset, token_weight, target=target, **more):
        if function == "npo":
            return npo(tk.linear_log_prob(hidden, weight, target, bias=offset, **options, **more), target)
        loss = tk.linear_cross_entropy(hidden, weight, target, token_weight, bias=offset, **options, **more)
        return loss if loss.dim() == 0 else (loss * torch.arange(T)).sum()

    part = slice_of(rank)
    mine = leaves(hidden, weight[part], None if offset is None else offset[part], token_weight)
    whole = leaves(hidden.double(), weight.double(), None if offset is None else offset.double(), token_weight.double())
    if function == "npo":  # it has no weights that would drop row 7
        for leaf in (mine[0], whole[0]):
            leaf.data[7] = 0.5
    if not trainable:
        mine[1].requires_grad_(False)
    if not weights_need_gradient:
        mine[3].requires_grad_(False)
        whole[3].requires_grad_(False)
    else:  # then all rows count
        for leaf in (mine[0], whole[0]):
            leaf.data[7] = 0.5
    loss, expected = call(*mine, group=dist.group.WORLD, backend=backend), call(*whole, backend="reference")
    loss.backward()
    expected.backward()
    problems = compare("loss", loss.detach(), expected.detach(), torch.float32 if dtype != torch.float64 else dtype)
    for name, leaf, truth in zip(("hidden", "weight", "bias", "token_weight"), mine, whole, strict=True):
        if leaf is not None and leaf.requires_grad:
            gradient = truth.grad[part] if name in ("weight", "bias") else truth.grad
            problems += compare(name, leaf.grad, gradient, dtype if name in ("hidden", "weight") else torch.float32)
    return problems


def check_kl(rank, backend, dtype, *, trainable=True, masked=True, **options):
    hidden, weight, target, token_weight, _, ref_hidden, ref_weight = inputs(dtype)
    mask = target != -100 if masked else None
    token_weight = token_weight if masked else None
    if not masked:
        hidden[3] = hidden[7] = 0.5
    part = slice_of(rank)
    mine, whole = leaves(hidden, weight[part]), leaves(hidden.double(), weight.double())
    mine[1].requires_grad_(trainable)
    options = {"mask": mask, "reduction": "none", **options}
    factor = torch.arange(T) - 8.0
    got = tk.linear_kl(
        *mine, ref_hidden, ref_weight[part], token_weight, group=dist.group.WORLD, backend=backend, **options
    )
    expected = tk.linear_kl(*whole, ref_hidden.double(), ref_weight.double(), token_weight, **options)
    (got * factor).sum().backward()
    (expected * factor).sum().backward()
    problems = compare("kl", got.detach(), expected.detach(), torch.float32 if dtype != torch.float64 else dtype)
    problems += compare("hidden", mine[0].grad, whole[0].grad, dtype)
    return problems + (compare("weight", mine[1].grad, whole[1].grad[part], dtype) if trainable else [])


def check_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    hidden, weight, target, *_ = inputs(torch.float32)
    hidden[7] = 0
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "vocabulary"))
    part = weight[slice_of(rank)]
    head = DTensor.from_local(part, mesh, (Replicate(), Shard(0)), shape=weight.shape, stride=weight.stride())
    head.requires_grad_()
    expected = tk.linear_cross_entropy(hidden, weight, target)
    problems = []
    for group in (mesh, mesh["vocabulary"].get_group()):
        loss = tk.linear_cross_entropy(hidden, head, target, group=group)
        loss.backward()
        problems += compare("loss of a DTensor", loss.detach(), expected.double(), torch.float32)
    truth = weight.clone().requires_grad_()
    (2 * tk.linear_cross_entropy(hidden, truth, target)).backward()
    gradient = head.grad.to_local()
    problems += compare("weight of a DTensor", gradient, truth.grad[slice_of(rank)].double(), torch.float32)
    wrong = DTensor.from_local(weight[:, : H // 2], mesh, (Replicate(), Shard(1)))
    for name, arguments in {
        "weight: got a DTensor without group": (head, None),
        "weight: got a DTensor with placements": (wrong, mesh),
        "weight: is sharded over another group": (head, mesh["data"].get_group()),
        "group: got a DeviceMesh of 2 dimensions": (part, mesh),
        "group: got str, allowed are None": (part, "vocabulary"),
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            tk.linear_cross_entropy(hidden, arguments[0], target, group=arguments[1])
    return problems


def check_target_and_collectives(rank):
    hidden, weight, target, *_ = inputs(torch.float32)
    target[0] = V
    with pytest.raises(ValueError, match=rf"target: got {V} at flat position 0, allowed are \[0, {V}\)"):
        tk.linear_log_prob(hidden, weight[slice_of(rank)], target, group=dist.group.WORLD)
    target[0] = 1
    calls, original = [], dist.all_gather
    dist.all_gather = lambda out, rows, **options: calls.append(rows.numel()) or original(out, rows, **options)
    try:
        tk.linear_log_prob(hidden, weight[slice_of(rank)], target, group=dist.group.WORLD)
    finally:
        dist.all_gather = original
    return [] if calls == [1, 2 * T] else [f"collectives of {calls} numbers"]


def check_operators(rank):
    hidden, weight, target, token_weight, offset, ref_hidden, ref_weight = inputs(torch.float32)
    hidden = hidden.nan_to_num()
    part, name = slice_of(rank), dist.group.WORLD.group_name
    rows, head, offset = leaves(hidden, weight[part], offset[part])
    arguments = (rows, head, offset, target, token_weight, -100, 3.0, 0.7, name, True, "reference")
    opcheck(linear_log_prob_op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    arguments = (rows, head, ref_hidden, ref_weight[part], token_weight, None, 0.7, 0.0, name, True, "reference")
    opcheck(linear_kl_op, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
    compiled = torch.compile(tk.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    results = []
    for function in (tk.linear_cross_entropy, compiled):
        mine = leaves(hidden, weight[part])
        loss = function(*mine, target, token_weight, group=dist.group.WORLD)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in mine)])
    rows = leaves(hidden)[0]
    loss = tk.linear_cross_entropy(rows, weight[part], target, group=dist.group.WORLD)
    gradient = torch.autograd.grad(loss, rows, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError, match="second-order"):
        gradient.backward()
    return [] if all(map(torch.equal, *results)) else ["compiled differs"]


def checks(backends):
    """By name; every process runs them in this order."""
    found = {}
    for backend, dtypes in backends.items():
        for dtype in dtypes:
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            loss = functools.partial(check_loss, backend=backend, dtype=dtype)
            full = {"bias": True, "softcap": 3.0, "logit_scale": 0.7}
            found[f"{name} mean"] = functools.partial(loss, function="ce")
            found[f"{name} none, full"] = functools.partial(loss, function="ce", reduction="none", **full)
            found[f"{name} npo, frozen"] = functools.partial(loss, function="npo", trainable=False)
            found[f"{name} npo, full"] = functools.partial(loss, function="npo", **full)
            found[f"{name} peaked"] = functools.partial(loss, function="npo", spread=30.0)
            found[f"{name} kl"] = functools.partial(check_kl, backend=backend, dtype=dtype)
            found[f"{name} kl, softcap"] = functools.partial(
                check_kl, backend=backend, dtype=dtype, softcap=2.0, logit_scale=1.3, masked=False, trainable=False
            )
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for beta in (0.4, 1.0):
            divergence = functools.partial(check_kl, backend="reference", dtype=dtype, beta=beta)
            name = f"{str(dtype).removeprefix('torch.')} beta {beta}"
            found[name] = divergence
            found[f"{name}, softcap"] = functools.partial(divergence, softcap=2.0, masked=False, trainable=False)
            if dtype == torch.float64:  # where models are sure, float32 shows the rounding of its logits
                found[f"{name}, scaled"] = functools.partial(divergence, logit_scale=40.0)
    backend = next(iter(backends))
    weights = {"function": "ce", "dtype": torch.float32, "weights_need_gradient": True}
    found["weights that need a gradient"] = functools.partial(check_loss, backend=backend, **weights)
    found["dtensor"] = check_dtensor
    found["target and collectives"] = check_target_and_collectives
    found["operators"] = check_operators
    return found


def work(rank, folder, backends, module):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for name, function in checks(backends).items():
        try:
            results[name] = function(rank=rank)
        except Exception as error:  # the other process would wait for ever
            results[name] = [f"{type(error).__name__}: {error}"]
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    os._exit(0)  # a gloo thread that frees its last tensor while the interpreter ends would abort the process


@pytest.fixture(scope="module")
def results():
    backends = {"reference": (torch.float64, torch.bfloat16)}
    if native.cpu_unavailable() is None:
        backends["cpu"] = (torch.float32, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, backends, None), nprocs=2)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == checks(backends).keys(), ranks
    return ranks


def test_a_split_head_gives_what_the_whole_one_gives(results):
    assert [{name: problems for name, problems in rank.items() if problems} for rank in results] == [{}, {}]


def test_group_needs_torch_distributed():
    hidden, weight, target, *_ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"group: torch\.distributed is not initialised"):
        tk.linear_cross_entropy(hidden, weight, target, group="model")
