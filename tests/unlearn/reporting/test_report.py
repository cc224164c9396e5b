"""Reports: self-contained, accessible, complete; and the arithmetic behind the figures."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from trace_unlearn import files
from trace_unlearn.calibration.calibrate import calibrate
from trace_unlearn.errors import UserError
from trace_unlearn.reporting import plots, report
from trace_unlearn.reporting.page import Page, show
from trace_unlearn.routing.profile import RoutingStatistics
from trace_unlearn.verbs import cli

LAYERS, EXPERTS, TOP_K = 3, 16, 2


def statistics(seed=0, forget_tokens=400, retain_tokens=900):
    """Forget tokens prefer the low experts, and so does a tenth of the retain tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens, tilted):
        score = torch.rand(tokens, LAYERS, EXPERTS, generator=generator)
        score[tilted, :, :4] += 0.4
        return score.topk(TOP_K).indices

    def count(routes):
        return torch.stack([routes[:, layer].flatten().bincount(minlength=EXPERTS) for layer in range(LAYERS)])

    forget = draw(forget_tokens, slice(None))
    retain = draw(retain_tokens, slice(0, retain_tokens // 10))
    return RoutingStatistics(
        count(forget),
        count(retain),
        forget_tokens,
        retain_tokens,
        TOP_K,
        retain.to(torch.uint8),
        torch.tensor([0, 300, retain_tokens]),
        {"model": "a <model> & more", "retain_fingerprint": "f" * 64, "versions": {"torch": "2.0"}},
    )


@pytest.fixture
def run_folder(tmp_path):
    stats = statistics()
    stats.save(tmp_path / "profile")
    calibrate(stats).save(tmp_path / "calibration")
    measures = {"forget": {"nll": 5.125, "routing_shift": {"changed": 0.1, "by_layer": [1, 2]}}, "retain": {"nll": 0.5}}
    files.write_json(
        tmp_path / "metrics.json", {"checkpoints": {"before": measures, "after": measures}, "choices": {"limit": None}}
    )
    log = [{"forget_nll": float(i), "retain_nll": 0.1 * i, "step": i} for i in range(5)] + [{"train_runtime": 3.0}]
    files.write_json(tmp_path / "model" / "trace.json", {"options": {"learning_rate": 1e-5}, "log": log})
    return tmp_path


class Reader(HTMLParser):
    """Collects what a browser would load, pictures and the tags left open."""

    VOID = ("meta", "img", "br")

    def __init__(self, html):
        super().__init__()
        self.links, self.pictures, self.open, self.tags = [], [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.links += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if tag == "img":
            self.pictures.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_verb_writes_one_self_contained_page(run_folder, capsys):
    assert cli.main(["report", str(run_folder)]) == 0
    html = (run_folder / "report.html").read_text()
    page = Reader(html)
    assert page.open == []
    assert "script" not in page.tags
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?://", html)
    assert len(page.pictures) == 5
    assert all(len(picture["alt"]) > 40 for picture in page.pictures)
    assert "a &lt;model&gt; &amp; more" in html
    for text in ("5.125", "learning_rate", "min_ess", "2.0"):
        assert text in html
    found = calibrate(statistics())
    shown = [show(value) for values in (found.f, found.r, found.weighted_r) for value in values.tolist()]
    shown += [show(found.ess), show(found.largest_weight), *map(show, found.quantiles().values())]
    shown += ["{:.3f} to {:.3f}".format(*span) for spans in (found.f_interval, found.r_interval) for span in spans]
    assert not [text for text in shown if text not in html]
    assert "cannot be shown: show_tokens: the profile does not say where its data came from" in html
    for name in ("experts", "intervals", "calibration", "weights", "trade-off"):
        assert (run_folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_phone_shows_the_verdict_before_all_tables_and_pictures(run_folder):
    metrics = files.read_json(run_folder / "metrics.json")
    sentence = "Forgotten (forget set: NLL 1.000 -> 5.125), kept (retain set: NLL 0.500 -> 0.500)."
    metrics["verdicts"] = {"after": {"sentence": sentence}}
    files.write_json(run_folder / "metrics.json", metrics)
    assert cli.main(["report", str(run_folder)]) == 0
    head, body = (run_folder / "report.html").read_text().split("<body>")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in head
    begin = [body.index(part) for part in ("<h1>", 'class="verdict"', 'class="tiles"', "<h2>", "<table", "<img")]
    assert begin[0] == min(begin)
    assert sorted(begin)[1] == begin[1]
    text = " ".join(re.sub(r"<[^>]+>", " ", body).replace("&gt;", ">").split())
    assert text.index(sentence) < 120  # a title and a line before it: the first screen of any phone
    # Nothing is wider than the screen: tables scroll by themselves, pictures shrink.
    assert body.count("<table") == body.count('<div class="scroll"')
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", head)
    assert re.search(r"img \{[^}]*max-width: 100%", head)


def known(share, nll=1.0, **more):
    return {"nll": nll, "exact_memorization": share, "extraction_strength": share / 2, **more}


def test_attacks_and_benchmarks_are_shown_beside_the_scores(run_folder):
    curve = [
        {"step": step, "shown": known(share), "forget": known(share / 2), "retain": known(0.75)}
        for step, share in ((0, 0.125), (10, 0.5), (20, 1.0))
    ]
    both = {"forget": known(0.125, fact_accuracy=0.25), "retain": known(0.75)}
    suites = {"muse": {"verbmem": 33.25, "min_k": {"forget": [1.0, 2.0]}}, "lm_eval": {"wmdp_bio": {"acc": 0.375}}}
    attacked = {
        "runs/a/model": {
            "unattacked": both,
            "relearn": {"curve": curve, "rows": {"shown": 4, "forget": 9}, "suites": suites},
            "quantize_4": {"forget": known(0.0625), "retain": known(0.5)},
        },
        "runs/b/model": {"unattacked": both, "quantize_4": {"forget": known(0.125), "retain": known(0.5)}},
    }
    files.write_json(run_folder / "attacks.json", {"models": attacked, "choices": {"options": {"bits": [4]}}})
    metrics = files.read_json(run_folder / "metrics.json")
    metrics["checkpoints"]["before"]["forget"]["exact_memorization"] = 0.96875
    metrics["suites"] = {"before": suites}
    files.write_json(run_folder / "metrics.json", metrics)
    html = report.report_run(run_folder).render()
    page = Reader(html)
    assert len(page.pictures) == 7
    dots = next(picture for picture in page.pictures if picture["alt"].startswith("Dot plot"))
    assert "a/model: not attacked 0.125, relearned, 20 steps 0.500, 4 bits 0.062; b/model: not" in dots["alt"]
    assert "nan" not in dots["alt"]
    assert "a/model: most comes back by &quot;relearned, 20 steps&quot;: it recites 50.0% of the forget tokens" in html
    assert "of the forget tokens, 6.2% before" in html  # of the rows that relearning did not show
    assert "b/model: no attack brought anything back; it recites 12.5%" in html
    assert "of the rows never shown 0.062 before and 0.500 after 20 steps" in html
    for text in ("MUSE VerbMem", "33.250", "wmdp_bio, accuracy by lm-eval", "0.375", "Benchmarks under attack"):
        assert text in html, text


@pytest.mark.parametrize("name", ["metrics.json", "attacks.json"])
def test_a_file_of_something_else_is_refused(run_folder, name, capsys):
    (run_folder / name).write_text('{"a": 1}')
    assert cli.main(["report", str(run_folder)]) == 2
    assert f"{name}: not measures that" in capsys.readouterr().err


def test_report_can_go_elsewhere_and_twice(run_folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("report")
    for _ in range(2):
        assert cli.main(["report", "--run", str(run_folder), "--output", str(elsewhere)]) == 0
    assert (elsewhere / "report.html").is_file()
    assert not (run_folder / "report.html").exists()


def test_report_of_what_is_there_so_far(tmp_path):
    statistics().save(tmp_path / "profile")
    assert len(Reader(report.report_run(tmp_path).render()).pictures) == 1


def test_nothing_to_report(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing to report"):
        report.report_run(tmp_path)


def test_of_many_experts_those_furthest_apart_are_plotted(monkeypatch):
    monkeypatch.setattr(report, "LISTED_EXPERTS", 3)
    found = calibrate(statistics())
    apart = [abs(f - r) for f, r in zip(found.f.tolist(), found.r.tolist(), strict=True)]
    expected = sorted(sorted(range(len(apart)), key=lambda i: -apart[i])[:3])
    drawn = []
    monkeypatch.setattr(
        plots, "frequency_intervals", lambda *given: drawn.append(given) or plots.weight_histogram(np.ones(2))
    )
    report.intervals(Page("", ""), found)
    labels, f, f_span, *_ = drawn[0]
    assert labels == [f"{layer} / {expert}" for layer, expert in found.selected[expected].tolist()]
    np.testing.assert_array_equal(f, found.f[expected])
    np.testing.assert_array_equal(f_span, found.f_interval[expected])


@pytest.mark.parametrize("at_a_time", [7, 1 << 13])
def test_weighted_frequency_is_that_of_repeated_tokens(monkeypatch, at_a_time):
    monkeypatch.setattr(report, "_TOKENS", at_a_time)
    stats = statistics()
    uniform = report.weighted_frequency(stats, torch.ones(stats.retain_tokens))
    torch.testing.assert_close(uniform, stats.retain_frequency)
    weight = torch.randint(0, 4, (stats.retain_tokens,), generator=torch.Generator().manual_seed(1))
    repeated = stats.retain_routes.repeat_interleave(weight, dim=0)
    expected = torch.stack(
        [repeated[:, layer].flatten().long().bincount(minlength=EXPERTS) for layer in range(LAYERS)]
    ) / len(repeated)
    torch.testing.assert_close(report.weighted_frequency(stats, weight.float()), expected.double())


def test_weighted_frequency_skips_empty_slots():
    stats = statistics()
    stats.retain_routes[:, 0, 1] = 255
    frequency = report.weighted_frequency(stats, torch.ones(stats.retain_tokens))
    torch.testing.assert_close(frequency.sum(1), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64))


def test_weighted_frequency_agrees_with_the_calibration():
    stats = statistics()
    found = calibrate(stats)
    frequency = report.weighted_frequency(stats, found.token_weight)
    layer, expert = found.selected.T
    torch.testing.assert_close(frequency[layer, expert], found.weighted_r, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (48, 128)])
def test_heatmaps_of_any_size(layers, experts):
    values = np.random.default_rng(0).random((layers, experts))
    figure = plots.expert_heatmaps({"a": values, "b": values}, [(0, 0), (layers - 1, experts - 1)])
    assert plots.png(figure).startswith(b"\x89PNG")


def test_plots_are_reproducible():
    weights = np.random.default_rng(0).lognormal(size=500)
    assert plots.png(plots.weight_histogram(weights)) == plots.png(plots.weight_histogram(weights))


def test_names_are_no_formulas_and_every_one_is_drawn():
    series = {f"a$\\frac$ {i}": [0.5] for i in range(9)}
    figure = plots.dots(["x"], series, x_label="share")
    assert len(figure.axes[0].collections) == 9 + 1
    assert plots.png(figure)


def test_histogram_of_equal_weights_and_zeros():
    assert plots.png(plots.weight_histogram(np.ones(10)))
    assert plots.png(plots.weight_histogram(np.array([0.0, 2.0])))


def test_page_escapes_everything():
    page = Page("<t>", "<s>")
    page.heading("<h>")
    page.verdict(["<v>"])
    page.tiles([("<n>", "<x>")])
    page.table("<c>", ["<k>", "<k>"], [["<r>", "<d>"]], folded=True)
    html = page.render("<f>")
    assert not re.search(r"<[tshvnxckrdf]>", html)
    Reader(html)
