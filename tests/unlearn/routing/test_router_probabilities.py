"""What the anchor and ExpertBan read of routers is what the routers act on."""

import copy
import threading

import pytest
import tiny
import torch
from recorded import VOCAB, batch

from trace_unlearn.evaluation.attacks import ExpertBan
from trace_unlearn.integrations import fuse_routers
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.routing.routers import RouterProbabilities, router_of

PAIRS = [(0, 1), (1, 2), (1, 3)]


def probabilities(model, rp, **given):
    rp.begin()
    model(**(given or batch()))
    return rp.take(torch.Size((3, 7)))[0]


def expected(model, weights):
    """From the hidden states that come to each router, by hand."""
    seen = []
    routers = [layer.mlp.gate for layer in model.get_submodule("model").layers]
    handles = [router.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for router in routers]
    with torch.no_grad():
        model(**batch())
    for handle in handles:
        handle.remove()
    rows = [hidden.reshape(21, -1).double() @ weight.double().T for hidden, weight in zip(seen, weights, strict=True)]
    return [logits.softmax(-1).view(3, 7, -1).float() for logits in rows]


def adapted(kind):
    from peft import LoraConfig, get_peft_model

    model = tiny.model("mixtral", VOCAB)
    routers = [layer.mlp.gate for layer in model.model.layers]
    torch.manual_seed(0)
    options = {"r": 2, "lora_dropout": 0.0, "init_lora_weights": False, "lora_alpha": 8}
    if kind == "target_parameters":
        wrapped = get_peft_model(model, LoraConfig(target_parameters=["mlp.gate.weight"], **options)).eval()
        wrappers = [layer.mlp.gate for layer in model.model.layers]
        weights = [r.weight + w.get_delta_weight("default") for r, w in zip(routers, wrappers, strict=True)]
    else:
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"], **options)
        wrapped = get_peft_model(model, config).eval()
        weights = [layer.mlp.gate.modules_to_save["default"].weight for layer in model.model.layers]
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight))
    return wrapped, model, [weight.detach() for weight in weights]


@pytest.mark.parametrize("kind", ["target_parameters", "modules_to_save"])
def test_adapters_on_routers_are_seen_and_trained(kind):
    pytest.importorskip("peft")
    wrapped, model, weights = adapted(kind)
    with RouterProbabilities(wrapped, PAIRS) as rp:
        found = probabilities(wrapped, rp)
        for ours, theirs in zip(found, expected(model, weights), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        sum(p[..., 0].sum() for p in found).backward()
        gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None and "gate" in n}
        assert len(gradients) == (4 if kind == "target_parameters" else 2)
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        with wrapped.disable_adapter():
            plain = probabilities(wrapped, rp)
    assert (plain[0] - found[0]).abs().max() > 0.05


def test_parametrised_and_fused_routers():
    class Tripled(torch.nn.Module):
        def forward(self, weight):
            return 3 * weight

    model = tiny.model("mixtral", VOCAB)
    weights = [3 * layer.mlp.gate.weight.detach() for layer in model.model.layers]
    for layer in model.model.layers:
        torch.nn.utils.parametrize.register_parametrization(layer.mlp.gate, "weight", Tripled())
    with RouterProbabilities(model, PAIRS) as rp:
        plain = probabilities(model, rp)
        undo = fuse_routers(model)
        fused = probabilities(model, rp)
        undo()
        after = probabilities(model, rp)
    for ours, again, theirs, last in zip(plain, fused, expected(model, weights), after, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(last, ours)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_adapters_on_a_linear_router():
    """Where the router is a linear layer, an adapter adds to its output."""
    peft = pytest.importorskip("peft")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(6, 4, bias=False)

    from trace_unlearn.forwards import attach, detach
    from trace_unlearn.routing.layers import MoELayer
    from trace_unlearn.routing.routers import RouterLogits

    options = peft.LoraConfig(target_modules=["gate"], r=4, init_lora_weights=False)
    block = peft.get_peft_model(Block(), options).base_model.model
    seen, hidden = [], torch.randn(5, 6)
    layer = RouterLogits(seen.append, MoELayer("experts", block, 4, 0, None))
    attach(block.gate, layer)
    output = block.gate(hidden)
    detach(block.gate, layer)
    assert torch.equal(seen[0], output)
    assert not torch.allclose(output, hidden @ block.gate.base_layer.weight.T)


def test_threads_and_copies_do_not_mix():
    model = tiny.model("mixtral", VOCAB)
    with RouterProbabilities(model, PAIRS) as rp:
        rp.begin()
        model(**batch())
        twin = copy.deepcopy(model)
        with torch.no_grad():
            thread = threading.Thread(target=model, kwargs=batch(B=1, S=4, seed=3))
            thread.start()
            thread.join()
            twin(**batch(B=2, S=5, seed=4))
        found = rp.take(torch.Size((3, 7)))[0]
        again = probabilities(model, rp)
    for ours, theirs in zip(found, again, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_ban_reaches_adapted_routers_and_no_copy():
    pytest.importorskip("peft")
    wrapped, model, _ = adapted("target_parameters")
    gone = torch.arange(tiny.NUM_EXPERTS) < 4
    with ExpertBan(wrapped) as ban, ban.during([gone, gone]):
        twin = copy.deepcopy(wrapped)
        with RoutingRecorder(wrapped) as rec, RoutingRecorder(twin) as free:
            wrapped(**batch())
            twin(**batch())
    assert rec.counts[:, :4].sum() == 0
    assert free.counts[:, :4].sum() > 0
    with RoutingRecorder(twin) as after:
        twin(**batch())
    assert torch.equal(after.counts, free.counts)
    assert router_of(model, rec.layers[0])[1].__dict__.get("_trace_forwards") is None
