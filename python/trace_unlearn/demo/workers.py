"""A few worker processes, one thread each, that run tasks in an order of dependence and report how far they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from trace_unlearn.errors import UserError

Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass
class Task:
    """`function(*arguments, progress)` in a worker, once the tasks named in `after` are done."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()
    cost: float = 1.0  # expected seconds; only the progress bar looks at it
    done: float = field(default=0.0, init=False)  # share


class WorkerError(RuntimeError):
    """A task failed; the message has the worker's traceback."""


def run_tasks(tasks: Sequence[Task], workers: int, on_progress: Callable[[Sequence[Task], set[str]], None]) -> None:
    """Run all tasks; `on_progress` gets the tasks and the names of those at work, whenever something moved.

    Tasks in `after` that are not among `tasks` count as done. Leaving early, by an error or Ctrl-C, ends the workers.

    Raises:
        UserError: a task raised it.
        WorkerError: a task raised anything else, or its worker died.
    """
    names = {task.name for task in tasks}
    waiting = list(tasks)
    finished: set[str] = set()
    if not waiting:
        return
    with _started(min(workers, len(tasks))) as idle:
        at_work: dict[Connection, Task] = {}
        while waiting or at_work:
            for task in [task for task in waiting if all(n in finished or n not in names for n in task.after)]:
                if not idle:
                    break
                waiting.remove(task)
                connection = idle.pop()
                connection.send((task.function, task.arguments))
                at_work[connection] = task
            for ready in wait(list(at_work)):
                assert isinstance(ready, Connection)
                task = at_work[ready]
                try:
                    kind, value = ready.recv()
                except EOFError:
                    raise WorkerError(f"{task.name}: its worker process died") from None
                if kind == "mistake":
                    raise UserError(value)
                if kind == "error":
                    raise WorkerError(f"{task.name} failed:\n{value}")
                task.done = value if kind == "progress" else 1.0
                if kind == "done":
                    finished.add(task.name)
                    idle.append(ready)
                    del at_work[ready]
            on_progress(tasks, {task.name for task in at_work.values()})


class TaskBar:
    """A progress bar over all tasks, in expected seconds, that names what is at work."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=sum(task.cost for task in tasks),
            bar_format="{percentage:3.0f}% |{bar:24}| {elapsed} (about {remaining} left) {desc}",
            disable=not tasks,
            mininterval=0.2 if sys.stderr.isatty() else 15,
        )

    def __enter__(self) -> Callable[[Sequence[Task], set[str]], None]:
        return self._update

    def __exit__(self, *error: object) -> None:
        self._bar.set_description_str("", refresh=False)
        self._bar.close()

    def _update(self, tasks: Sequence[Task], at_work: set[str]) -> None:
        self._bar.set_description_str(" · ".join(sorted(at_work)), refresh=False)
        self._bar.update(sum(task.cost * task.done for task in tasks) - self._bar.n)


@contextmanager
def _started(count: int) -> Iterator[list[Connection]]:
    """Connections to `count` fresh processes, ended on the way out."""
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its thread pools
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker first imports torch or numpy
    try:
        for process in processes:
            process.start()
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = previous
    for _, theirs in pairs:
        theirs.close()  # so that the end of a worker reads as the end of its pipe
    completed = False
    try:
        yield [ours for ours, _ in pairs]
        completed = True
    finally:
        for (ours, _), process in zip(pairs, processes, strict=True):
            ours.close()  # a worker without a task ends by that
            if not completed:
                process.terminate()
        for process in processes:
            process.join()


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves by the clean-ups of whatever is at work

    def progress(done: int, total: int) -> None:
        connection.send(("progress", done / total))

    try:
        while True:
            function, arguments = connection.recv()
            try:
                function(*arguments, progress)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except UserError as error:
                connection.send(("mistake", str(error)))
            except Exception:
                connection.send(("error", traceback.format_exc()))
            else:
                connection.send(("done", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        return
