"""Tasks for the tests of the demo's workers, in a module that a fresh process imports quickly."""

import time

from trace_unlearn.errors import UserError


def note(path, text, progress):
    progress(1, 2)
    with open(path, "a") as file:
        file.write(text)


def fail(progress):
    raise ValueError("as it should")


def sleep(path, progress):
    path.write_text("begun")
    progress(0, 1)
    time.sleep(60)


def mistake(progress):
    raise UserError("disk full")
