"""Each example runs, and says of itself what it computes with and without our losses."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield lambda name: runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]()
    sys.modules.pop("hugging_face_trainer", None)


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert all(f'run("{path.name}")' in tested for path in EXAMPLES.glob("*.py"))


def test_hugging_face_trainer(run):
    found = run("hugging_face_trainer.py")  # in bfloat16
    example = runpy.run_path(str(EXAMPLES / "hugging_face_trainer.py"))
    exact = example["train"](example["tiny_model"](), bf16=False)
    assert len(exact) == 4
    off = {name: max(abs(a - b) for a, b in zip(losses, exact, strict=True)) for name, losses in found.items()}
    assert 0 < off["plain"] < 0.05
    assert off["fused"] < 2 * off["plain"]
    model = example["tiny_model"]()
    undo = example["fuse_loss"](model)
    assert example["train"](model, bf16=False) == pytest.approx(exact, rel=1e-5)
    undo()
    assert model(torch.arange(6)[None], labels=torch.arange(6)[None]).logits.shape == (1, 6, 500)


def test_trl_sft(run):
    pytest.importorskip("trl")
    found = run("trl_sft.py")
    losses = {name: [float(entry["loss"]) for entry in entries] for name, entries in found.items()}
    assert len(losses["plain"]) == 4
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-5)
    off = found["plain"][0].keys() - found["fused"][0].keys()
    assert off <= {"num_tokens"}  # as the example says
    for metric in ("entropy", "mean_token_accuracy"):
        plain, fused = ([float(entry[metric]) for entry in found[name]] for name in ("plain", "fused"))
        assert fused == pytest.approx(plain, rel=1e-4)


def test_bare_pytorch(run):
    log = run("bare_pytorch.py")
    assert log["forget"][-1] < 0.1 * log["forget"][0]
    assert log["retain"][-1] < 0.1 * log["retain"][0]


def test_minimal_trace(run):
    log = run("minimal_trace.py")
    assert log[-1]["forget"] > log[0]["forget"] + 0.5
    assert log[-1]["retain"] < log[0]["retain"]
    assert len((EXAMPLES / "minimal_trace.py").read_text().splitlines()) <= 50


def test_the_minimal_example_is_quoted_whole():
    page = (EXAMPLES.parent / "docs" / "unlearn_your_model.md").read_text()
    assert f"```python\n{(EXAMPLES / 'minimal_trace.py').read_text()}```" in page
