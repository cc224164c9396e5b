"""The compiled module: loading it, why it is absent, and the threads it runs on.

Everything that knows torch stays in Python: shapes, dtypes, devices and lifetimes are checked before an address
leaves it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from types import ModuleType

import torch

#: Codes of the element types (csrc/common/tile_kernels.h, csrc/common/cuda.cuh).
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        from trace_kernels import _native  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the compiled module does not load ({error}): reinstall with 'pip install .'"
    # Share torch's own thread pool instead of bringing a second OpenMP runtime into the process.
    for path in _openmp_libraries():
        if _native.use_openmp_runtime(path):
            break
    return _native, ""


def _openmp_libraries() -> list[str]:
    """Paths of the OpenMP runtimes loaded by this process, torch's own first."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    pattern = re.compile(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$")
    paths = {match[1] for line in maps.read_text().splitlines() if (match := pattern.search(line))}
    return sorted(paths, key=lambda path: ("/torch" not in path, path))


def native() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it was not built, or does not load here.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def cpu_unavailable(*functions: str) -> str | None:
    """Why the C++ kernels `functions` cannot run here, or None when they can."""
    module, reason = _load()
    return reason if module is None else _lacks(module, functions)


@functools.cache
def _lacks(module: ModuleType, functions: tuple[str, ...]) -> str | None:
    lacking = [name for name in functions if not hasattr(module, name)]
    if lacking:
        return f"the compiled module lacks {', '.join(lacking)}, it is an older one: reinstall with 'pip install .'"
    return None


def cuda_unavailable() -> str | None:
    """Why no compiled CUDA kernel can run here, or None when they can."""
    module, reason = _load()
    return reason if module is None else _cuda_problem(module)


@functools.cache
def _cuda_problem(module: ModuleType) -> str | None:
    """Asked once: what the module was built for, and whether card and driver run it, by the CUDA runtime's word."""
    info = module.build_info()
    if not info["cuda_built"]:
        return f"built without CUDA: {info['cuda_absent_because']}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    problem = module.cuda_problem() if hasattr(module, "cuda_problem") else ""
    return f"its kernels, built for sm_{info['cuda_archs']}, do not run on this device: {problem}" if problem else None


def runs_on(archs: str, capability: str) -> bool:
    """Whether one of the compiled `archs` ("80,90-real") is for a card of `capability` ("89"): same major version.

    "80-virtual" is code that the driver compiles, for any card from 80 on.
    """
    major, minor = int(capability[:-1]), int(capability[-1])
    for arch in re.split("[,;]", archs):
        match = re.fullmatch(r"(\d+)(\d)(-real|-virtual)?", arch)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        if built <= (major, minor) and (built[0] == major or match[3] == "-virtual"):
            return True
    return False


def num_threads() -> int:
    """Threads a kernel may use: what `torch.set_num_threads` says."""
    return torch.get_num_threads()


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0, which kernels read as 'absent', for None."""
    return 0 if tensor is None else tensor.data_ptr()


def use_large_pages(fresh: torch.Tensor) -> None:
    """Asks for large pages behind a large CPU tensor that was not written yet.

    Faulting in small ones takes longer than writing them.
    """
    module, _ = _load()
    if (
        module is not None
        and hasattr(module, "use_large_pages")
        and fresh.device.type == "cpu"
        and fresh.nbytes >= 2**23
    ):
        module.use_large_pages(fresh.data_ptr(), fresh.nbytes)


def release_workspace() -> None:
    """Returns to the system what calls on the CPU keep for the next ones: scratch memory, a head's freed gradient.

    Example:
        >>> release_workspace()
    """
    module, _ = _load()
    if module is not None and hasattr(module, "release_workspace"):
        module.release_workspace()


def empty_gradient(weight: torch.Tensor) -> torch.Tensor:
    """Uninitialised memory for the gradient of a weight on the CPU, contiguous.

    Large ones come from the gradient of the same size that was freed last, which the compiled module keeps: a fresh
    mapping costs the time to zero it, or more.
    """
    module, _ = _load()
    if module is None or not hasattr(module, "GradientMemory") or weight.nbytes < 2**23:
        return weight.new_empty(weight.shape)
    return torch.frombuffer(module.GradientMemory(weight.nbytes), dtype=weight.dtype).view(weight.shape)
