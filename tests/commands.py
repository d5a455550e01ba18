"""Scripts as a user runs them: in processes of their own."""

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from shared.run import TIMING_COLUMNS


def cache(folder) -> dict[str, str]:
    """Environment variables by which processes share compiled programs, where nothing hangs on compiling anew."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def metrics(folder) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns that tell the time."""
    rows = list(csv.DictReader((Path(folder) / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows]


class Script:
    """A script of algorithms/, by its module."""

    def __init__(self, module):
        self.path = module.__file__

    def run(self, *flags, cwd, code=0, env=None):
        """Runs it to its end, which has this exit code."""
        options = {"cwd": cwd, "env": {**os.environ, **(env or {})}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, self.path, *flags], timeout=300, check=False, **options)
        assert done.returncode == code, done.stderr
        return done

    def signalled(self, number, folder, flags, cwd, rows, env):
        """Starts it, waits for that many rows of metrics and a random moment more, and sends the signal.

        Returns what it printed, what it printed as errors, and its exit code.
        """
        return self.interfered(lambda process: process.send_signal(number), folder, flags, cwd, rows, env)

    def interfered(self, interfere, folder, flags, cwd, rows, env):
        """The same with `interfere(process)` instead of a signal."""
        options = {"cwd": cwd, "env": {**os.environ, **env}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, self.path, *flags], text=True, **options)
        path, deadline = Path(folder) / "metrics.csv", time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") > rows:
                time.sleep(random.random() * 0.2)
                break
            time.sleep(0.002)
        interfere(process)
        return *process.communicate(timeout=100), process.wait()
