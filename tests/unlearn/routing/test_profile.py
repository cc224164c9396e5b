"""profile_routing against a plain loop over the documents, one at a time."""

from __future__ import annotations

import shutil
from html import unescape

import pytest
import tiny
import torch
from profiled import VOCAB, documents, run

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.reporting.report import report_run
from trace_unlearn.routing.recorder import RoutingRecorder
from trace_unlearn.routing.statistics import RoutingStatistics
from trace_unlearn.verbs.calibrate import CalibrateOptions
from trace_unlearn.verbs.calibrate import main as calibrate_main
from trace_unlearn.verbs.profile import ProfileOptions, main


def one_by_one(model, dataset):
    """Routes [n, L, k] of each document's loss-bearing tokens."""
    out = []
    for row in dataset:
        with torch.no_grad(), RoutingRecorder(model, store_routes=True) as rec:
            model(input_ids=torch.tensor([row["input_ids"]]))
        bearing = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
        out.append(rec.routes[0][bearing])
    return out


def test_against_one_document_at_a_time(family):
    model = tiny.model(family, VOCAB)
    forget, retain = documents(5, 1), documents(9, 2)
    stats = run(model, forget, retain, batch_size=4)
    expected = {"forget": one_by_one(model, forget), "retain": one_by_one(model, retain)}
    for name, routes in expected.items():
        counts = torch.stack([torch.bincount(layer.flatten(), minlength=8) for layer in torch.cat(routes).unbind(1)])
        assert torch.equal(getattr(stats, f"{name}_counts"), counts)
        assert getattr(stats, f"{name}_tokens") == sum(map(len, routes))
    assert stats.retain_offsets.tolist() == [0, *torch.tensor([len(r) for r in expected["retain"]]).cumsum(0).tolist()]
    assert stats.retain_routes.dtype == torch.uint8
    assert torch.equal(stats.retain_routes.long(), torch.cat(expected["retain"]))
    assert stats.top_k == tiny.TOP_K
    torch.testing.assert_close(
        stats.forget_frequency.sum(1), torch.full_like(stats.forget_frequency[:, 0], stats.top_k)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batch_size_and_mode_do_not_matter(batch_size):
    model = tiny.model("qwen3_moe", VOCAB).train()
    forget, retain = documents(5, 1), documents(9, 2)
    stats, again = (run(model, forget, retain, batch_size=size) for size in (4, batch_size))
    assert model.training
    for name in ("forget_counts", "retain_counts", "retain_routes", "retain_offsets"):
        assert torch.equal(getattr(stats, name), getattr(again, name))
    assert stats.meta == again.meta


def test_meta():
    forget, retain = documents(5, 1), documents(9, 2)
    meta = run(tiny.model("deepseek_v3", VOCAB), forget, retain).meta
    assert meta["layers"] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert meta["layer_indices"] == [1, 2]
    assert meta["forget_fingerprint"] != meta["retain_fingerprint"]
    assert meta["num_experts"] == 8


def test_save_and_load(tmp_path):
    stats = run(tiny.model("mixtral", VOCAB), documents(5, 1), documents(9, 2))
    stats.save(tmp_path / "profile")
    again = RoutingStatistics.load(tmp_path / "profile")
    assert again.meta == stats.meta
    assert torch.equal(again.retain_routes, stats.retain_routes)
    assert again.forget_tokens == stats.forget_tokens
    with pytest.raises(UserError, match="exists"):
        stats.save(tmp_path / "profile")


@pytest.mark.parametrize(
    "reads, meta, verb",
    [(RoutingStatistics, "routing.json", "profile"), (Calibration, "calibration.json", "calibrate")],
)
def test_what_another_version_made_is_to_be_made_again(reads, meta, verb, tmp_path):
    (tmp_path / meta).write_text('{"format": 1}')
    with pytest.raises(UserError, match=rf"another version of trace-unlearn \(format 1, .* run `trace-unlearn {verb}`"):
        reads.load(tmp_path)


@pytest.mark.parametrize(
    "reads, meta, verb",
    [(RoutingStatistics, "routing.json", "profile"), (Calibration, "calibration.json", "calibrate")],
)
def test_a_folder_above_the_right_one(reads, meta, verb, tmp_path):
    with pytest.raises(UserError, match=f"no such folder; `trace-unlearn {verb}` writes one"):
        reads.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"no {meta} there, so not written by `trace-unlearn {verb}`$"):
        reads.load(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / meta).write_text("{}")
    with pytest.raises(UserError, match=r"did you mean .*first"):
        reads.load(tmp_path)


