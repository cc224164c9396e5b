"""RoutingRecorder leaves copies, other threads and abandoned models alone."""

import copy
import gc
import pickle
import threading

import pytest
import tiny
import torch
from recorded import VOCAB, batch, count, counted, router_outputs

from trace_unlearn.routing.recorder import RoutingRecorder

PER_FORWARD = 18 * tiny.TOP_K * 2  # tokens, experts of each, layers


@pytest.fixture
def model():
    return tiny.model("mixtral", VOCAB)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_copy_made_inside_is_not_observed(copied, family, tmp_path):
    model = tiny.model(family, VOCAB)
    given = batch()
    with RoutingRecorder(model, store_routes=tmp_path / "routes.npy") as rec:
        expected = model(**given).logits
        twin = copied(model)
        assert torch.equal(twin(**given).logits, expected)
        counts = rec.counts
        model(**given)
    assert torch.equal(rec.counts, 2 * counts)
    assert torch.equal(twin(**given).logits, expected)
    with RoutingRecorder(twin) as own:
        twin(**given)
    assert torch.equal(own.counts, counts)


@torch.no_grad()
def test_an_abandoned_recorder_takes_its_hooks_along(model):
    rec = RoutingRecorder(model)
    rec.__enter__()
    model(**batch())
    assert hooks(model) > 0
    del rec
    gc.collect()
    assert hooks(model) == 0
    model(**batch())


def test_a_recorder_that_cannot_begin_leaves_nothing(model, monkeypatch):
    rec = RoutingRecorder(model)
    attach = rec.layers[1].adapter.attach
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("no hook today")
        return attach(*args)

    object.__setattr__(rec.layers[1].adapter, "attach", failing)
    try:
        with pytest.raises(ValueError, match="no hook today"):
            rec.__enter__()
    finally:
        object.__setattr__(rec.layers[1].adapter, "attach", attach)
    assert hooks(model) == 0
    with torch.no_grad(), rec:
        model(**batch())
    assert rec.counts.sum() == PER_FORWARD


def test_an_error_in_the_block_takes_the_hooks_off(model):
    with pytest.raises(KeyError), RoutingRecorder(model):
        raise KeyError
    assert hooks(model) == 0


@torch.no_grad()
def test_threads_count_one_after_the_other(model):
    sizes = [(3, 7), (1, 5), (2, 9), (4, 3)]
    givens = [batch(B=B, S=S, seed=number) for number, (B, S) in enumerate(sizes)]
    expected = 0
    for given in givens:
        with RoutingRecorder(model) as one:
            model(**given)
        expected = expected + one.counts
    errors = []

    def work(given):
        try:
            for _ in range(5):
                with torch.no_grad():
                    model(**given)
        except Exception as error:
            errors.append(error)

    with RoutingRecorder(model) as rec:
        threads = [threading.Thread(target=work, args=(given,)) for given in givens]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert torch.equal(rec.counts, 5 * expected)


def test_a_backward_in_another_thread_is_not_counted(model):
    """Gradient checkpointing runs the layers again while a forward of this thread is under way."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with RoutingRecorder(model) as rec:
        loss = model(**batch(labels=True)).loss
        counts = rec.counts
        errors, ran = [], []

        def backward():
            try:
                loss.backward()
            except Exception as error:
                errors.append(error)

        def meanwhile(module, args):
            if not ran:
                ran.append(1)
                thread = threading.Thread(target=backward)
                thread.start()
                thread.join()

        handle = model.model.layers[1].register_forward_pre_hook(meanwhile)
        with torch.no_grad():
            model(**batch(labels=True))
        handle.remove()
    assert ran
    assert not errors
    assert torch.equal(rec.counts, 2 * counts)


@torch.no_grad()
def test_a_forward_within_a_forward_is_refused_and_harms_none(model):
    ran = []

    def again(module, args):
        if not ran:
            ran.append(1)
            with pytest.raises(RuntimeError, match="began within another"):
                model(**batch(B=1))

    handle = model.model.layers[1].register_forward_pre_hook(again)
    with router_outputs(model) as seen, RoutingRecorder(model) as rec:
        model(**batch())
    handle.remove()
    assert ran
    assert torch.equal(rec.counts, count(seen, counted(batch())))


@torch.no_grad()
def test_nested_recorders_end_in_any_order(model):
    outer, inner = RoutingRecorder(model), RoutingRecorder(model)
    outer.__enter__()
    inner.__enter__()
    model(**batch())
    outer.__exit__(None, None, None)
    model(**batch())
    inner.__exit__(None, None, None)
    assert outer.counts.sum() == PER_FORWARD
    assert inner.counts.sum() == 2 * PER_FORWARD
    assert hooks(model) == 0


@torch.no_grad()
def test_replicas_of_data_parallel_are_counted(model):
    given = batch()
    with RoutingRecorder(model) as rec:
        replicas = [model._replicate_for_data_parallel() for _ in range(2)]
        threads = [threading.Thread(target=replica, kwargs=given) for replica in replicas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert rec.counts.sum() == 2 * PER_FORWARD
