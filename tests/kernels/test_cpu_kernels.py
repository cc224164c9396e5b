"""The C++ loss kernels: every instruction set that this machine has, determinism, rescaling, and scratch memory."""

import mmap
import os

import pytest
import torch

import trace_kernels as tk
from benchmarks.timing import peak_memory
from trace_kernels.runtime.native import cpu_unavailable, native
from trace_kernels.testing.conformance import discover, errors

if (reason := cpu_unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

OPS = discover()
NAMES = {"cross_entropy", "linear_cross_entropy", "linear_log_prob", "linear_kl"}
KINDS = ("tiles", "full", "strided", "peaked", "flat", "fp16", "ref_dtype", "ref_width", "width_1", "one_class")
CASES = [
    pytest.param(OPS[name], case, id=f"{name}-{case.name}")
    for name in sorted(NAMES)
    for case in OPS[name].cases
    if not case.benchmark and case.name.startswith(KINDS)
]


@pytest.mark.parametrize("isa", native().available_isas())
@pytest.mark.parametrize("op, case", CASES)
def test_every_instruction_set_is_right(op, case, isa, monkeypatch):
    monkeypatch.setenv("TRACE_KERNELS_ISA", isa)
    assert native().isa() == isa
    assert errors(op, case, "cpu") == []


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("TRACE_KERNELS_ISA", "mmx")
    with pytest.raises(ValueError, match="TRACE_KERNELS_ISA: got 'mmx', this machine has portable"):
        tk.linear_log_prob(torch.zeros(1, 4), torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64), backend="cpu")


def inputs(T, H, V, dtype, spread=1.0):
    generator = torch.Generator().manual_seed(T * H + V)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) * spread / H**0.5).to(dtype)
    return hidden, weight, torch.randint(V, (T,), generator=generator)


def gradients(hidden, weight, target, backend):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp = tk.linear_log_prob(hidden, weight, target, backend=backend)
    return logp.detach(), *torch.autograd.grad(logp.sum(), (hidden, weight))


