import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trace_unlearn import files
from trace_unlearn.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip_of_what_a_run_records(tmp_path):
    @dataclasses.dataclass
    class Choice:
        rule: str
        cap: float

    files.write_json(
        tmp_path / "a.json",
        {
            "choice": Choice("balance", 20.0),
            "path": tmp_path,
            "tensor": torch.tensor([[1, 2]]),
            "numpy": np.float32(0.5),
            "dtype": torch.bfloat16,
            "infinite": [float("inf"), float("nan")],
            "none": None,
            "true": True,
            "text": "Zürich ∞",
        },
    )
    assert files.read_json(tmp_path / "a.json") == {
        "choice": {"rule": "balance", "cap": 20.0},
        "path": str(tmp_path),
        "tensor": [[1, 2]],
        "numpy": 0.5,
        "dtype": "bfloat16",
        "infinite": [None, None],
        "none": None,
        "true": True,
        "text": "Zürich ∞",
    }
    assert "Zürich" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert names(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "metrics.json"
    files.write_json(target, {"version": 1})
    with pytest.raises(TypeError, match="object"):
        files.write_json(target, {"version": object()})

    def interrupt():
        with files.staged_file(target) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert files.read_json(target) == {"version": 1}
    assert names(tmp_path) == ["metrics.json"]


def test_whoever_has_the_old_file_open_keeps_reading_it_whole(tmp_path):
    files.write_text(tmp_path / "a", "old" * 100_000)
    with (tmp_path / "a").open() as reader:
        start = reader.read(10)
        files.write_text(tmp_path / "a", "new")
        assert start + reader.read() == "old" * 100_000


@pytest.mark.parametrize("what", ["file", "folder"])
def test_kill_9_in_the_middle_leaves_the_old_state_and_the_next_writer_cleans_up(tmp_path, what):
    target = tmp_path / "run"
    if what == "file":
        files.write_text(target, "old")
    code = f"""
import os, signal
from trace_unlearn import files
with files.staged_{what}({str(target)!r}) as temporary:
    part = temporary if {what == "file"} else temporary / "part"
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len([name for name in names(tmp_path) if name.endswith(".partial")]) == 1
    if what == "file":
        assert target.read_text() == "old"
        files.write_text(target, "new")
        assert target.read_text() == "new"
    else:
        assert not target.exists()
        with files.staged_folder(target) as temporary:
            (temporary / "part").write_text("whole")
        assert (target / "part").read_text() == "whole"
    assert names(tmp_path) == ["run"]


def test_a_living_writer_of_the_same_path_is_left_alone(tmp_path):
    target = tmp_path / "run.json"
    with files.staged_file(target) as temporary:
        temporary.write_text("slow")
        files.write_text(target, "fast")
        assert temporary.exists()
    assert target.read_text() == "slow"


def test_staged_folder_refuses_what_is_there_before_and_after(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model: the folder exists and is not empty"), files.staged_folder(target):
        pytest.fail("must refuse before the work")
    other = tmp_path / "other"

    def race():
        with files.staged_folder(other) as temporary:
            (temporary / "a").write_text("mine")
            other.mkdir()
            (other / "b").write_text("theirs")

    with pytest.raises(UserError, match="not empty"):
        race()
    assert names(other) == ["b"]
    assert names(tmp_path) == ["model", "other"]


def test_staged_folder_takes_an_empty_folder_and_keeps_the_umask(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    old = os.umask(0o022)
    try:
        with files.staged_folder(target) as temporary:
            files.write_text(temporary / "deep" / "a.txt", "x")
    finally:
        os.umask(old)
    assert (target / "deep" / "a.txt").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert (target / "deep" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_refuse_existing(tmp_path):
    files.refuse_existing(tmp_path / "absent")
    files.refuse_existing(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"{name}: exists already"):
            files.refuse_existing(tmp_path / name)


def test_tensors_round_trip(tmp_path):
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    tensors = {"transposed": base.t(), "view": base[:, :2], "empty": torch.empty(0, 3, dtype=torch.int64)}
    files.save_tensors(tmp_path / "t.safetensors", tensors, {"rule": "balance"})
    loaded = files.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{\n  "a": 1,\n}', r"bad\.json: line 3, column 1: not valid JSON"),
        (b"\xff\xfe\x00", r"bad\.json: not UTF-8 text"),
        (b"", r"bad\.json: line 1, column 1"),
    ],
)
def test_bad_json_is_located(tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_json(tmp_path / "bad.json")


def test_missing_corrupt_and_impossible_paths(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: cannot read it: No such file"):
        files.read_json(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"absent\.safetensors: cannot read it: No such file"):
        files.load_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="is a directory"):
        files.load_tensors(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match=r"cut\.safetensors: not a readable safetensors file"):
        files.load_tensors(tmp_path / "cut.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write it"):
        files.write_json(tmp_path / "file" / "below.json", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="a folder of this name is in the way"):
        files.write_json(tmp_path / "folder", 1)
    assert names(tmp_path) == ["cut.safetensors", "file", "folder"]


def test_written_json_is_json_for_everyone(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": float("inf")})
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda constant: pytest.fail(constant))


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.write_json("metrics.json", [1])
    with files.staged_folder("run") as temporary:
        files.write_text(temporary / "a", "a")
    assert files.read_json(Path("metrics.json")) == [1]
    assert names(tmp_path) == ["metrics.json", "run"]
