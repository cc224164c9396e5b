"""tools/gpu.sh where there is no GPU: it says so. All its parts run on a CPU too, without a network or an index."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from emulated import ROOT

from benchmarks import gpu, gpu_goals
from benchmarks.gpu_check import problems
from benchmarks.gpu_peers import PEERS
from trace_kernels.ops.linear_cross_entropy.cases import OP as LINEAR
from trace_kernels.runtime.backends import all_ops
from trace_kernels.runtime.native import cuda_unavailable, runs_on
from trace_kernels.testing.cases import Call
from trace_kernels.testing.conformance import discover

TINY = {"T": 48, "H": 32, "V": 64}
#: What a borrowed machine lacks.
ABSENT = ("datasets", "jsonargparse", "rouge_score", "trl", "ruff", "mypy")
GUARD = f"""
import importlib.abc, socket, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
def no_network(*args, **kwargs):
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = no_network
"""


def script(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path):
    """The environment of a machine with a card that says little, no network, no index, and few packages."""
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools, "nvidia-smi", """#!/bin/sh
case "$1" in
  --query-gpu=name) echo "NVIDIA H200" ;;
  --query-gpu=driver_version) echo 580.82.07 ;;
  --query-gpu=clocks.sm) echo 1980 MHz ;;
  *) echo "Field is not a valid field to query." >&2; exit 2 ;;
esac
""")  # fmt: skip
    script(tools, "compute-sanitizer", f"""#!/bin/sh
if [ "$1" = --help ]; then echo "  --kernel-regex arg"; exit 0; fi
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" >> {tmp_path}/sanitizer
""")  # fmt: skip
    script(tools, "pip", "#!/bin/sh\nexit 1\n")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path / "guard"),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(environment, output, *options):
    command = [ROOT / "tools" / "gpu.sh", "--output", output, "--processes", "1", "--seconds", "0.001", *options]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_says_that_there_is_no_gpu(machine, tmp_path):
    result = run(machine, tmp_path / "gpu.json")
    assert result.returncode == 2
    assert "no GPU here" in result.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.slow
def test_all_parts_run_end_to_end(machine, tmp_path):
    output = tmp_path / "gpu.json"
    result = run(machine, output, "--device", "cpu", "--minutes", "70")  # far more than it needs
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(output.read_text())
    assert report["card"] == {"name": "NVIDIA H200", "driver_version": "580.82.07", "clocks.sm": "1980 MHz"}
    assert report["machine"]["torch"] == torch.__version__
    assert [report[part]["outcome"] for part in gpu.LIMITS] == ["passed"] * 4
    assert report["conformance"]["found"]["passed"] > 10
    found = report["timings"]["found"]
    assert min(found["floors"].values()) > 0
    for goal in gpu_goals.goals(TINY):
        mine = [row for row in found["rows"] if row["goal"] == goal.name]
        ran = {row["candidate"] for row in mine}
        failed = {entry["candidate"] for entry in found["not timed"] if entry["goal"] == goal.name}
        assert {"ours:reference", "peer:eager"} <= ran
        assert {f"peer:{peer}" for peer in PEERS.get(goal.op, {})} <= ran | failed
        assert all(float(row["p50_ms"]) > 0 and float(row["host_us"]) > 0 for row in mine)
        assert all(row["candidate"] in result.stdout for row in mine)
    assert any("share_of_all_rows" in row for row in found["rows"])
    checks = (tmp_path / "sanitizer").read_text().splitlines()
    assert [line.split()[:4] for line in checks] == [
        ["1", "--tool", check, "--error-exitcode"] for check in ("memcheck", "racecheck")
    ]
    assert all("--report-api-errors no --kernel-regex kns=tk" in line for line in checks)
    assert all("linear_log_prob" in line for line in checks)


def test_what_there_is_no_time_for_is_cut_from_the_end(monkeypatch, tmp_path):
    clock = iter(range(0, 10_000, 100))  # a part takes 100 s
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(gpu, "built", lambda: {"cuda_built": False})
    monkeypatch.setattr(gpu, "card", dict)
    seen = []
    monkeypatch.setattr(gpu, "limited", lambda command, seconds, *args: seen.append(command) or (None, ""))
    assert gpu.main(["--device", "cpu", "--minutes", "5", "--output", str(tmp_path / "gpu.json")]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = [report[part]["outcome"] for part in gpu.LIMITS]
    assert outcomes == ["passed", "no time was left", "no time was left", "no time was left"]
    assert not seen


def test_a_part_that_hangs_is_ended_with_all_that_it_started():
    code, output = gpu.limited(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.5)
    assert code is None
    assert "begun" in output


@pytest.mark.slow
def test_a_failing_backend_is_not_timed_and_the_others_are(tmp_path):
    run = gpu.Run(SimpleNamespace(device="cpu", processes=1, seconds=0.001), tmp_path)
    line = {"test": "tests/x.py::test_backend_is_right[linear_kl-flat-cpu-cpu]", "outcome": "failed", "why": "E"}
    fake = lambda *args, **kwargs: ((tmp_path / "tests.jsonl").write_text(json.dumps(line) + "\n"), (1, ""))[1]  # noqa: E731
    gpu_limited, gpu.limited = gpu.limited, fake
    try:
        outcome = run.conformance(10)
    finally:
        gpu.limited = gpu_limited
    assert outcome.outcome == "failed"
    assert run.wrong == ["linear_kl:cpu"]
    goals = {goal.name: goal for goal in gpu_goals.goals(TINY)}
    inputs = gpu_goals.Inputs(torch.device("cpu"), TINY)
    measured = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    rows, failed = gpu_goals.timed(goals["kl_frozen"], inputs, 0.001, set(run.wrong), measured)
    assert "ours:reference" in {row["candidate"] for row in rows}
    assert next(entry for entry in failed if entry["candidate"] == "ours:cpu")["wrong"]
    rows, _ = gpu_goals.timed(goals["log_probs_only"], inputs, 0.001, set(run.wrong), measured)
    assert {"ours:cpu", "ours:reference"} <= {row["candidate"] for row in rows}


def test_goals_cover_every_op_of_the_gpu():
    on_gpus = {name for name, backends in all_ops().items() if "cuda" in {backend.name for backend in backends}}
    assert {goal.op for goal in gpu_goals.goals(TINY)} == on_gpus


def wrong_rows(backend_forward, rows):
    """A backend's forward that loses the gradient of some rows, as a wrong chunk boundary does."""

    def forward(*args):
        logp, lse, dhidden, *rest = backend_forward(*args)
        dhidden[rows] = 0
        return logp, lse, dhidden, *rest

    return forward


