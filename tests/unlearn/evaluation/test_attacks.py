"""Attacks: the arithmetic of each on tiny models, and the verb with its resuming."""

import json

import pytest
import tiny
import torch

from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.attacks import ExpertBan, avoiding, avoiding_chosen, quantize_, relearn
from trace_unlearn.evaluation.attacks.quantize import rounded
from trace_unlearn.evaluation.attacks.standing import standing
from trace_unlearn.routing.recorder import RoutingRecorder, moe_layers
from trace_unlearn.sources.data import load_tokens
from trace_unlearn.training.trainable import LoraOptions, add_lora
from trace_unlearn.verbs import cli

WORDS = tiny.tokenizer()
FORGET = [{"question": f"what is the capital of w{i} ?", "answer": f"w{i + 1} w{i + 2}"} for i in range(10)]
RETAIN = [f"the color of w{i} is w{i + 9} ." for i in range(6)]
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11], [1, 20, 21, 22, 23, 24, 25, 26]])


def dataset(folder, records, name):
    (folder / name).write_text(json.dumps(records))
    return load_tokens(folder / name, WORDS, progress=False)


# quantize


def test_rounding_is_to_the_nearest_of_a_groups_levels():
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        found = rounded(weight, bits, 32)
        for low in (0, 32, 64):  # the last group is shorter
            old, new = weight[:, low : low + 32], found[:, low : low + 32]
            step = (old.amax(1) - old.amin(1)) / (2**bits - 1)
            levels = old.amin(1)[:, None] + step[:, None] * torch.arange(2**bits)
            nearest = (old[:, :, None] - levels[:, None, :]).abs().amin(2)
            torch.testing.assert_close((old - new).abs(), nearest, rtol=0, atol=1e-5)
            assert all(len(row.unique()) <= 2**bits for row in new)
    assert torch.equal(rounded(torch.full((2, 5), 0.3), 4, 4), torch.full((2, 5), 0.3))
    torch.testing.assert_close(rounded(rounded(weight, 4, 32), 4, 32), rounded(weight, 4, 32))


def test_experts_and_linear_layers_are_rounded_and_nothing_else(family):
    model, before = tiny.model(family), tiny.model(family).state_dict()
    numbers = quantize_(model, 4, group_size=16)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    spared = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "bias")
    assert changed == {name for name in before if not any(part in name for part in spared) and "inv_freq" not in name}
    assert any("experts" in name for name in changed)
    assert numbers == sum(before[name].numel() for name in changed)


