"""Compiles every launch of an op for each architecture and prints what each kernel takes, one JSON object a line.

Usage: compile_kernels.py OP CAPABILITY... Runs in a process of its own, because Triton does not compile under
TRITON_INTERPRET=1.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from launches import specialised, unique_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def tool(name, *args):
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def compile_launch(launch, capability):
    signature, constants, attributes = specialised(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return {
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "types": {name: kind for name, kind in signature.items() if kind.startswith("*")},
        "constants": launch.constants,
        "aligned": [launch.kernel.arg_names[position] for (position,) in attributes],
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "local": numbers.get("LOCAL", 0),
        "shared": compiled.metadata.shared,
        "warps": launch.options["num_warps"],
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E(?:\.\w+)*\.128\b", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", sass)),
        "loads": len(re.findall(r"\bLDG\.", sass)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    }


def main():
    op, *capabilities = sys.argv[1:]
    for launch in unique_launches(op):
        for capability in capabilities:
            print(json.dumps(compile_launch(launch, int(capability))), flush=True)


if __name__ == "__main__":
    main()
