"""A fused model under torch.compile: one graph where the plain model has one, compiled once."""

import copy

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_loss, fused_loss_of

V = 80


def batch(S=9, seed=1):
    ids = torch.randint(3, V, (2, S), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def compiled(model, **options):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def loss_and_gradients(model, run, given, reduce=lambda loss: loss, **more):
    model.zero_grad()
    outputs = run(**given, **more)
    reduce(outputs.loss).backward()
    return outputs.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def build(family):
    changes = {"experts_implementation": "batched_mm"} if family == "qwen3_moe" else {}
    if family == "gemma2":
        from transformers import Gemma2Config, Gemma2ForCausalLM

        torch.manual_seed(0)
        sizes = {**tiny.COMMON, "vocab_size": V, "head_dim": 8, "final_logit_softcapping": 3.0}
        return Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    return tiny.model(family, V, **changes)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "gemma2")]


@pytest.mark.parametrize("family", ["qwen3_moe", *SLOW])
def test_one_graph_compiled_once(family):
    model = build(family)
    plain = [loss_and_gradients(model, model, batch(seed=seed)) for seed in range(3)]
    handle = fuse_loss(model)
    run, counter = compiled(model)
    for seed in range(3):
        assert_same(loss_and_gradients(model, run, batch(seed=seed)), plain[seed])
    assert run(**batch()).logits is None
    assert counter.frame_count == 1
    with handle.log_probs():
        log_probs = model(**batch()).loss
        for _ in range(2):
            torch.testing.assert_close(run(**batch()).loss, log_probs)
    assert counter.frame_count == 2
    assert run(**batch()).loss.dim() == 0  # the graph of one is not taken for the other
    assert counter.frame_count == 2


@pytest.mark.slow
def test_dynamic_shapes_and_counts():
    model = tiny.model("llama", V)
    lengths = (9, 12, 30)
    plain = [loss_and_gradients(model, model, batch(S), num_items_in_batch=torch.tensor(50)) for S in lengths]
    fuse_loss(model)
    run, counter = compiled(model, dynamic=True)
    frames = []
    for S, expected in zip(lengths, plain, strict=True):
        found = loss_and_gradients(model, run, batch(S), num_items_in_batch=torch.tensor(50))
        assert_same(found, expected)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.slow
def test_contexts_that_are_made_anew_in_each_step():
    model = tiny.model("llama", V)
    handle = fuse_loss(model)
    run, counter = compiled(model)

    def step(weight):
        def function(hidden, head, target, **options):
            import trace_kernels as tk

            return tk.linear_log_prob(hidden, head, target, **options) * weight

        with handle.per_token(function):
            return run(**batch()).loss

    once = step(torch.ones(2, 9))
    twice = step(torch.full((2, 9), 2.0))
    torch.testing.assert_close(twice, 2 * once)
    step(torch.full((2, 9), 3.0))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_copies_replaced_heads_and_hooks_compile_too():
    model = tiny.model("llama", V)
    expected = loss_and_gradients(model, model, batch())
    fuse_loss(model)
    twin = copy.deepcopy(model)
    model.lm_head = copy.deepcopy(model.lm_head)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dim()))
    for one in (model, twin):
        run, counter = compiled(one)
        assert_same(loss_and_gradients(one, run, batch()), expected)
        assert counter.frame_count == 1
    assert seen == [0]
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    run, _ = compiled(model)
    with pytest.raises((UserError, torch._dynamo.exc.TorchDynamoException), match="changes what it returns"):
        run(**batch())
    fused_loss_of(twin)()
    run, _ = compiled(twin)
    assert run(**batch()).logits.shape == (2, 9, V)
