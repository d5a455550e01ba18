"""Scripts as a user runs them: in processes of their own."""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.run import TIMING_COLUMNS


def metrics(folder) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns that tell the time."""
    rows = list(csv.DictReader((Path(folder) / "metrics.csv").open()))
    return [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in rows]


def check_close(one, other, rows=8) -> None:
    """The first rows of two runs that add up in another order, and then drift apart."""
    for a, b in zip(metrics(one)[:rows], metrics(other)[:rows], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = a[name] == b[name] or math.isclose(float(a[name]), float(b[name]), rel_tol=2e-3, abs_tol=2e-3)
            assert close, (name, a[name], b[name])


def train(script, *flags) -> None:
    """Runs a script in this process, without its pictures."""
    drawing = (script, "draw") if hasattr(script, "draw") else (script.pictures, "draw_goal_reaching")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*drawing, lambda *_: None)
        script.main([script.__name__, *flags])


def lose_last_checkpoint(folder) -> tuple[Path, Path]:
    """As if a run had been killed before it was saved. Returns the path of the one before, and of that one."""
    *_, before, last = sorted((folder / "checkpoints").glob("*.eqx"), key=lambda path: int(path.stem))
    last.unlink()
    return before, last


def check_repeats_its_end(script, whole) -> None:
    """A finished run that lost its last checkpoint goes on from the one before, and ends with the same metrics."""
    again = shutil.copytree(whole, whole.with_name("again"))
    before, last = lose_last_checkpoint(again)
    train(script, f"--resume={again}")
    assert last.exists() and metrics(again) == metrics(whole)
    assert int(metrics(whole)[0]["env_steps"]) < int(before.stem) < int(metrics(whole)[-2]["env_steps"])


class Script:
    """A script of algorithms/, by its module. Its programs are compiled with few optimisations, in half the time."""

    def __init__(self, module):
        self.path, self.env = module.__file__, {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def run(self, *flags, cwd, code=0, env=None):
        """Runs it to its end, which has this exit code."""
        options = {"cwd": cwd, "env": {**self.env, **(env or {})}, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, self.path, *flags], timeout=900, check=False, **options)
        assert done.returncode == code, done.stderr
        return done

    def signalled(self, number, folder, flags, cwd, rows, env):
        """Starts it, waits for that many rows of metrics and a random moment more, and sends the signal.

        Returns what it printed, what it printed as errors, and its exit code.
        """
        return self.interfered(lambda process: process.send_signal(number), folder, flags, cwd, rows, env)

    def go_on(self, whole, folder, cwd, env, *flags):
        """Resumes a run until it has as many metrics as another; its pictures are not awaited. Returns what it said."""
        flags = [f"--resume={folder}", *flags]
        out, err, code = self.signalled(signal.SIGKILL, folder, flags, cwd, len(metrics(whole)), env)
        assert code in (0, -signal.SIGKILL), err
        return out

    def check_ends_as(self, whole, folder, cwd, env, *flags):
        """Resumed, a run ends with the metrics of another."""
        self.go_on(whole, folder, cwd, env, *flags)
        assert metrics(folder) == metrics(whole)

    def check_interruptions(self, reference, cache, number):
        """A run is killed, goes on, is sent this signal, saves, says how to go on, and ends with the metrics of the
        reference (a folder with a run `whole`, its flags, anything), compiled anew, as after a reboot."""
        folder, flags, _ = reference
        again, total = folder / "again", len(metrics(folder / "whole"))
        start = [*flags, f"--run_dir={again}"]
        *_, code = self.signalled(signal.SIGKILL, again, start, folder, 0.2 * total, cache)
        assert code == -signal.SIGKILL and len(metrics(again)) < total
        out, _, code = self.signalled(number, again, [f"--resume={again}"], folder, 0.5 * total, cache)
        assert code == 128 + number and len(metrics(again)) < total
        assert f"--resume {again}" in out and out.splitlines()[-1] == str(again)
        saved = max(int(path.stem) for path in (again / "checkpoints").glob("*.eqx"))
        assert saved == int(metrics(again)[-1]["env_steps"]), "nothing that was trained is lost"
        self.run(f"--resume={again}", cwd=folder)
        assert metrics(again) == metrics(folder / "whole")

    def on_devices(self, number, flags, cwd, env):
        """Runs it on so many devices, which are parts of this CPU; returns facts of its programs (on_devices.py)."""
        devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={number}"
        path = os.pathsep.join([str(Path(self.path).parent.parent), os.environ.get("PYTHONPATH", "")])
        options = {"cwd": cwd, "env": {**self.env, **env, "XLA_FLAGS": devices, "PYTHONPATH": path}}
        command = [sys.executable, str(Path(__file__).with_name("on_devices.py")), Path(self.path).stem, *flags]
        done = subprocess.run(command, timeout=900, check=False, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    def check_seeds_on_devices(self, reference, cache, program):
        """Two seeds on two devices of four: no chunk is traced twice, nothing passes between devices, `program` writes
        in place, and the first metrics are those of one device."""
        folder, flags, _ = reference
        out, facts = self.on_devices(4, [*flags, f"--run_dir={folder / 'spread'}"], folder, cache)
        assert "seeds over 2 devices" in out
        assert not any(each["collectives"] for each in facts.values())
        assert facts[program]["reused"] > 0
        assert all(shape[0] == 2 and share == [1, *shape[1:]] for shape, share in facts[program]["shares"])
        check_close(folder / "spread", folder / "whole")

    def interfered(self, interfere, folder, flags, cwd, rows, env):
        """The same with `interfere(process)` instead of a signal."""
        options = {"cwd": cwd, "env": {**self.env, **env}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, self.path, *flags], text=True, **options)
        path, deadline = Path(folder) / "metrics.csv", time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") > rows:
                time.sleep(random.random() * 0.2)
                break
            time.sleep(0.002)
        interfere(process)
        return *process.communicate(timeout=300), process.wait()
