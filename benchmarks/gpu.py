"""Everything that needs a GPU, in one command: build, conformance on the device, timings, memory checker.

    tools/gpu.sh [--minutes 7] [--output FILE.json]

It takes the Python, torch and Triton that are there and needs no network. The parts run in this order, each under a
limit of its own, and each writes its result to the file at once; what `--minutes` leaves no time for is cut from the
end, and named. A backend that fails a test of an op is not timed on that op; all others are. A compiled module that
runs on this card is taken as it is: delete trace_kernels/_native*.so to build again. Exits 2, saying so, where there is
no CUDA device, and 1 when something is wrong or was not reached.

What finds which fault, as faults planted in copies of the kernels showed without a GPU:

- a dropped stride: the conformance cases that are strided, or have rows apart, and those of odd widths;
- a wrong boundary of blocks or chunks: `several_blocks_and_chunks_on_the_device` (test_device.py; with Triton's
  interpreter kernel_checks.py plants one). Conformance cases fit into one block;
- a missing barrier: racecheck, in the memory part, on the device; without one ThreadSanitizer (test_races.py). A right
  result says nothing of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_card import card
from benchmarks.gpu_results import VARIABLE
from benchmarks.machine import ROOT, describe
from trace_kernels.runtime.backends import BACKENDS, all_ops
from trace_kernels.runtime.native import runs_on

RESULTS = Path(__file__).parent / "results" / "local"
#: Seconds that a part gets at the most, of so many minutes; of more minutes, as much more.
MINUTES = 7.0
LIMITS = {"build": 240.0, "conformance": 200.0, "timings": 240.0, "memory": 120.0}
#: What the memory checker looks at: each kernel once or twice, several blocks among them.
MEMORY_CASES = (
    "linear_cross_entropy-full_fp32_mean",
    "linear_cross_entropy-tiles_bf16",
    "linear_log_prob-full_bf16",
    "linear_log_prob-tiles_bf16",
    "linear_kl-full_bf16_sum",
    "router_topk-deepseek_v3",
    "record_routing_-full",
    "cross_entropy-tail_bf16",
)


@dataclass
class Outcome:
    """How a part ended: passed, failed, absent, or "cut off" by its limit; and what it found."""

    outcome: str
    found: object = None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--seconds", type=float, default=0.3, help="about this long for each candidate of a timing")
    parser.add_argument("--processes", type=int, default=8, help="that run the tests")
    # On a CPU the same steps with tiny sizes, which measure nothing: for the test of this command.
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch sees no CUDA device, so nothing was run and nothing was measured", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    report: dict = {"card": card(), "machine": describe(torch.device(options.device)), "minutes": options.minutes}
    print(json.dumps({**report["card"], **report["machine"]}, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(options, Path(scratch))
        for name, limit in LIMITS.items():
            left = min(max(limit, limit * options.minutes / MINUTES), end - time.monotonic())
            begin = time.monotonic()
            outcome = getattr(run, name)(left) if left >= 1 else Outcome("no time was left")
            report[name] = {
                "outcome": outcome.outcome,
                "seconds": round(time.monotonic() - begin, 1),
                "found": outcome.found,
            }
            write(options.output, report)
            print(f"{name}: {outcome.outcome} after {report[name]['seconds']} s", flush=True)
    report["card after"] = card()
    write(options.output, report)
    for failure in (report["conformance"]["found"] or {}).get("failed", []):
        print(f"FAILED {failure['test']}: {failure['why'].splitlines()[-1] if failure['why'] else ''}")
    table((report["timings"]["found"] or {}).get("rows", []))
    print(f"wrote {options.output}")
    return 0 if all(report[name]["outcome"] in ("passed", "absent") for name in LIMITS) else 1


class Run:
    """The parts; each gets the seconds that it may take."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch
        self.device: str = options.device
        self.backends = ("cuda", "triton") if self.device == "cuda" else ("reference",)
        self.wrong: list[str] = []  # "op:backend" that failed a test

    def build(self, seconds: float) -> Outcome:
        """For this card only, unless a module that runs on it is there; without nvcc Triton is all there is."""
        on_gpu = self.device == "cuda"
        arch = "".join(map(str, torch.cuda.get_device_capability())) if on_gpu else ""
        if (info := built()) and (not on_gpu or (info["cuda_built"] and runs_on(info["cuda_archs"], arch))):
            return Outcome("passed", {"built before": info})
        environment = {"TRACE_KERNELS_CUDA": "off"}
        if on_gpu:
            environment = {"TRACE_KERNELS_CUDA": "auto", "TRACE_KERNELS_CUDA_ARCHS": arch}
        code, output = limited(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, environment, show=False
        )
        if code is None:
            return Outcome("cut off")
        info = built()
        if code != 0 or info is None:
            return Outcome("failed", {"output": output[-4000:]})
        return Outcome("passed" if info["cuda_built"] == on_gpu else "failed", {"built": info})

    def conformance(self, seconds: float) -> Outcome:
        """The cases on the device, single kernels, several blocks and chunks, and capture in a CUDA graph."""
        results = self.scratch / "tests.jsonl"
        tests = ["tests/kernels/test_conformance.py"]
        chosen = " or ".join(f"{backend}-{self.device}]" for backend in self.backends)
        chosen = f"right and ({chosen})"
        if self.device == "cuda":
            tests += ["tests/kernels/cuda/test_capture.py", "tests/kernels/cuda/test_device.py"]
            chosen = f"({chosen}) or capture_and_replay or on_the_device"
        else:
            chosen += " and (record_routing_ or cross_entropy-fp32)"
        command = [
            sys.executable, "-m", "pytest", *tests, "-k", chosen, "-n", str(self.options.processes),
            "-p", "no:cacheprovider", "-p", "benchmarks.gpu_results", "--tb=short",
        ]  # fmt: skip
        code, output = limited(command, seconds, {VARIABLE: str(results)})
        lines = json_lines(results)
        failed = [line for line in lines if line["outcome"] == "failed"]
        for line in failed:
            words = line["test"].rpartition("[")[2].rstrip("]").split("-")
            op = next((word for word in words if word in all_ops()), None)
            # The last word is the device, or none of the backend's.
            backend = next((word for word in reversed(words[:-1]) if word in BACKENDS), None)
            if op and backend:
                self.wrong.append(f"{op}:{backend}")
        found = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in ("passed", "skipped")} | {
            "failed": failed
        }
        if code is None:
            return Outcome("cut off", found)
        passed = code == 0 and found["passed"]
        return Outcome("passed" if passed else "failed", found if lines else {"output": output[-4000:]})

    def timings(self, seconds: float) -> Outcome:
        """In a process of its own; when another project's code ends it, a new one goes on with the next goal."""
        path = self.scratch / "timings.jsonl"
        command = [
            sys.executable, "-m", "benchmarks.gpu_goals", "--output", str(path), "--device", self.device,
            "--seconds", str(self.options.seconds), "--wrong", ",".join(sorted(set(self.wrong))),
        ]  # fmt: skip
        end = time.monotonic() + seconds
        code: int | None = 1
        for _ in range(3):
            if end - time.monotonic() < 1:
                break
            code, _ = limited(command, end - time.monotonic())
            if code in (0, None):
                break
        lines = json_lines(path)
        found = {
            "floors": next((line["floors"] for line in lines if "floors" in line), None),
            "rows": [line["row"] for line in lines if "row" in line],
            "not timed": [line["not timed"] for line in lines if "not timed" in line],
        }
        ours = [entry for entry in found["not timed"] if entry["candidate"].startswith("ours") and entry["wrong"]]
        if code is None:
            return Outcome("cut off", found)
        return Outcome("passed" if code == 0 and not ours else "failed", found)

    def memory(self, seconds: float) -> Outcome:
        """compute-sanitizer on cases of every op: torch's allocator off, or it sees one large block."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome("absent")
        # Older ones call the filter by another name.
        text = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
        kernels = "--kernel-regex" if "--kernel-regex" in text else "--filter"
        backend = self.backends[0]
        cases = " or ".join(MEMORY_CASES)
        tests = [
            "-m", "pytest", "tests/kernels/test_conformance.py",
            "-k", f"right and {backend}-{self.device}] and ({cases})", "-p", "no:cacheprovider",
        ]  # fmt: skip
        end = time.monotonic() + seconds
        found = {}
        for check in ("memcheck", "racecheck"):
            left = end - time.monotonic()
            if left < 1:
                return Outcome("cut off", found)
            command = [
                tool, "--tool", check, "--error-exitcode", "1", "--report-api-errors", "no", kernels, "kns=tk",
                sys.executable, *tests,
            ]  # fmt: skip
            code, output = limited(command, left, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            found[check] = "cut off" if code is None else "passed" if code == 0 else output[-4000:]
            if code is None:
                return Outcome("cut off", found)
        return Outcome("passed" if set(found.values()) == {"passed"} else "failed", found)


def built() -> dict | None:
    """What the compiled module in the tree says of itself, asked in another process; None where none loads."""
    code = "import json; from trace_kernels import _native; print(json.dumps(_native.build_info()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return json.loads(result.stdout) if result.returncode == 0 else None


def limited(
    command: list[str], seconds: float, environment: dict[str, str] | None = None, show: bool = True
) -> tuple[int | None, str]:
    """The exit code, None when the time was up, and the output; then all that the command started is ended too."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    if show or code not in (0, None):
        print(text[-3000:], flush=True)
    return code, text


def json_lines(path: Path) -> list[dict]:
    """What a part had written when it ended; a last line may be cut."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def write(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def table(rows: list[dict]) -> None:
    columns = ("goal", "candidate", "p50_ms", "goal_ms", "over_floor", "ratio_to_ours", "host_us", "peak_bytes")
    widths = {column: max([len(column), *(len(str(row[column])) for row in rows)]) for column in columns}
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[column]).ljust(widths[column]) for column in columns))


if __name__ == "__main__":
    sys.exit(main())
