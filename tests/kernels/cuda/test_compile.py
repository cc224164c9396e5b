"""Every CUDA kernel compiled by nvcc for sm_80, sm_90 and sm_100, without a GPU.

No kernel spills, as many blocks of each fit on a processor as limits.json asks for, and memory is read and written 16
bytes at a time where the speed rests on it. In limits.json, "instances" and the keys of "blocks" are patterns of the
mangled names of such instances of the template.
This says nothing about results (test_emulation.py does) and is no measurement on a GPU.
"""

import concurrent.futures
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from occupancy import Usage

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
LIMITS = json.loads((HERE / "limits.json").read_text())
CAPABILITIES = (80, 90, 100)
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", f"-I{CSRC}"]


def cuobjdump():
    """NVIDIA's tool: from the CUDA toolkit, or from Triton's wheel."""
    if (path := shutil.which("cuobjdump")) is not None:
        return path
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(path) if path is not None and path.exists() else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither in the CUDA toolkit nor in a triton wheel"),
]


def kernels_of(source, capability, folder):
    """What each kernel of a file takes on an architecture."""
    cubin = folder / f"{source.parent.name}-{source.stem}-{capability}.cubin"
    command = ["nvcc", *FLAGS, "-cubin", f"-arch=sm_{capability}", "-o", str(cubin), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
    usage = subprocess.run([cuobjdump(), "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))
    elf = subprocess.run([cuobjdump(), "-elf", cubin], capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^\.nv\.info\.(\S+)$", elf, flags=re.MULTILINE)
    threads = {
        name: int(match[1], 16)
        for name, attributes in zip(parts[::2], parts[1::2], strict=True)
        if (match := re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+)", attributes))
    }
    found = []
    for name, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        found.append(
            {
                "op": source.parent.name,
                "kernel": next((k for k in LIMITS[source.parent.name] if f"{len(k)}{k}" in name), name),
                "name": f"{name} sm_{capability}",
                "capability": capability,
                "spilled": numbers["STACK"] + numbers["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", code[name])),
                # On sm_90 and later 1 KiB of it is the runtime's own, where there is any.
                "usage": Usage(
                    threads[name], numbers["REG"], max(0, numbers["SHARED"] - (1024 if capability >= 90 else 0))
                ),
                "loads": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", code[name])),
                "stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", code[name])),
            }
        )
    return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(source, c, folder) for source in sorted(CSRC.glob("ops/*/*.cu")) for c in CAPABILITIES]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(lambda job: kernels_of(*job), jobs) for kernel in found]


def test_every_kernel_is_compiled_for_every_architecture(kernels):
    expected = {(op, name, c) for op, limits in LIMITS.items() for name in limits for c in CAPABILITIES}
    assert {(kernel["op"], kernel["kernel"], kernel["capability"]) for kernel in kernels} == expected


def test_nothing_spills(kernels):
    assert [kernel["name"] for kernel in kernels if kernel["spilled"]] == []


def least(kernel):
    """The blocks that have to fit: the first that applies, where they depend on the instance of the template."""
    blocks = LIMITS[kernel["op"]][kernel["kernel"]]["blocks"]
    if isinstance(blocks, dict):
        blocks = next(number for instances, number in blocks.items() if re.search(instances, kernel["name"]))
    return blocks


def test_enough_blocks_fit_on_a_processor(kernels):
    few = [
        f"{kernel['name']}: {kernel['usage']}, {kernel['usage'].blocks(kernel['capability'])} of {least(kernel)} blocks"
        for kernel in kernels
        if kernel["usage"].blocks(kernel["capability"]) < least(kernel)
    ]
    assert few == []


def test_memory_is_read_and_written_in_16_bytes(kernels):
    checked, narrow = set(), []
    for kernel in kernels:
        wide = LIMITS[kernel["op"]][kernel["kernel"]].get("wide")
        if wide is None or re.search(wide["instances"], kernel["name"]) is None:
            continue
        checked.add((kernel["op"], kernel["kernel"]))
        if kernel["loads"] < wide["loads"] or kernel["stores"] < wide.get("stores", 0):
            narrow.append(f"{kernel['name']}: {kernel['loads']} loads, {kernel['stores']} stores")
    assert narrow == []
    assert checked == {(op, k) for op, limits in LIMITS.items() for k, limit in limits.items() if "wide" in limit}
