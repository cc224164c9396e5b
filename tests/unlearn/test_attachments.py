"""What is attached to a model, for a while or to stay: what a copy of it bears, and that the original keeps its own.

A copy made while something counts or bans is a plain model. What stays (fused losses and routers, trained experts) is
borne by the copy, too.
"""

import contextlib
import copy
import io
import pickle

import pytest
import tiny
import torch

from trace_unlearn.evaluation.attacks.reroute import avoiding, avoiding_chosen
from trace_unlearn.fusion.routers import fuse_routers
from trace_unlearn.integrations import fuse_loss, fused_loss_of
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.routing.routers import RouterProbabilities
from trace_unlearn.training.experts import train_experts

V = 80


def batch():
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def logits(model):
    given = batch()
    del given["labels"]
    return model(**given).logits


@contextlib.contextmanager
def recorded(model):
    with RoutingRecorder(model) as recorder:

        def counted():
            before = recorder.counts.sum().item()
            logits(model)
            return recorder.counts.sum().item() - before

        yield counted


@contextlib.contextmanager
def anchored(model):
    with RouterProbabilities(model, [(0, 1), (1, 2)]) as anchor:

        def seen():
            anchor.begin()
            logits(model)
            return [p.sum().item() for p in anchor.take(torch.Size((2, 9)))[0]]

        yield seen


@contextlib.contextmanager
def banned(model):
    with avoiding(model, [(0, 0), (0, 1), (1, 2)]) as around:

        def changed():
            plain = logits(model)
            with around(batch()):
                return (logits(model) - plain).abs().max().item() > 1e-3

        yield changed


@contextlib.contextmanager
def banned_by_choice(model):
    with avoiding_chosen(model) as around:

        def changed():
            plain = logits(model)
            with around(batch()):
                return (logits(model) - plain).abs().max().item() > 1e-3

        yield changed


PASSING = {"recorder": recorded, "anchor": anchored, "ban": banned, "ban of what is chosen": banned_by_choice}


def fused_loss(model):
    fuse_loss(model)
    return lambda one: (
        fused_loss_of(one) is not None,
        one(**batch()).logits is None,
        round(one(**batch()).loss.item(), 4),
    )


def fused_routers(model):
    fuse_routers(model)
    return lambda one: sorted({type(layer).__name__ for m in one.modules() for layer in layers(m)})


def layers(module):
    found = module.__dict__.get("_trace_forwards")
    return found.layers if found is not None else ()


def trained_rows(model):
    train_experts(model, [(0, 1), (1, 3), (1, 5)])

    def rows(one):
        one.zero_grad()
        loss = one(**batch()).loss
        (loss if loss.dim() == 0 else loss.sum()).backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        return {
            name: gradient.flatten(1).any(1).nonzero().flatten().tolist()
            for name, gradient in gradients.items()
            if ".experts." in name and gradient.dim() == 3
        }

    return rows


STAYING = {"fused loss": [fused_loss], "fused routers": [fused_routers], "trained experts": [trained_rows]}
STAYING["all"] = [fused_routers, trained_rows, fused_loss]


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}
COPIES["twice"] = lambda model: pickled(copy.deepcopy(model))


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("attached", PASSING)
@torch.no_grad()
def test_a_copy_of_what_is_watched_is_plain(attached, copied):
    model = tiny.model("qwen3_moe", V)
    expected = logits(model)
    with PASSING[attached](model) as does:
        before = does()
        twin = COPIES[copied](model)
        torch.testing.assert_close(logits(twin), expected)
        assert does() == before
    torch.testing.assert_close(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    with PASSING[attached](twin) as own:
        assert own() == before


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("attached", STAYING)
def test_a_copy_bears_what_stays(attached, copied):
    model = tiny.model("qwen3_moe", V)
    expected = logits(model)
    does = [attach(model) for attach in STAYING[attached]]
    before = [look(model) for look in does]
    twin = COPIES[copied](model)
    assert [look(twin) for look in does] == before
    torch.testing.assert_close(logits(twin), expected)
    assert [look(model) for look in does] == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(twin), expected)


def test_what_is_trained_is_chosen_anew():
    model = tiny.model("qwen3_moe", V)
    trained_rows(model)
    train_experts(model, [(0, 2)])
    rows = trained_rows(copy.deepcopy(model))  # of the copy: the original's stay
    assert {tuple(found) for found in rows(model).values()} == {(2,)}
    again = copy.deepcopy(model)
    assert {tuple(found) for found in trained_rows(again)(again).values()} == {(1,), (3, 5)}
