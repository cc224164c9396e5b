"""The CUDA kernels on the conformance cases, forward and backward, without a GPU: compiled for the CPU by emulation.h,
with AddressSanitizer and UBSan, threads in several orders.

It shows what the kernels compute; emulation.h says what it cannot show. Nothing here ran on a GPU.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from emulated import HERE, ORDERS, ROOT, build, preload

OPS = (
    "record_routing_",
    "cross_entropy",
    "router_topk",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_token_stats",
    "linear_kl",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or preload() is None, reason="no g++ with AddressSanitizer"),
]


@pytest.fixture(scope="module")
def module():
    return build(ROOT / "build" / "cuda-emulation")


def output_of(module, what, **variables):
    environment = {**os.environ, "LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0", **variables}
    command = [sys.executable, HERE / "emulated.py", module, what]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{result.stdout[-500:]}\n{result.stderr[-6000:]}"
    return result


@pytest.fixture(scope="module", params=OPS)
def records(request, module):
    result = output_of(module, request.param)
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("order", ORDERS)
def test_kernels_are_right(records, order):
    mine = [record for record in records if record["order"] == order and not record["refused"]]
    assert len(mine) > 5
    assert [record for record in mine if record["problems"]] == []


def test_refusals_are_those_of_the_design(records):
    """float64, and what a kernel's limits exclude."""
    reasons = {record["refused"].split(": ", 1)[-1] for record in records if record["refused"]}
    assert reasons <= {
        "float64 is served by the reference only",
        "it computes in float32, weights_dtype is float64",
        "a warp holds up to 1024 experts and 64 chosen, not 3001 and 100",
    }


def test_several_blocks_and_chunks(module):
    output_of(module, "several_blocks")
