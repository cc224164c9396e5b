"""What the build decides by itself."""

import importlib.util
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a source tree")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("trace_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("TRACE_KERNELS_CUDA_ARCHS", raising=False)
    return module


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ("9.0\n9.0", "90-real"),
        ("12.0\n8.9", "89-real;120-real"),
        ("7.5", "90-real;80-virtual"),
        ("", "90-real;80-virtual"),
    ],
)
def test_architectures_of_the_cards_that_are_there(cards, expected, build, monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nprintf '{cards}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert build.archs() == expected


def test_architectures_on_request(build, monkeypatch):
    monkeypatch.setenv("TRACE_KERNELS_CUDA_ARCHS", "all")
    assert build.archs() == "80;90;100"
    monkeypatch.setenv("TRACE_KERNELS_CUDA_ARCHS", "86,90")
    assert build.archs() == "86;90"


def test_no_driver_is_no_card(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.archs() == "90-real;80-virtual"


def test_a_module_is_kept_by_what_it_is_made_of(build, monkeypatch, tmp_path):
    same = build.key()
    assert build.key() == same
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert build.key() != same
    monkeypatch.delenv("CXXFLAGS")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.key() != same


def test_the_oldest_modules_go(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "KEPT", 2)
    made = tmp_path / "made.so"
    made.write_bytes(b"module")
    for name in "abc":
        build.keep(made, tmp_path / "cache" / f"{name}.so")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    build.keep(made, made / "no folder" / "d.so")  # a place that cannot be written is none