def known_gradients(hidden, weight, target, backend, **options):
    """As `gradients`, from the loss whose weights are known in the forward: there the head's gradient reuses p."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    options = {name: value.to(hidden.dtype) if name == "bias" else value for name, value in options.items()}
    loss = tk.linear_cross_entropy(hidden, weight, target, reduction="sum", backend=backend, **options)
    return loss.detach()[None], *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("isa", native().available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, H, V", [(300, 301, 700), (700, 257, 450), (90, 64, 333), (1100, 512, 130)])
def test_head_gradient_from_kept_probabilities(T, H, V, dtype, isa, monkeypatch):
    # p of all rows, or of whole blocks of them, stays in the memory of the head's gradient; the last unit does not.
    monkeypatch.setenv("TRACE_KERNELS_ISA", isa)
    hidden, weight, target = inputs(T, H, V, dtype, spread=3.0)
    target[::7] = -100
    options = {"token_weight": torch.linspace(-1.0, 2.0, T), "softcap": 20.0, "logit_scale": 1.5}
    options["bias"] = torch.linspace(-1.0, 1.0, V).to(dtype)
    got = known_gradients(hidden, weight, target, "cpu", **options)
    truth = known_gradients(hidden.double(), weight.double(), target, "reference", **options)
    for value, expected in zip(got[1:], truth[1:], strict=True):
        budget = 2e-6 if dtype == torch.float32 else 6e-3
        assert (value.double() - expected).norm() <= budget * expected.norm()


@pytest.mark.parametrize("gradients", [gradients, known_gradients])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_grow_along_the_vocabulary_rescale(dtype, gradients):
    # Every tile beats the maxima so far by more than e^8: the sums, the gradient and the kept p are rescaled.
    hidden, weight, target = inputs(70, 33, 3000, dtype)
    hidden[:, 0] = 1.0
    weight[:, 0] = torch.arange(3000) * 0.05
    got = gradients(hidden, weight, target, "cpu")
    truth = gradients(hidden.double(), weight.double(), target, "reference")
    # A float32 logit of 150 carries 2^-17 of rounding, and so does every probability.
    budget = 4 * 2.0**-17 if dtype == torch.float32 else 1e-2
    for value, expected in zip(got, truth, strict=True):
        assert (value.double() - expected).abs().max() <= budget * expected.abs().max()


@pytest.mark.parametrize("gradients", [gradients, known_gradients])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_same_bits_from_run_to_run(dtype, threads, gradients):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        hidden, weight, target = inputs(133, 65, 1500, dtype)
        first, second = (gradients(hidden, weight, target, "cpu") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        truth = gradients(hidden.double(), weight.double(), target, "reference")
        assert (first[0].double() - truth[0]).abs().max() < 1e-5 * max(1.0, first[0].abs().max() / 10)
        budget = 1e-5 if dtype == torch.float32 else 1e-2
        assert (first[2].double() - truth[2]).norm() < budget * truth[2].norm()
    finally:
        torch.set_num_threads(before)


def divergence(spread, noise, one_head, dtype, backend):
    """More rows than wait for their normalisers at a time: a pass over the vocabulary ends a block and begins one."""
    generator = torch.Generator().manual_seed(3)
    T, H, V = 200, 8, 70000
    hidden = torch.randn(T, H, generator=generator) * spread
    ref_hidden = hidden + torch.randn(T, H, generator=generator) * spread * noise
    weight = torch.randn(V, H, generator=generator) / H**0.5
    ref_weight = weight + torch.randn(V, H, generator=generator) * noise / H**0.5
    mask = torch.arange(T) % 9 != 0
    hidden[0] = float("nan")  # not in the mask
    wide = torch.float64 if backend == "reference" else dtype
    hidden, ref_hidden, weight, ref_weight = (x.to(dtype).to(wide) for x in (hidden, ref_hidden, weight, ref_weight))
    options = {"mask": mask, "softcap": 30.0, "logit_scale": 0.8, "reduction": "none", "backend": backend}
    weights = (weight, weight if one_head else ref_weight)
    hidden.requires_grad_()
    kl = tk.linear_kl(hidden, weights[0], ref_hidden, weights[1], torch.linspace(-1.0, 2.0, T), **options)
    return kl.detach(), torch.autograd.grad(kl.sum(), hidden)[0], mask


@pytest.mark.parametrize(
    "isa, spread, noise, one_head",
    [
        *(
            pytest.param(isa, 1.0, 1e-2, False, marks=[pytest.mark.slow] if isa != native().isa() else [])
            for isa in native().available_isas()
        ),
        *((native().isa(), spread, noise, True) for spread, noise in ((1.0, 1e-2), (20.0, 0.1), (1e-2, 1.0))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_of_more_rows_than_wait_at_a_time(isa, spread, noise, one_head, dtype, monkeypatch):
    # Near distributions: p - q must not be a difference of rounded numbers.
    monkeypatch.setenv("TRACE_KERNELS_ISA", isa)
    kl, dx, mask = divergence(spread, noise, one_head, dtype, "cpu")
    again = divergence(spread, noise, one_head, dtype, "cpu")
    assert torch.equal(kl, again[0])
    assert torch.equal(dx, again[1])
    assert not dx[~mask].any()
    true_kl, true_dx, _ = divergence(spread, noise, one_head, dtype, "reference")
    rounding = 2.0**-24 * max(1.0, spread)  # of the logits, in float32
    assert (kl.double() - true_kl).abs().max() <= 16 * 2 * rounding  # two roundings of a logsumexp above 8
    budget = 6e-3 if dtype == torch.bfloat16 else 8 * rounding / min(noise, spread)
    assert (dx.double() - true_dx).norm() <= budget * true_dx.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    hidden, weight, target = inputs(40, 20, 700, torch.float32)
    clean = gradients(hidden, weight, target, "cpu")
    hidden[7, 3] = value
    dirty = gradients(hidden, weight, target, "cpu")
    others = torch.arange(40) != 7
    assert not torch.isfinite(dirty[0][7])
    for index in range(2):
        assert torch.equal(dirty[index][others], clean[index][others])


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("op", ["linear_cross_entropy", "linear_log_prob", "linear_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_is_bounded(dtype, op, trainable):
    # [T, V] logits would take 153 MiB in float32. A gradient of the head must exist once.
    T, H, V = 2000, 256, 20000
    hidden, weight, target = inputs(T, H, V, dtype)
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    others = (hidden.detach(), weight.detach()) if op == "linear_kl" else (target,)
    outputs = 2 * hidden.nbytes + trainable * weight.nbytes  # hidden's gradient is stashed, then handed out scaled

    def step():
        getattr(tk, op)(hidden, weight, *others, backend="cpu").sum().backward()
        hidden.grad = weight.grad = None

    step()  # loads what torch imports late
    native().release_workspace()
    peak = peak_memory(step, weight.device)
    if peak is None:
        pytest.skip("this system does not tell the peak of its memory")
    assert (peak - outputs) / 2**20 <= 48


def test_the_graph_that_is_freed_gives_its_memory_to_the_gradient():
    hidden, weight, target = inputs(50, 64, 900, torch.bfloat16)
    weight.requires_grad_()
    loss = tk.linear_cross_entropy(hidden, weight, target, backend="cpu") * 0.3
    kept = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    again = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert kept.data_ptr() != again.data_ptr()
    last = torch.autograd.grad(loss, weight)[0]
    assert torch.equal(kept, again)
    assert torch.equal(kept, last)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_freed_gradient_of_the_head_lends_its_memory_to_the_next():
    try:
        mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE).madvise(mmap.MADV_FREE)
    except (OSError, AttributeError):
        pytest.skip("this system cannot mark memory as free")
    hidden, weight, target = inputs(3, 4096, 600, torch.float32)  # 9.4 MiB
    weight.requires_grad_()

    def gradient(head=weight):
        loss = tk.linear_cross_entropy(hidden, head, target % 400, backend="cpu")
        return torch.autograd.grad(loss, head)[0]

    first = gradient()
    expected, at = first.clone(), first.data_ptr()
    view = first[5:].flatten()
    del first
    second, third = gradient(), gradient()  # the first lives in its view: nobody else may write there
    assert len({at, second.data_ptr(), third.data_ptr()}) == 3
    assert torch.equal(view, expected[5:].flatten())
    del view
    assert gradient(weight.detach()[:450].requires_grad_()).data_ptr() != at  # of another size
    # The last one freed is kept: the smaller one's memory has replaced it.
    del third
    again = gradient()
    at = again.data_ptr()
    assert torch.equal(again, expected)
    del again
    pid = os.fork()
    if pid == 0:  # what the parent keeps serves the child, which writes its own copy
        torch.set_num_threads(1)
        same = gradient().data_ptr() == at and torch.equal(second, expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    again = gradient()
    assert again.data_ptr() == at
    assert torch.equal(again, expected)
