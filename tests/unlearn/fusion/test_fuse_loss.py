import copy
import functools

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
    PhiConfig,
)

from trace_unlearn.errors import UserError
from trace_unlearn.integrations import fuse_loss, fused_loss_of

V = 80
DENSE = {**tiny.COMMON, "vocab_size": V}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
OTHERS = {
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
    "granitemoe": (GraniteMoeConfig, {"logits_scaling": 0.5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": (CohereConfig, {"logit_scale": 0.25}),
    "phi": (PhiConfig, {}),  # a bias of the output embedding
    "gpt2": (GPT2Config, {"tie_word_embeddings": True}),
    "gpt_oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "falcon_h1": (
        FalconH1Config,
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
}
EVERY_FAMILY = (*tiny.FAMILIES, "llama", *OTHERS)


def build(family: str, **changes: object) -> torch.nn.Module:
    if family in OTHERS:
        kind, own = OTHERS[family]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**{**DENSE, **own, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()
    return tiny.model(family, V, **changes)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 11), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 8:] = -100
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(plain, fused):
    outputs, gradients = fused
    torch.testing.assert_close(outputs.loss, plain[0].loss, rtol=2e-6, atol=1e-6)
    assert outputs.logits is None
    assert gradients.keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_loss_and_gradients_are_those_of_the_plain_model(family, batch):
    model = build(family)
    plain = loss_and_gradients(model, **batch)
    fuse_loss(model)
    assert_same(plain, loss_and_gradients(model, **batch))


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_frozen_embeddings(family, tied, batch):
    model = build(family, tie_word_embeddings=tied)
    model.get_output_embeddings().weight.requires_grad_(tied)
    plain = loss_and_gradients(model, **batch)
    fuse_loss(model)
    assert_same(plain, loss_and_gradients(model, **batch))


class Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "cohere"])
def test_logits_never_exist(family, batch):
    model = build(family)
    with Shapes() as shapes:
        model(**batch).loss.backward()
    assert any(shape[-1:] == (V,) and len(shape) == 3 for shape in shapes.seen)
    fuse_loss(model)
    with Shapes() as shapes:
        model(**batch).loss.backward()
    assert not any(shape[-1:] == (V,) and shape.numel() > V * 32 for shape in map(torch.Size, shapes.seen))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_auxiliary_loss(family, batch):
    model = build(family, router_aux_loss_coef=0.7)
    plain = loss_and_gradients(model, output_router_logits=True, **batch)
    fuse_loss(model)
    fused = loss_and_gradients(model, output_router_logits=True, **batch)
    assert_same(plain, fused)
    assert fused[0].aux_loss > 0
    assert fused[0].loss > model(**batch).loss


def test_keywords_of_the_plain_loss(batch):
    model = build("qwen3_moe")
    shift_labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    shift_labels[2, 3] = 7
    ignoring = batch["labels"].clone().masked_fill_(batch["labels"] == -100, 37)
    cases = [
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": shift_labels},
        {"shift_labels": shift_labels[:, -6:].contiguous(), "logits_to_keep": 6},
        {"labels": ignoring, "ignore_index": 37},
        {"use_cache": True},
    ]
    plain = [loss_and_gradients(model, **{**batch, **case}) for case in cases]
    assert len({outputs.loss.item() for outputs, _ in plain}) == 5  # each case does something, use_cache apart
    fuse_loss(model)
    for case, expected in zip(cases, plain, strict=True):
        assert_same(expected, loss_and_gradients(model, **{**batch, **case}))


def test_positional_labels_and_tuples(batch):
    model = build("llama")
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    plain = model(ids, mask, None, None, None, labels, return_dict=False)
    fuse_loss(model)
    fused = model(ids, mask, None, None, None, labels, return_dict=False)
    assert len(fused) == len(plain)
    assert fused[1] is None
    torch.testing.assert_close(fused[0], plain[0])


def test_without_labels_nothing_changes(batch):
    model = build("qwen3_moe")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    fuse_loss(model)
    model(**batch)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)


def test_paused(batch):
    model = build("gemma2")
    plain = loss_and_gradients(model, **batch)
    handle = fuse_loss(model)
    with handle.paused():
        paused = loss_and_gradients(model, **batch)
    assert torch.equal(paused[0].logits, plain[0].logits)
    assert torch.equal(paused[0].loss, plain[0].loss)
    assert_same(plain, loss_and_gradients(model, **batch))


def test_no_label_at_all_is_zero(batch):
    model = build("llama")
    fuse_loss(model)
    batch["labels"].fill_(-100)
    outputs, gradients = loss_and_gradients(model, **batch)
    assert outputs.loss == 0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_log_probs(family, batch):
    model = build(family)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.zeros(batch["labels"].shape)
    target = batch["labels"][:, 1:]
    gathered = logits[:, :-1].log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    expected[:, :-1] = gathered.masked_fill(target == -100, 0)
    undo = fuse_loss(model)
    with undo.log_probs():
        found = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32
    assert model(**batch).loss.dim() == 0


