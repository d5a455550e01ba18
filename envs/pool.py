"""Processes that step environments which are not in JAX; envs/pool_worker.py is one of them."""

import contextlib
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

WORKER = Path(__file__).with_name("pool_worker.py")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class PoolError(RuntimeError):
    """A call of a pool failed; the message is one line."""


# JAX logs the traceback of an exception on its way out of a compiled program, and then raises it with all of that in
# its message; of ours, the one line in `Pool.failure` is enough
logging.getLogger("jax._src.callback").addFilter(lambda r: not (r.exc_info and isinstance(r.exc_info[1], PoolError)))


class Pool:
    """Processes that share the work of each request; they start with `start`.

    Args:
      name: what the worlds are called in messages.
      worlds: a file, of this folder if it names none, that defines the class `Worlds`; its methods are the requests.
      number: how many processes.
      arguments: of `Worlds`, as strings.
      variables: of the processes' environment.

    Attributes:
      failure: why a call failed, in one line, such as that a process died; else None.
      workers: the processes that are there.
    """

    def __init__(self, name: str, worlds: str, number: int, arguments: Sequence[str] = (), **variables: str):
        self.failure: str | None = None
        self.workers: list[_Worker] = []
        self._name, self._number = name, number
        self._command = [sys.executable, "-P", str(WORKER), str(WORKER.parent / worlds), *arguments]
        self._variables = os.environ | dict.fromkeys(THREADS, "1") | variables

    def start(self) -> None:
        """Starts the processes if they are not there; PoolError if that fails."""
        self.failure = None
        try:
            self.workers = self.workers or [_Worker(self._command, self._variables) for _ in range(self._number)]
        except OSError as error:
            self.fail(f"cannot start {self._number} {self._name} workers: {error}")

    def ask(self, request: str, *columns) -> tuple[np.ndarray, ...]:
        """Has the processes do something at the same time. Each has a share of the worlds, whose entries in the columns
        it gets; the results have an entry for each world too. PoolError if a process dies."""
        asked, answers = [], []
        try:
            for worker, share in zip(self.workers, shares(len(columns[0]), self._number)):
                if share.start < share.stop:
                    asked.append(worker)
                    worker.ask(request, *(column[share] for column in columns))
            for worker in asked:
                answers.append(worker.answer())
        except (OSError, EOFError, pickle.UnpicklingError):  # nobody at the other end of a pipe
            reason = f"{self._name} worker {self.workers.index(worker)} died ({worker.last_words()})"
            self.close()
            self.fail(reason)
        except KeyboardInterrupt:
            self.close()  # the answers would be taken for those to the next request
            raise
        return tuple(map(np.concatenate, zip(*answers)))

    def fail(self, reason: str) -> NoReturn:
        self.failure = reason
        raise PoolError(reason)

    def close(self) -> None:
        """Ends the processes."""
        while self.workers:
            self.workers.pop().close()


def shares(worlds: int, workers: int) -> list[slice]:
    """Which worlds each process has: numbers that differ by at most one."""
    bounds = np.linspace(0, worlds, workers + 1).astype(int)
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


class _Worker:
    """A process of pool_worker.py."""

    def __init__(self, command: list[str], variables: dict[str, str]):
        # not a pipe, which blocks the process when it is full
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=variables
        )

    def ask(self, *request) -> None:
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()

    def answer(self) -> tuple[np.ndarray, ...]:
        return pickle.load(self._process.stdout)

    def last_words(self) -> str:
        """How the process ended, which it is about to, and the last line of its error output."""
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        if said:
            return f"{how}: {said[-1]}"
        return f"{how}; is the machine out of memory?" if code == -signal.SIGKILL else how

    def close(self) -> None:
        self._process.kill()  # it has nothing to save
        self._process.wait()
        with contextlib.suppress(OSError):  # of a request that was left in the buffer
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()
