"""The folder for Hugging Face's `kernels`: loaded by it where it is installed, and by Python's own import elsewhere."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trace_kernels as tk

TOOL = Path(__file__).parents[2] / "tools" / "hub_kernel.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    made = subprocess.run([sys.executable, TOOL, folder], check=True, capture_output=True, text=True)
    return folder, made.stdout.strip()


def loaded_by_python(folder):
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded_by_kernels(folder):
    return pytest.importorskip("kernels").get_local_kernel(folder)


@pytest.mark.parametrize("load", [loaded_by_python, loaded_by_kernels])
def test_it_computes_the_same_beside_the_installed_package(built, load):
    folder, namespace = built
    module = load(folder)
    assert module.linear_cross_entropy is not tk.linear_cross_entropy
    assert hasattr(getattr(torch.ops, namespace), "linear_log_prob_sum")
    assert not [name for name in sys.modules if name.startswith("trace_kernels.") and namespace in name]
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    target, token_weight = torch.tensor([1, 2, -100, 4, 10]), torch.rand(5)
    found = []
    for package in (module, tk):
        leaf = hidden.clone().requires_grad_()
        loss = package.linear_cross_entropy(leaf, weight, target, token_weight, backend="reference")
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *found))
    with pytest.raises(module.BackendError, match="cpu"):
        module.linear_cross_entropy(hidden, weight, target, backend="cpu")
    assert set(module.__all__) == set(tk.__all__)


def test_no_file_imports_the_installed_package(built):
    for path in built[0].rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("from trace", "import trace"))]
        assert lines == [], path


def test_a_folder_that_exists_is_left_alone(built):
    again = subprocess.run([sys.executable, TOOL, built[0]], capture_output=True, text=True)
    assert again.returncode != 0
    assert "exists already" in again.stderr