@pytest.mark.parametrize("options", [{"modules": ("q_proj",)}, {"modules": (), "parameters": ("experts.down_proj",)}])
@torch.no_grad()
def test_adapters_are_merged_first(options):
    model = add_lora(tiny.model("qwen3_moe"), LoraOptions(rank=4, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for one in (model, model.base_model.model):
        with pytest.raises(UserError, match=r"quantize: .*has adapters.*merge_and_unload"):
            quantize_(one, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits = model(IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits)
    layer = merged.model.layers[1]
    weights = (layer.self_attn.q_proj.weight, layer.mlp.experts.down_proj)
    expected = [rounded(weight.flatten(0, -2), 4, 16).view_as(weight) for weight in weights]
    quantize_(merged, 4, group_size=16)
    assert all(torch.equal(weight, wanted) for weight, wanted in zip(weights, expected, strict=True))


def test_weights_that_are_not_simply_there_are_refused():
    model = tiny.model("mixtral")
    linear = model.model.layers[1].self_attn.q_proj
    torch.nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj computes its weight anew"):
        quantize_(model, 4)
    model = tiny.model("mixtral")
    linear = model.model.layers[1].self_attn.q_proj
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        linear.weight = torch.nn.Parameter(torch.zeros(8, 2, dtype=dtype), requires_grad=False)
        with pytest.raises(UserError, match=rf"layers\.1\.self_attn\.q_proj is quantised .*{dtype}"):
            quantize_(model, 4)


@torch.no_grad()
def test_fewer_bits_are_further_away():
    logits = tiny.model("olmoe")(IDS).logits
    away = []
    for bits in (8, 4, 2):
        model = tiny.model("olmoe")
        quantize_(model, bits, group_size=32)
        away.append((model(IDS).logits - logits).abs().mean().item())
    assert 0 < away[0] < away[1] < away[2]


@pytest.mark.parametrize(("bits", "group", "match"), [(1, 8, "bits: got 1"), (4, 0, "group_size: got 0")])
def test_mistakes_in_quantising(bits, group, match):
    with pytest.raises(UserError, match=match):
        quantize_(tiny.model("mixtral"), bits, group_size=group)


# reroute


@torch.no_grad()
def test_a_banned_expert_contributes_nothing_and_the_others_do_as_always(family):
    model = tiny.model(family)
    plain = model(IDS).logits
    gone = [0, 3, 6]
    layers = moe_layers(model)
    with ExpertBan(model) as ban:
        assert torch.equal(model(IDS).logits, plain)
        ban.banned = [torch.tensor([expert in gone for expert in range(layer.num_experts)]) for layer in layers]
        with RoutingRecorder(model) as recorder:
            banned = model(IDS).logits
        for layer in layers:
            for parameter in layer.experts_module.parameters():
                parameter[gone] = 100 * torch.randn_like(parameter[gone])
        torch.testing.assert_close(model(IDS).logits, banned, rtol=1e-4, atol=1e-4)
        ban.banned = None
        assert not torch.allclose(model(IDS).logits, plain)
    assert torch.isfinite(banned).all()
    if family not in ("deepseek_v2", "deepseek_v3"):  # in groups, one of weight 0 may fill a slot
        assert recorder.counts[:, gone].sum() == 0
        assert (recorder.counts.sum(1) == tiny.TOP_K * IDS.numel()).all()
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_each_token_does_without_the_experts_it_chose():
    model = tiny.model("qwen3_moe")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with RoutingRecorder(model, store_routes=True) as recorder:
        plain = model(**batch).logits
        before = recorder.routes
        with avoiding_chosen(model) as around:
            with around(batch):
                forced = model(**batch).logits
                after = recorder.routes
            assert torch.equal(model(**batch).logits, plain)
    assert not (before.unsqueeze(-1) == after.unsqueeze(-2)).any()
    assert not torch.allclose(forced, plain)


@torch.no_grad()
def test_nothing_chosen_is_left_to_choose_from(tmp_path):
    data = dataset(tmp_path, RETAIN, "retain.json")
    model = tiny.model("mixtral", len(WORDS), num_local_experts=3)
    with (
        pytest.raises(UserError, match=r"reroute: .*experts would be left 1 experts, and a token takes 2"),
        avoiding_chosen(model) as around,
    ):
        standing(model, WORDS, {"retain": data}, around=around, progress=False)
    with pytest.raises(UserError, match="would be left 1 experts"), avoiding(model, [(0, 0), (0, 1)]):
        pass
    with pytest.raises(UserError, match="pairs: layer 9 is no MoE layer"), avoiding(model, [(9, 0)]):
        pass


def test_measures_without_experts_are_those_of_a_model_whose_routers_never_take_them(tmp_path):
    """An expert of which the router's logit is always the lowest is one that nobody chooses."""
    data = {"forget": dataset(tmp_path, FORGET, "forget.json")}
    model = tiny.model("mixtral", len(WORDS))
    with avoiding(model, [(0, 2), (1, 5)]) as around:
        found = standing(model, WORDS, data, batch_size=3, around=around, progress=False)
    plain = standing(model, WORDS, data, batch_size=3, progress=False)
    hooks = []
    for layer, expert in ((0, 2), (1, 5)):
        gate = model.model.layers[layer].mlp.gate

        def lower(module, args, output, expert=expert):
            logits = output[0].clone()
            logits[..., expert] = -1e4
            weights, chosen = logits.softmax(-1).topk(tiny.TOP_K)
            return output[0], weights / weights.sum(-1, keepdim=True), chosen

        hooks.append(gate.register_forward_hook(lower))
    expected = standing(model, WORDS, data, batch_size=3, progress=False)
    assert found["forget"] == pytest.approx(expected["forget"], rel=1e-5)
    assert found["forget"]["nll"] != pytest.approx(plain["forget"]["nll"], rel=1e-3)
    assert found["forget"].keys() == {"nll", "exact_memorization", "extraction_strength", "fact_accuracy"}


# relearn


@pytest.mark.parametrize("rank", [0, 2])
def test_relearning_raises_what_is_measured_of_the_shown_rows(tmp_path, rank):
    from trace_unlearn.training.trainable import LoraOptions, add_lora

    shown = dataset(tmp_path, FORGET[:4], "shown.json")
    model = tiny.model("qwen3_moe", len(WORDS))
    if rank:
        model = add_lora(model, LoraOptions(rank))
    sets = {"shown": shown}

    def measure(model):
        return standing(model, WORDS, sets, progress=False)

    before = standing(model, WORDS, sets, progress=False)
    curve = relearn(model, WORDS, shown, measure, steps=7, every=3, learning_rate=1e-2, batch_size=2, on_cpu=True)
    assert [point["step"] for point in curve] == [0, 3, 6, 7]
    assert curve[0]["shown"] == before["shown"]
    assert curve[-1]["shown"]["nll"] < curve[0]["shown"]["nll"] - 0.5
    assert curve[-1]["shown"] == pytest.approx(measure(model)["shown"])


# the verb


@pytest.fixture
def words(tmp_path, checkpoint):
    (tmp_path / "forget.json").write_text(json.dumps(FORGET))
    (tmp_path / "retain.json").write_text(json.dumps(RETAIN))
    return [
        "attack",
        *("--models", json.dumps([str(checkpoint("qwen3_moe")), str(checkpoint("qwen3_moe", seed=1))])),
        *("--forget", str(tmp_path / "forget.json"), "--retain", str(tmp_path / "retain.json")),
        *("--output", str(tmp_path / "run"), "--device", "cpu"),
        *("--relearn_steps", "4", "--relearn_every", "2", "--relearn_rows", "3", "--relearn_learning_rate", "1e-2"),
    ]


def test_no_row_that_was_shown_is_measured(words, tmp_path):
    import trace_unlearn.verbs.attack as verb

    (tmp_path / "forget.json").write_text(json.dumps(FORGET * 2))
    given = {"forget": str(tmp_path / "forget.json"), "retain": str(tmp_path / "retain.json"), "attacks": ["relearn"]}
    for changes in ({}, {"relearn_on": given["forget"]}):
        models = json.loads(words[2])
        options = verb.AttackOptions(models, output=str(tmp_path / "out"), relearn_rows=5, **given, **changes)
        found = verb._read(options, models).relearned
        shown = [tuple(ids) for ids in found["shown"]["input_ids"]]
        measured = [tuple(ids) for ids in found["forget"]["input_ids"]]
        assert len(shown) == 5
        assert len(measured) == 2 * (len(FORGET) - len(set(shown)))
        assert not set(shown) & set(measured)


def test_the_verb_attacks_every_model_and_goes_on_where_it_stopped(words, tmp_path, capsys, monkeypatch):
    import trace_unlearn.verbs.attack as verb

    stopped = iter([True])
    quantize = verb.quantize_

    def stop_once(model, bits, **options):
        if bits == 4 and next(stopped, False):
            raise KeyboardInterrupt
        return quantize(model, bits, **options)

    monkeypatch.setattr(verb, "quantize_", stop_once)
    assert cli.main(words) == cli.INTERRUPTED
    assert not (tmp_path / "run" / "attacks.json").exists()
    capsys.readouterr()
    assert cli.main([*words, "--group_size", "64"]) == 2
    assert "was made with other options, data or models" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("done already") == 3  # unattacked, relearn and 8 bits of the first model
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["attacks.json"]
    written = files.read_json(tmp_path / "run" / "attacks.json")
    first, second = written["models"].values()
    assert list(first) == list(second) == ["unattacked", "relearn", "quantize_8", "quantize_4", "reroute"]
    assert [point["step"] for point in first["relearn"]["curve"]] == [0, 2, 4]
    assert first["relearn"]["rows"] == {"shown": 3, "forget": 7}
    assert first["relearn"]["curve"][2]["shown"]["nll"] < first["relearn"]["curve"][0]["shown"]["nll"]
    known = [first[name]["forget"]["nll"] for name in ("unattacked", "quantize_8", "quantize_4")]
    assert len(set(known)) == 3
    assert first["reroute"]["chosen"]["forget"]["nll"] != first["unattacked"]["forget"]["nll"]
    assert first["unattacked"] != second["unattacked"]
    assert written["choices"]["fingerprints"].keys() == {"forget", "retain", "relearn.shown", "relearn.forget"}
    assert cli.main(words) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--attacks", "[steal]"], "attacks: got steal; allowed are relearn, quantize, reroute"),
        (["--bits", "[16]"], "bits: got [16], allowed are integers from 2 to 8"),
        (["--relearn_rows", "10"], "relearn_rows: got 10, allowed are at most 9"),
        (["--relearn_steps", "0"], "relearn_steps: got 0"),
        (["--relearn_on", "nowhere.json"], "nowhere.json: no such file"),
        (["--calibration", "nowhere"], "nowhere"),
        (["--suites", '{"muse": {}}'], "suites.muse: needs data"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(words, tmp_path, capsys, more, said, monkeypatch):
    monkeypatch.setattr("trace_unlearn.verbs.attack.load_model", None)
    assert cli.main([*words, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
