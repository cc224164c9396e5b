"""The rooms of both packages: which may import which. An import in a function or for types alone counts too."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = {"trace_unlearn": ROOT / "python" / "trace_unlearn", "trace_kernels": ROOT / "trace_kernels"}
# From the ground up: a room imports itself and the rooms before it. "" are the files beside the rooms.
ORDER = {
    "trace_unlearn": (
        "",
        "sources",
        "routing",
        "calibration",
        "fusion",
        "training",  # up to here is the method, without a file or a command line of its own
        "evaluation",
        "reporting",
        "integrations",
        "verbs",
        "demo",
    ),
    "trace_kernels": ("", "runtime", "shared", "testing", "ops"),
}
GATES = {"trace_unlearn", "trace_unlearn.__main__", "trace_kernels", "trace_kernels.__main__"}  # they open all rooms
DISCOVERS = "trace_kernels.testing.conformance"  # finds the cases of every op by walking their folder
#: What an op still takes from another; the list may only get shorter.
BETWEEN_OPS = {"router_topk.op": {"record_routing.op"}}


def files(package: str) -> dict[str, Path]:
    """Every module of a package by its full name."""
    names = {}
    for path in sorted(PLACES[package].rglob("*.py")):
        parts = (package, *path.relative_to(PLACES[package]).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = files("trace_unlearn") | files("trace_kernels")


def imports(name: str) -> set[str]:
    """What a module imports, as modules where they are ours and as names of packages where they are not."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {item if item in MODULES else node.module for item in whole}
    return found - {name}


def room(name: str) -> str:
    package, *rest = name.split(".")
    return rest[0] if rest and (PLACES[package] / rest[0]).is_dir() else ""


def ours(name: str) -> set[str]:
    return {item for item in imports(name) if item in MODULES}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - GATES))
def test_a_room_imports_itself_and_the_rooms_before_it(name):
    package = name.split(".")[0]
    order = ORDER[package]
    allowed = order[: order.index(room(name)) + 1]
    below = [item for item in ours(name) if item.startswith(f"{package}.") and room(item) not in allowed]
    assert below == (["trace_kernels.ops"] if name == DISCOVERS else [])
    beyond = [item for item in ours(name) if not item.startswith(package)]
    assert beyond in ([], ["trace_kernels"]), "the trainer uses public names of the kernels, which know no trainer"
    assert package == "trace_unlearn" or beyond == []


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("trace_kernels.ops.")))
def test_no_op_imports_another(name):
    op = name.split(".")[2]
    inside = (item.removeprefix("trace_kernels.ops.") for item in ours(name) if item.startswith("trace_kernels.ops."))
    others = {item for item in inside if item.split(".")[0] != op}
    assert others <= BETWEEN_OPS.get(name.removeprefix("trace_kernels.ops."), set())


def test_only_pages_draw_and_only_verbs_parse():
    for package, only in (("matplotlib", "reporting"), ("jsonargparse", "verbs")):
        users = {room(name) for name in MODULES if any(item.split(".")[0] == package for item in imports(name))}
        assert users == {only}


def test_no_file_imports_itself_by_way_of_others():
    graph = {name: ours(name) - GATES for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_every_room_says_what_it_holds_and_what_it_may_import():
    for package, order in ORDER.items():
        for name in order[1:]:
            says = ast.get_docstring(ast.parse(MODULES[f"{package}.{name}"].read_text()))
            assert "Imports " in (says or "")
