"""What `pip install` builds from, and what a packager runs the tests from, is all there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_tracked_file_is_in_it(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode or not tracked.stdout:
        pytest.skip("not a git checkout")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (listed,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    missing = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - {
        *listed.read_text().split("\n")
    }
    assert not {name for name in missing if not name.startswith(".")}
