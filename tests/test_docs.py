"""The examples in docstrings and in the Markdown pages run, and the names of the contract exist."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import trace_kernels
import trace_unlearn
from benchmarks import figures
from trace_unlearn.training.objectives import OBJECTIVES
from trace_unlearn.verbs import options_page

ROOT = Path(__file__).parent.parent


def modules():
    for package in (trace_kernels, trace_unlearn):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            # Triton kernels exist only where triton is installed, and lm-eval's model where lm-eval is; the compiled
            # module has no docstrings.
            if re.search(r"__main__|\._native|triton", found.name):
                continue
            if not found.name.endswith(".fused_lm") or importlib.util.find_spec("lm_eval") is not None:
                yield found.name


@pytest.mark.parametrize("name", list(modules()))
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", trace_kernels.__all__)
def test_every_public_op_has_an_example(name):
    value = getattr(trace_kernels, name)
    if inspect.isfunction(value):
        assert ">>> " in (inspect.getdoc(value) or "")


PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backends = trace_kernels.runtime.backends
    monkeypatch.setattr(backends, "_OPS", dict(backends._OPS))  # a page may define an op
    names = {"__name__": page.stem}
    # A block that needs a large model or a file of the reader's is marked ```python no-run and only has to compile.
    for marker, block in re.findall(r"^```python([^\n]*)\n(.*?)^```", page.read_text(), re.M | re.S):
        code = compile(block, str(page), "exec")
        if "no-run" not in marker:
            exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_objective_has_a_row_in_its_page():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "objectives.md").read_text(), re.M)
    assert set(OBJECTIVES) <= set(rows)


def test_the_options_page_is_the_code_s():
    assert (ROOT / "docs" / "options.md").read_text() == options_page.page()


def test_the_readme_quotes_the_minimal_example():
    example = (ROOT / "examples" / "minimal_trace.py").read_text().split("\n\nif __name__")[0].rstrip()
    assert f"```python\n{example}\n```" in (ROOT / "README.md").read_text()


def test_figures_are_the_committed_ones():
    for path, block in figures.blocks().items():
        page = path.read_text()
        assert figures.insert(page, block) == page