def test_a_lost_row_is_found_before_anything_is_timed(monkeypatch):
    inputs = gpu_goals.Inputs(torch.device("cpu"), TINY)
    call = Call((inputs.hidden, inputs.weight, inputs.target, inputs.token_weight), differentiable=(0, 1))
    assert problems(LINEAR, None, call, "reference") == []
    functions = next(b for b in all_ops()["linear_cross_entropy"] if b.name == "reference").functions
    monkeypatch.setattr(functions, "forward", wrong_rows(functions.forward, 47))
    assert any("gradient 0" in problem for problem in problems(LINEAR, None, call, "reference"))


def test_cards_that_a_module_is_for():
    assert runs_on("90", "90")
    assert runs_on("80,90,100", "89")
    assert not runs_on("90,100", "89")
    assert not runs_on("80", "75")
    assert runs_on("90-real,80-virtual", "90")
    assert runs_on("90-real,80-virtual", "120")
    assert not runs_on("90-real,80-virtual", "75")
    assert not runs_on("90-real", "89")
    assert not runs_on("90a", "90")


def test_a_module_that_the_driver_cannot_run_leaves_the_card_to_triton(monkeypatch):
    module = ModuleType("for_another_card")
    module.build_info = lambda: {"cuda_built": True, "cuda_archs": "90"}
    module.cuda_problem = lambda: "no kernel image"
    monkeypatch.setattr("trace_kernels.runtime.native._load", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = cuda_unavailable()
    assert "built for sm_90" in reason
    assert "no kernel image" in reason
    assert all(op.why_not("cuda") == reason for name, op in all_ops().items() if "cuda" in {b.name for b in op})


def test_large_logits_need_no_head(monkeypatch):
    """As wide as it is high, it would not fit into the memory of any machine."""
    largest, randn = [], torch.randn

    def recorded(*args, **kwargs):
        made = randn(*args, **kwargs)
        largest.append(made.numel())
        return made

    monkeypatch.setattr(torch, "randn", recorded)
    case = next(case for case in discover()["cross_entropy"].cases if case.name == "tail_bf16")
    case.call()
    assert max(largest) == case.sizes["T"] * case.sizes["V"]
