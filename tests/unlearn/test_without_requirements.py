"""What a user reads who installed the package without [train]."""

import subprocess
import sys

import pytest

HIDE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{then}
"""
LINE = "pip install '.[train]' in the folder of trace-kernels"


def run(hidden, then):
    command = [sys.executable, "-c", HIDE.format(hidden=hidden, then=then)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("hidden", ["transformers", "datasets", "jsonargparse"])
def test_a_verb_names_the_install_line(hidden):
    done = run([hidden], "from trace_unlearn.verbs.cli import main; sys.exit(main(['profile', '--model', 'm']))")
    assert done.returncode == 2
    assert f"needs the package {hidden}" in done.stderr
    assert LINE in done.stderr
    assert "Traceback" not in done.stderr


def test_an_import_names_the_install_line():
    done = run(["transformers"], "from trace_unlearn import TraceTrainer")
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: trace_unlearn.TraceTrainer needs the package")
    assert LINE in done.stderr


def test_help_needs_nothing():
    hidden = ["torch", "transformers", "datasets", "jsonargparse", "numpy"]
    assert run(hidden, "from trace_unlearn.verbs.cli import main; sys.exit(main(['--help']))").returncode == 0
