"""What fuse_loss leaves on a model survives wrappers, other heads, copies, pickles, threads and replicas."""

import copy
import functools
import inspect
import io
import pickle
import threading

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, Trainer, TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_loss, fused_loss_of

V = 80
COUNT = 14  # labels to predict in the batch


@pytest.fixture
def model():
    return tiny.model("qwen3_moe", V)


def batch():
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_loss(model, given=None):
    """From the logits of a forward without labels, by hand."""
    given = dict(given or batch())
    labels = given.pop("labels")
    logits = model(**given).logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def assert_fused(model, expected=None):
    """The loss is right, logits never come back, and log_probs are a number per token."""
    outputs = model(**batch())
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, plain_loss(model) if expected is None else expected)
    with fused_loss_of(model).log_probs():
        log_probs = model(**batch()).loss
    assert log_probs.shape == batch()["labels"].shape
    torch.testing.assert_close(-log_probs.sum() / COUNT, outputs.loss)


def assert_plain(model):
    assert fused_loss_of(model) is None
    assert model(**batch()).logits.shape == (2, 9, V)


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield Accelerator(mixed_precision="bf16", cpu=True)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# Wrappers


@pytest.mark.parametrize("undo_first", [True, False])
def test_mixed_precision_of_accelerate(model, accelerator, undo_first):
    cls, names = type(model), set(vars(model))
    undo = fuse_loss(model)
    prepared = accelerator.prepare(model)
    outputs = prepared(**batch())
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, plain_loss(model), rtol=0.02, atol=0.02)
    if undo_first:
        undo()
        assert_plain(prepared)
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    else:
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
        assert_fused(model)
        assert_fused(copy.deepcopy(model))
        assert_fused(pickle.loads(pickle.dumps(model)))
        undo()
        assert set(vars(model)) - {"_is_accelerate_prepared"} == names
    assert_plain(model)
    assert type(model) is cls
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_fused_again_inside_a_wrapper(model, accelerator):
    fuse_loss(model)()
    undo = fuse_loss(model)
    accelerator.prepare(model)
    undo()
    fuse_loss(model)
    assert model(**batch()).logits is None
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_fused(model)
    assert_fused(pickle.loads(pickle.dumps(model)))


