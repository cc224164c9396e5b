"""`make gpu` where there is no GPU: it says so, measures nothing and writes nothing."""

import subprocess
import sys

import pytest
import torch
from emulated import ROOT

from benchmarks.gpu import goals
from trace_kernels.conformance import discover


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no GPU here" in result.stderr
    assert not output.exists()


def test_goals_name_ops_and_build_inputs():
    ops = discover()
    assert {goal.op for goal in goals()} == set(ops) - {"linear_kl"}
    for goal in goals():
        small = {letter: min(size, 64) for letter, size in goal.case.sizes.items()}
        assert goal.case.build(type(goal.case)("small", small, goal.case.build, goal.case.dtype), torch.Generator())