def test_undo_restores_exactly(batch):
    model = build("gemma2")
    plain = loss_and_gradients(model, **batch)
    cls, attributes, names = type(model), set(vars(model)), set(model.state_dict())
    undo = fuse_loss(model)
    assert fused_loss_of(model) is not None
    assert set(model.state_dict()) == names
    undo()
    assert type(model) is cls
    assert type(model.lm_head) is torch.nn.Linear
    assert set(vars(model)) == attributes
    assert fused_loss_of(model) is None
    again = loss_and_gradients(model, **batch)
    assert torch.equal(again[0].logits, plain[0].logits)
    assert torch.equal(again[0].loss, plain[0].loss)
    with pytest.raises(RuntimeError, match="undone already"):
        undo()
    fuse_loss(model)()


def test_copies_and_checkpoints_of_a_fused_model(batch, tmp_path):
    model = build("llama")
    expected = model(**batch).loss
    fuse_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(twin(**batch).loss, expected)
    twin.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(loaded(**batch).loss, expected)


def test_half_precision_is_closer_than_the_plain_loss(batch):
    model = build("llama")
    exact = model.double()(**batch).loss
    model = model.bfloat16()
    with torch.no_grad():
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = torch.nn.functional.linear(hidden.double(), model.lm_head.weight.double())
        best = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        plain = model(**batch).loss
        fuse_loss(model)
        fused = model(**batch).loss
    assert exact.isfinite()
    assert fused.dtype == torch.float32
    assert (fused - best).abs() <= (plain - best).abs() + 1e-6


def test_autocast(batch):
    model = build("qwen3_moe")
    fuse_loss(model)
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, gradients = loss_and_gradients(model, **batch)
    torch.testing.assert_close(outputs.loss, exact, rtol=0.03, atol=0.03)
    assert gradients["lm_head.weight"].dtype == torch.float32


def test_peft(batch):
    peft = pytest.importorskip("peft")

    def adapted(**options):
        model = peft.get_peft_model(build("qwen3_moe"), peft.LoraConfig(r=2, init_lora_weights=False, **options))
        return model.eval()

    torch.manual_seed(0)
    model = adapted(target_modules=["q_proj", "v_proj"])
    plain = loss_and_gradients(model, **batch)
    assert all("lora" in name for name in plain[1])
    undo = fuse_loss(model)
    assert_same(plain, loss_and_gradients(model, **batch))
    undo()
    with pytest.raises(UserError, match=r"output embedding.*adapter"):
        fuse_loss(adapted(target_modules=["q_proj", "lm_head"]))
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    plain = loss_and_gradients(model, **batch)
    assert any("modules_to_save" in name for name in plain[1])
    fuse_loss(model)
    assert_same(plain, loss_and_gradients(model, **batch))


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2"])
def test_offloaded_weights(family, batch):
    """Hooks bring the weights of a module, the output embedding's too, into memory only while it is called."""
    accelerate = pytest.importorskip("accelerate")
    model = build(family, tie_word_embeddings=False)
    with torch.no_grad():
        expected = model(**batch)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.lm_head.weight.is_meta
        undo = fuse_loss(model)
        found = model(**batch)
        assert found.logits is None
        torch.testing.assert_close(found.loss, expected.loss)
        with undo.log_probs():
            assert model(**batch).loss.shape == batch["labels"].shape
        undo()
        assert torch.equal(model(**batch).logits, expected.logits)


def test_refusals(batch):
    model = build("llama")
    fuse_loss(model)
    with pytest.raises(UserError, match="fused already"):
        fuse_loss(model)
    with pytest.raises(UserError, match="Linear, allowed is a transformers model"):
        fuse_loss(torch.nn.Linear(2, 2))
    wrapped = build("llama")
    wrapped.forward = functools.partial(wrapped.forward)
    with pytest.raises(UserError, match="the forward of this LlamaForCausalLM is replaced"):
        fuse_loss(wrapped)
    with pytest.raises(UserError, match="LlamaModel does not compute a next-token loss"):
        fuse_loss(build("llama").model)
    musicgen = MusicgenDecoderConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32
    )
    with pytest.raises(UserError, match="output embedding of MusicgenForCausalLM"):
        fuse_loss(MusicgenForCausalLM(musicgen))
    bart = AutoModelForCausalLM.from_config(
        BartConfig(
            vocab_size=V, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32, is_decoder=True
        )
    )
    fuse_loss(bart)
    with pytest.raises(UserError, match=r"applies \.view to its logits"):  # its loss is computed inside its forward
        bart(**batch)


def test_a_failing_forward_leaves_the_model_usable(batch):
    model = build("llama")
    fuse_loss(model)
    with pytest.raises(ValueError):
        model(**batch, position_ids=torch.zeros(7, dtype=torch.int64), inputs_embeds=torch.zeros(1))
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 11, V)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled(family, batch):
    model = build(family)
    fuse_loss(model)
    expected = loss_and_gradients(model, **batch)
    compiled = torch.compile(model, backend="aot_eager")
    outputs = compiled(**batch)
    torch.testing.assert_close(outputs.loss, expected[0].loss)
    model.zero_grad()
    outputs.loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected[1]["lm_head.weight"], rtol=1e-4, atol=1e-6)
