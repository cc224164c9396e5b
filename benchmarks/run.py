"""Times ops against their peers and writes rows.

    python -m benchmarks.run --op linear_cross_entropy --backend all --peer all
    python -m benchmarks.run --op all --case small --seconds 1

A backend that fails one of its conformance cases is not timed: a wrong result has no speed. Candidates take turns in
each round with a cold cache; the ratio column is the median over rounds of peer / ours. Rows go to
benchmarks/results/local/<op>.csv with a plot beside them; committed results lie in benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import describe
from benchmarks.timing import Timing, interleave, median_ratio, peak_memory
from trace_kernels.runtime.backends import BACKENDS, BackendError, all_ops
from trace_kernels.testing.cases import Case, OpCases
from trace_kernels.testing.conformance import discover, errors, execute, prepare

RESULTS = Path(__file__).parent / "results" / "local"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = sorted(discover())
    parser.add_argument("--op", required=True, choices=["all", *ops])
    parser.add_argument("--backend", default="all", choices=["all", *BACKENDS])
    parser.add_argument("--peer", default="all", help="all, none, or a peer's name")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="about this long for each candidate of a case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def gate(op: OpCases, backend: str, device: str) -> str | None:
    """Why `backend` must not be timed, or None: every conformance case that it accepts has to be right."""
    for case in op.cases:
        if case.benchmark:
            continue
        try:
            problems = errors(op, case, backend, device)
        except BackendError:
            continue
        if problems:
            return f"case {case.name}: {problems[0]}"
    return None


def candidates(
    op: OpCases, case: Case, options: argparse.Namespace, gates: dict[str, str | None]
) -> dict[str, Callable]:
    """What is timed on a case, by name: our backends that pass the gate and accept the call, then the peers."""
    name = op.function.__name__
    found: dict[str, Callable[[], object]] = {}
    call = prepare(case.call(options.device))
    for backend in all_ops()[name]:
        if options.backend not in ("all", backend.name) or gates.get(backend.name):
            continue
        try:
            execute(op.function, call, backend=backend.name)
        except BackendError as error:
            print(f"  {case.name}: {backend.name} refuses: {error}")
            continue
        found[f"ours:{backend.name}"] = lambda b=backend.name: execute(op.function, call, backend=b)
    for peer, function in {"eager": op.eager, **op.peers}.items():
        if options.peer not in ("all", peer):
            continue
        try:
            execute(function, call)
        except (ImportError, NotImplementedError) as error:
            print(f"  {case.name}: peer {peer} is absent: {error}")
            continue
        found[f"peer:{peer}"] = lambda f=function: execute(f, call)
    return found


def rows_of(op: OpCases, case: Case, timings: dict[str, Timing], memory: dict[str, int | None]) -> list[dict]:
    """One row a candidate."""
    traffic = op.traffic(case)
    ours = next((timing for name, timing in timings.items() if name.startswith("ours:")), None)
    rows = []
    for name, timing in timings.items():
        seconds = timing.median / 1e3
        rows.append(
            {
                "op": op.function.__name__,
                "case": case.name,
                "shape": " ".join(f"{letter}={size}" for letter, size in case.sizes.items()),
                "dtype": str(case.dtype).removeprefix("torch."),
                "candidate": name,
                "p20_ms": f"{timing.percentile(0.2):.4f}",
                "p50_ms": f"{timing.median:.4f}",
                "p80_ms": f"{timing.percentile(0.8):.4f}",
                "rounds": len(timing.samples),
                "ratio_to_ours": f"{median_ratio(ours, timing):.3f}" if ours else "",
                "floor_bytes": f"{traffic.bytes:.0f}",
                "floor_flops": f"{traffic.flops:.0f}",
                "GB_per_s": f"{traffic.bytes / seconds / 1e9:.2f}",
                "GFLOP_per_s": f"{traffic.flops / seconds / 1e9:.2f}",
                "peak_bytes": "" if memory[name] is None else memory[name],
            }
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    ops = discover()
    machine = describe(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    failed = False
    for name in sorted(ops) if options.op == "all" else [options.op]:
        op = ops[name]
        wanted = [b.name for b in all_ops()[name] if options.backend in ("all", b.name) and b.unavailable() is None]
        gates = {b: gate(op, b, options.device) for b in tqdm(wanted, desc=f"{name}: conformance", leave=False)}
        for backend, reason in gates.items():
            if reason is not None:
                failed = True
                print(f"{name}: {backend} is NOT timed, it is wrong: {reason}")
        rows: list[dict] = []
        chosen = [case for case in op.cases if case.benchmark and options.case in case.name]
        if not chosen:
            print(f"{name}: no benchmark case has {options.case!r} in its name")
        for case in tqdm(chosen, desc=name, leave=False):
            found = candidates(op, case, options, gates)
            if not found:
                continue
            memory = {candidate: peak_memory(function, device) for candidate, function in found.items()}
            timings = interleave(found, device, seconds=options.seconds)
            rows += [{**machine, **row} for row in rows_of(op, case, timings, memory)]
            print_rows(rows[-len(found) :])
        if rows:
            write(rows, options.output, name)
    return 1 if failed else 0


def print_rows(rows: list[dict]) -> None:
    print(f"\n{rows[0]['op']} {rows[0]['case']}: {rows[0]['shape']} {rows[0]['dtype']} (forward, and backward if any)")
    for row in rows:
        peak = f"{int(row['peak_bytes']) / 2**20:9.1f} MiB" if row["peak_bytes"] != "" else ""
        time = f"p50 {float(row['p50_ms']):10.3f} ms"
        print(f"  {row['candidate']:<22} {time}   over ours {row['ratio_to_ours']:>8}   {peak}")


def write(rows: list[dict], folder: Path, name: str) -> None:
    """Append the rows to <op>.csv under a temporary name first, and draw the plot of this run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    earlier = list(csv.DictReader(path.open())) if path.exists() else []
    temporary = path.with_suffix(".csv.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in earlier if row.keys() == rows[0].keys())
        writer.writerows(rows)
    os.replace(temporary, path)
    plot(rows, folder / f"{name}.png")
    print(f"\nwrote {path} and {path.with_suffix('.png')}")


def plot(rows: list[dict], path: Path) -> None:
    """Median times of every candidate, a group of bars for each case, with the 20th to 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure, axes = plt.subplots(figsize=(max(6, 1.2 * len(cases) * max(1, len(names) / 3)), 4), layout="constrained")
    for position, name in enumerate(names):
        mine = {row["case"]: row for row in rows if row["candidate"] == name}
        at = [i + (position - (len(names) - 1) / 2) * 0.8 / len(names) for i, case in enumerate(cases) if case in mine]
        middle = [float(mine[case]["p50_ms"]) for case in cases if case in mine]
        low = [m - float(mine[case]["p20_ms"]) for m, case in zip(middle, [c for c in cases if c in mine], strict=True)]
        high = [float(mine[c]["p80_ms"]) - m for m, c in zip(middle, [c for c in cases if c in mine], strict=True)]
        axes.bar(at, middle, 0.8 / len(names), yerr=[low, high], label=name, capsize=2)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds (log scale)")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
    axes.set_title(f"{rows[0]['op']} on {rows[0]['device']}", fontsize=9)
    axes.legend(fontsize=8)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
