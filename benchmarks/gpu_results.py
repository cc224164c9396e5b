"""A pytest plugin that writes each test's outcome at once, so that a run that is cut off has told what it found.

pytest -p benchmarks.gpu_results, with the file's path in TRACE_KERNELS_TEST_RESULTS
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "TRACE_KERNELS_TEST_RESULTS"


class Results:
    def __init__(self, path: Path) -> None:
        self.file = path.open("a", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        lines = "" if report.passed else str(report.longrepr).strip()[-2000:]
        self.file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome, "why": lines}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    # Workers of xdist report to the process that started them.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Path(os.environ[VARIABLE])))
