"""Single Triton kernels, and paths that only large inputs take, in Triton's interpreter: see kernel_checks.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trace_kernels.runtime import triton_backend

pytestmark = pytest.mark.skipif(
    triton_backend.interpreter_unavailable() is not None, reason=str(triton_backend.interpreter_unavailable())
)
SCRIPT = Path(__file__).with_name("kernel_checks.py")
NAMES = re.findall(r"@check\ndef (\w+)", SCRIPT.read_text())


@pytest.fixture(scope="module")
def problems():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return dict(map(json.loads, result.stdout.splitlines()))


@pytest.mark.parametrize("name", NAMES)
def test_kernel(problems, name):
    assert problems[name] is None, problems[name]