def test_a_model_in_mixed_precision_already_is_refused(model, accelerator):
    accelerator.prepare(model)
    with pytest.raises(UserError, match=r"replaced by another tool; fuse first.*keep_fp32_wrapper=False"):
        fuse_loss(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def test_trainer_in_bf16(model, tmp_path):
    undo = fuse_loss(model)
    rows = [{name: value[0] for name, value in batch().items()} for _ in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert model(**batch()).logits is None
    undo()
    assert_plain(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)


def test_signature_and_class_are_the_plain_ones(model, tmp_path):
    cls, signature = type(model), inspect.signature(model.forward)
    fuse_loss(model)
    assert type(model) is model.__class__ is cls
    assert inspect.signature(model.forward) == signature
    assert_plain(type(model)(model.config))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == [cls.__name__]
    assert_plain(loaded)
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, fuse_loss(loaded)._model(**batch()).loss)


# Other heads


def test_resized_and_replaced_heads(model):
    fuse_loss(model)
    model.resize_token_embeddings(V + 8)
    assert model.lm_head.weight.shape[0] == V + 8
    assert_fused(model)
    new = torch.nn.Linear(model.config.hidden_size, V)
    model.set_output_embeddings(new)
    assert_fused(model)
    assert model.lm_head is new
    model(**batch()).loss.backward()
    assert new.weight.grad.abs().max() > 0
    assert new.bias.grad.abs().max() > 0
    model.lm_head = torch.nn.Linear(model.config.hidden_size, V, bias=False)
    assert_fused(model)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert_fused(model)
    fused_loss_of(model)()
    assert model(**batch()).logits.shape == (2, 9, V + 8)


@pytest.mark.parametrize("kind", ["scaled", "identity"])
def test_a_head_that_is_no_linear_layer_is_refused_whenever_it_comes(model, kind):
    class ScaledLinear(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    handle = fuse_loss(model)
    model.lm_head = ScaledLinear(32, V) if kind == "scaled" else torch.nn.Identity()
    with pytest.raises(UserError, match=r"output embedding of Qwen3MoeForCausalLM is a \w+.*(ScaledLinear|Identity)"):
        model(**batch())
    with pytest.raises(UserError, match="output embedding"), handle.log_probs():
        model(**batch())
    handle()
    with pytest.raises(UserError, match=r"output embedding of Qwen3MoeForCausalLM is a \w+.*(ScaledLinear|Identity)"):
        fuse_loss(model)


def test_the_class_of_a_quantised_head_is_named(model):
    quantised = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    quantised.forward = lambda self, hidden: hidden
    model.lm_head.__class__ = quantised
    with pytest.raises(UserError, match=r"is a bitsandbytes\.nn\.modules\.Linear4bit, whose forward is not.*quantised"):
        fuse_loss(model)
    model.lm_head.__class__ = torch.nn.Linear
    from torch.testing._internal.two_tensor import TwoTensor

    weight = model.lm_head.weight.detach()
    plain, packed = model.lm_head.weight, torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    model.lm_head.weight = packed
    with pytest.raises(UserError, match=r"weight of the output embedding.*is a torch\.testing.*TwoTensor, which only"):
        fuse_loss(model)
    model.lm_head.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"weight of the output embedding.*is torch\.int8"):
        fuse_loss(model)
    model.lm_head.weight = plain
    fuse_loss(model)
    model.lm_head.weight = packed
    with pytest.raises(UserError, match="TwoTensor"):
        model(**batch())


def test_peft_after_fusing(model):
    from peft import LoraConfig, get_peft_model

    fuse_loss(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.add_(1)
    assert_fused(adapted)
    adapted(**batch()).loss.backward()
    assert model.lm_head.modules_to_save["default"].weight.grad.abs().max() > 0
    with adapted.disable_adapter():
        assert_fused(adapted)
    merged = adapted.merge_and_unload()
    assert merged is model
    assert type(model.lm_head) is torch.nn.Linear
    assert_fused(merged)
    adapted = get_peft_model(merged, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    for context in (fused_loss_of(adapted).log_probs, torch.no_grad):
        with pytest.raises(UserError, match=r"is a peft\..*Linear: it bears an adapter"), context():
            adapted(**batch())
    assert_fused(adapted.unload())


def test_parametrised_heads_are_honoured(model):
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    fuse_loss(model)
    before = model(**batch()).loss
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    assert_fused(model)
    assert not torch.isclose(model(**batch()).loss, before)
    gradients = []
    for loss in (plain_loss(model), model(**batch()).loss):
        model.zero_grad()
        loss.backward()
        gradients.append(model.lm_head.parametrizations.weight.original.grad)
    torch.testing.assert_close(*gradients)
    torch.nn.utils.parametrize.remove_parametrizations(model.lm_head, "weight")
    torch.nn.utils.weight_norm(model.lm_head)  # a hook that sets the weight before each call
    with torch.no_grad():
        model.lm_head.weight_g.mul_(1.5)
    assert_fused(model)


def test_hooks_on_the_head(model):
    fuse_loss(model)
    expected, seen = plain_loss(model), []
    head = model.lm_head
    handles = [
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
        head.register_forward_hook(lambda module, args, output: seen.append(len(args))),
        head.register_forward_hook(lambda module, args, output: output),
        head.register_forward_hook(lambda module, args, output: output.clone()),
        head.register_forward_hook(lambda module, args, output: output.view_as(output)),
        head.register_forward_hook(lambda module, args, output: output.to(torch.float64).to(output.dtype)),
    ]
    torch.testing.assert_close(model(**batch()).loss, expected)
    assert seen == [(2, 9, 32), 1] or seen == [(18, 32), 1]
    for handle in handles:
        handle.remove()
    handle = head.register_forward_pre_hook(lambda module, args: args[0] * 2)  # what comes in may change
    assert_fused(model)
    assert not torch.isclose(model(**batch()).loss, expected)
    handle.remove()
    for change in (lambda m, a, output: output * 2, lambda m, a, output: output.mul_(2), lambda m, a, o: (o, o)):
        handle = head.register_forward_hook(change)
        for context in (torch.enable_grad, torch.no_grad, fused_loss_of(model).log_probs):
            with pytest.raises(UserError, match=r"output embedding.*changes what it returns"), context():
                model(**batch())
        handle.remove()
    head.forward = functools.partial(lambda forward, hidden: forward(hidden) + 1, head.forward)
    with pytest.raises(UserError, match="changes what it returns"):
        model(**batch())
    head.forward = lambda hidden: hidden @ head.weight.T
    with pytest.raises(UserError, match="without a linear map"):
        model(**batch())
    del head.forward
    assert_fused(model, expected)


def test_another_loss_function_is_refused_at_the_next_forward(model):
    handle = fuse_loss(model)
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(UserError, match="loss_function: the loss of Qwen3MoeForCausalLM is fused; undo"):
        model(**batch())
    handle()
    with pytest.raises(UserError, match="does not compute a next-token loss"):
        fuse_loss(model)


# Copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("inside", [False, True])
def test_copies_are_fused_and_independent(model, copied, inside):
    undo = fuse_loss(model)
    if inside:
        with undo.log_probs():
            twin = copied(model)
    else:
        twin = copied(model)
    assert type(twin) is type(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(model(**batch()).loss, torch.tensor(V).float().log())
    assert_fused(twin)
    with undo.log_probs():
        assert twin(**batch()).loss.dim() == 0
    undo()
    assert_plain(model)
    assert_fused(twin)
    fused_loss_of(twin)()
    assert_plain(twin)
    assert set(vars(twin)) == set(vars(model))


def test_a_head_inside_another_module():
    config = BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, is_decoder=True
    )
    model = BertLMHeadModel(config).eval()
    fuse_loss(model)
    for one in (model, copy.deepcopy(model), pickled(model)):
        assert_fused(one)
        one.cls = copy.deepcopy(one.cls)
        with torch.no_grad():
            one.cls.predictions.decoder.weight.mul_(2)
        assert_fused(one)
        one.set_output_embeddings(torch.nn.Linear(32, V))
        assert_fused(one)


# Threads


def test_threads_do_not_see_each_other(model):
    handle = fuse_loss(model)
    expected, loss = model(input_ids=batch()["input_ids"]).logits, model(**batch()).loss
    wrong, stop = [], threading.Event()

    def label_free():
        while not stop.is_set():
            with torch.no_grad():
                logits = model(input_ids=batch()["input_ids"]).logits
            if not isinstance(logits, torch.Tensor) or not torch.equal(logits, expected):
                wrong.append(logits)

    def generating():
        while not stop.is_set():
            try:
                model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False)
            except Exception as error:
                wrong.append(error)

    def labelled():
        while not stop.is_set():
            if model(**batch()).loss.dim() != 0:
                wrong.append("log-probabilities of another thread's context")

    threads = [threading.Thread(target=work) for work in (label_free, generating, labelled)]
    for thread in threads:
        thread.start()
    with handle.log_probs():
        for _ in range(20):
            assert model(**batch()).loss.shape == (2, 9)
    for _ in range(20):
        torch.testing.assert_close(model(**batch()).loss, loss)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_inside_a_forward(model):
    fuse_loss(model)
    inner = []

    def again(module, args):
        if not inner:
            inner.append(None)
            inner[0] = (model(**batch()).loss, model(input_ids=batch()["input_ids"]).logits)

    handle = model.model.layers[1].register_forward_pre_hook(again)
    loss = model(**batch()).loss
    handle.remove()
    assert torch.equal(inner[0][0], loss)
    assert inner[0][1].shape == (2, 9, V)


def replicated(module):
    """As `torch.nn.parallel.replicate` does it, on the CPU."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return replica


def test_replicas_of_data_parallel(model):
    handle = fuse_loss(model)
    expected = plain_loss(model)
    with handle.log_probs():
        asking = replicated(model)
    replicas = [replicated(model), replicated(model)]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.zero_()
    found = {}

    def run(name, replica, **more):
        found[name] = replica(**batch(), **more).loss

    given = [("asking", asking, {}), *((i, r, {}) for i, r in enumerate(replicas))]
    given.append(("counted", replicas[0], {"num_items_in_batch": torch.tensor([[15]])}))
    threads = [threading.Thread(target=run, args=(name, r), kwargs=more) for name, r, more in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["asking"].shape == (2, 9)
    torch.testing.assert_close(-found["asking"].sum() / COUNT, expected)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found["counted"], expected[None, None] * COUNT / 15)


@pytest.mark.parametrize(
    "count",
    [13, 13.0, *map(torch.tensor, (13, [13], [[13], [20]], [13.0], [0]))],
    ids=str,
)
def test_num_items_in_batch_of_any_shape(model, count):
    expected = model(**batch(), num_items_in_batch=count).loss
    fuse_loss(model)
    found = model(**batch(), num_items_in_batch=count).loss
    if isinstance(count, torch.Tensor):
        expected = expected.masked_fill(count == 0, 0.0)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
