"""Every Triton kernel, compiled for sm_80, sm_90 and sm_100 in each configuration of launches.py.

No kernel spills, as many programs of each fit on a processor as limits.json asks for, and loads are 16 bytes wide where
the speed rests on them. This says nothing about results (test_interpreter.py does) and is no measurement on a GPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from occupancy import Usage

HERE = Path(__file__).parent
LIMITS = json.loads((HERE / "limits.json").read_text())
OPS = tuple(LIMITS)
CAPABILITIES = (80, 90, 100)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module", params=OPS)
def compiled(request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "compile_kernels.py", request.param, *map(str, CAPABILITIES)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return request.param, [json.loads(line) for line in result.stdout.splitlines()]


def described(kernel):
    return f"{kernel['kernel']} sm_{kernel['capability']} {kernel['types']} {kernel['constants']}"


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    op, kernels = compiled
    expected = {(name, capability) for name in LIMITS[op] for capability in CAPABILITIES}
    assert {(kernel["kernel"], kernel["capability"]) for kernel in kernels} == expected


def test_nothing_spills(compiled):
    _, kernels = compiled
    # The ptxas of Triton 3.6 holds router_topk's forward to 128 registers, and two of its numbers wait on the stack.
    stack = 16 if version("triton").startswith("3.6.") else 0
    spilling = [k for k in kernels if k["stack"] > stack or k["local"] or k["spills"] > stack]
    assert [described(kernel) for kernel in spilling] == []


def is_wide(kernel, limits):
    """Whether what has to be aligned for wide loads is."""
    return set(limits["wide"]["aligned"]) <= set(kernel["aligned"])


def is_one_of(kernel, variants):
    return any(all(kernel["constants"][name] == value for name, value in variant.items()) for variant in variants)


def least(kernel, limits):
    """The programs that have to fit, which may depend on the variant and on how wide loads are."""
    blocks = limits["blocks"]
    if "fewer" in limits and is_one_of(kernel, limits["fewer"]["where"]):
        return limits["fewer"]["blocks"]
    if isinstance(blocks, dict):
        blocks = blocks["aligned" if is_wide(kernel, limits) else "otherwise"]
    return blocks


def test_enough_programs_fit_on_a_processor(compiled):
    op, kernels = compiled
    few = []
    for kernel in kernels:
        usage = Usage(32 * kernel["warps"], kernel["registers"], kernel["shared"])
        blocks, wanted = usage.blocks(kernel["capability"]), least(kernel, LIMITS[op][kernel["kernel"]])
        if blocks < wanted:
            few.append(f"{described(kernel)}: {usage}, {blocks} of {wanted}")
    assert few == []


def test_products_run_on_tensor_cores(compiled):
    op, kernels = compiled
    least = {name: limits.get("tensor_cores", 0) for name, limits in LIMITS[op].items()}
    assert [described(kernel) for kernel in kernels if kernel["tensor_cores"] < least[kernel["kernel"]]] == []


def test_loads_are_wide(compiled):
    """Where a kernel's limits name what has to be aligned for it, and the tile is not that of a short row."""
    op, kernels = compiled
    checked, narrow = set(), []
    for kernel in kernels:
        wide = LIMITS[op][kernel["kernel"]].get("wide")
        if wide is None or not is_wide(kernel, LIMITS[op][kernel["kernel"]]):
            continue
        if any(kernel["constants"][name] < least for name, least in wide.get("at_least", {}).items()):
            continue
        if is_one_of(kernel, wide.get("unless", [])):
            continue
        if any(kernel["types"][name] not in kinds for name, kinds in wide.get("types", {}).items()):
            continue
        checked.add(kernel["kernel"])
        if kernel["wide_loads"] < wide["loads"] or kernel["wide_stores"] < wide.get("stores", 0):
            narrow.append(f"{described(kernel)}: {kernel['wide_loads']} loads, {kernel['wide_stores']} stores")
    assert narrow == []
    assert checked == {name for name, limits in LIMITS[op].items() if "wide" in limits}
