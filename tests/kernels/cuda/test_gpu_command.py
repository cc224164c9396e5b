"""`make gpu` where there is no GPU: it says so, measures nothing and writes nothing. Its steps run on a CPU, too."""

import json
import os
import subprocess
import sys

import pytest
import torch
from emulated import ROOT

from benchmarks.gpu import goals
from benchmarks.gpu_peers import PEERS
from trace_kernels.runtime.backends import all_ops

COMMAND = [sys.executable, "-m", "benchmarks.gpu", "--output"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    result = subprocess.run([*COMMAND, str(output)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no GPU here" in result.stderr
    assert not output.exists()


def test_goals_name_ops_and_build_inputs():
    on_gpus = {name for name, backends in all_ops().items() if "cuda" in {backend.name for backend in backends}}
    assert {goal.op for goal in goals()} == on_gpus - {"linear_kl"}
    for goal in goals():
        small = {letter: min(size, 64) for letter, size in goal.case.sizes.items()}
        assert goal.case.build(type(goal.case)("small", small, goal.case.build, goal.case.dtype), torch.Generator())


def test_all_steps_run_on_tiny_cases(tmp_path):
    """The gate, the timing loop, the JSON and the table, with the backends and peers that a CPU has."""
    output = tmp_path / "gpu.json"
    command = [*COMMAND, str(output), "--device", "cpu", "--seconds", "0.001"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(output.read_text())
    assert report["conformance"] == "passed"
    rows = report["timings"]
    for goal in goals():
        mine = [row for row in rows if (row["op"], row["case"]) == (goal.op, goal.case.name)]
        ran, failed = {row["candidate"] for row in mine}, mine[0]["failed"]
        assert {"ours:reference", "peer:eager"} <= ran
        assert {f"peer:{peer}" for peer in PEERS.get(goal.op, {})} <= ran | failed.keys()
        assert set(failed["ours:cuda"].split(":")) & {"BackendError"}
        assert all(float(row["p50_ms"]) > 0 and row["goal_ms"] == goal.milliseconds for row in mine)
        assert all(row["candidate"] in result.stdout for row in mine)