def test_loading_something_else(tmp_path):
    with pytest.raises(UserError, match=r"routing\.json"):
        RoutingStatistics.load(tmp_path)
    stats = run(tiny.model("mixtral", VOCAB), documents(5, 1), documents(9, 2))
    stats.save(tmp_path / "a")
    (tmp_path / "a" / "routing.json").write_text("{}")
    with pytest.raises(UserError, match="not routing statistics"):
        RoutingStatistics.load(tmp_path / "a")
    stats.save(tmp_path / "b")
    run(tiny.model("mixtral", VOCAB), documents(5, 1), documents(4, 3)).save(tmp_path / "c")
    (tmp_path / "b" / "routing.json").write_bytes((tmp_path / "c" / "routing.json").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        RoutingStatistics.load(tmp_path / "b")


def test_mistakes_are_refused():
    model = tiny.model("mixtral", VOCAB)
    some, nothing = documents(5, 1), documents(5, 1, mask_every=1, longest=2)
    with pytest.raises(UserError, match="no token bears loss"):
        run(model, some, nothing)
    with pytest.raises(UserError):
        run(model, some, some)
    with pytest.raises(UserError, match="batch_size"):
        run(model, some, documents(5, 2), batch_size=0)
    with pytest.raises(UserError, match="no MoE layer"):
        run(tiny.model("llama", VOCAB), some, documents(5, 2))


@pytest.mark.parametrize(("num_experts", "expected"), [(255, "uint8"), (256, "uint16")])
def test_routes_on_disk_are_those_in_memory(tmp_path, num_experts, expected):
    model = tiny.model("qwen3_moe", VOCAB, num_experts=num_experts)
    forget, retain = documents(5, 1), documents(9, 2)
    stats, again = run(model, forget, retain), run(model, forget, retain, output=tmp_path / "profile")
    assert str(stats.retain_routes.dtype) == f"torch.{expected}"
    assert torch.equal(stats.retain_routes, again.retain_routes)
    assert torch.equal(stats.retain_design_effect, again.retain_design_effect)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "routes.npy",
        "routing.json",
        "routing.safetensors",
    ]
    with pytest.raises(UserError, match="exists"):
        run(model, forget, retain, output=tmp_path / "profile")
    (tmp_path / "profile" / "routes.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"routes\.npy: not readable"):
        RoutingStatistics.load(tmp_path / "profile")


def test_design_effect_against_the_textbook():
    """Cluster sampling: the variance between document totals, a loop over the documents."""
    model = tiny.model("mixtral", VOCAB)
    forget, retain = documents(5, 1), documents(9, 2)
    stats = run(model, forget, retain, batch_size=4)
    for name, dataset in (("forget", forget), ("retain", retain)):
        routes = [r for r in one_by_one(model, dataset) if len(r)]
        N, D = sum(map(len, routes)), len(routes)
        effect = torch.ones(2, 8, dtype=torch.float64)
        for layer in range(2):
            for e in range(8):
                y = [int((r[:, layer] == e).sum()) for r in routes]
                p = sum(y) / N
                if 0 < p < 1:
                    between = sum((a - p * len(r)) ** 2 for a, r in zip(y, routes, strict=True)) * D / (D - 1) / N**2
                    effect[layer, e] = max(1.0, between / (p * (1 - p) / N))
        torch.testing.assert_close(getattr(stats, f"{name}_design_effect"), effect.float())
        assert effect.max() > 1.3
    single = run(model, documents(1, 3), retain)
    assert torch.isinf(single.forget_design_effect).all()


def test_the_verb(tmp_path, checkpoint):
    (tmp_path / "forget.txt").write_text("the capital of w1 is w2 .\nthe owner of w3 is w4 .\n")
    (tmp_path / "retain.txt").write_text("the color of w5 is w6 .\nwhat is w7 ? w8 w9 w10 .\n")
    said = []
    options = ProfileOptions(
        model=str(checkpoint("mixtral")),
        forget=str(tmp_path / "forget.txt"),
        retain=str(tmp_path / "retain.txt"),
        output=str(tmp_path / "profile"),
        device="cpu",
    )
    main(options, said.append)
    stats = RoutingStatistics.load(tmp_path / "profile")
    assert stats.forget_counts.sum() == stats.forget_tokens * tiny.TOP_K * 2
    assert str(stats.retain_tokens) in said[-1]
    shown = CalibrateOptions(
        profile=options.output, output=str(tmp_path / "calibration"), tau=0.0, min_count=1, min_ess=0.0, show_tokens=3
    )
    calibrate_main(shown, said.append)
    lines = next(text for text in said if "largest weights" in text).splitlines()[1:]
    weights = Calibration.load(shown.output).token_weight.sort(descending=True).values
    assert [float(line.split()[0]) for line in lines] == pytest.approx(weights[:3].tolist(), abs=0.006)
    text = " ".join((tmp_path / "retain.txt").read_text().split())  # no blank line: one document
    for line in lines:
        number, shown_text = line.split("document ")[1].split(": ")
        before, after = shown_text.split(" [")
        assert number == "0"
        assert f"{before} {after[:-1]}".replace("<s>", "").replace("</s>", "").strip() in text
    html = unescape(report_run(tmp_path, show_tokens=3).render())
    for line in lines:
        assert line.split(": ", 1)[1] in html
    (tmp_path / "retain.txt").rename(tmp_path / "moved.txt")
    assert "weights cannot be shown" in report_run(tmp_path).render()
    shown.output = str(tmp_path / "again")
    with pytest.raises(UserError, match=r"retain\.txt"):
        calibrate_main(shown, said.append)
    assert Calibration.load(shown.output).token_weight.max() == weights[0]  # saved before its tokens are looked up
    shutil.rmtree(shown.output)
    shown.output = str(tmp_path / "calibration")
    (tmp_path / "moved.txt").rename(tmp_path / "retain.txt")
    shutil.rmtree(shown.output)
    with pytest.raises(UserError, match="exists"):
        main(options, said.append)
    options.output, options.retain = str(tmp_path / "other"), options.forget
    with pytest.raises(UserError):
        main(options, said.append)
    options.model, options.retain = str(checkpoint("llama")), str(tmp_path / "retain.txt")
    with pytest.raises(UserError):
        main(options, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forget.txt", "profile", "retain.txt"]
