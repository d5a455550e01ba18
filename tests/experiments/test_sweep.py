"""experiments/sweep.py as a user runs it: on this machine, with a kill, and with a SLURM that only takes notes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import metrics

import figures
import sweep
from shared.run import UserError

# two jobs that end with the same metrics
SWEEP = """
script = "crl.py"
[flags]
total_env_steps = 8000
num_envs = 8
episode_length = 20
unroll_length = 10
min_replay_size = 20
max_replay_size = 60
updates_per_chunk = 2
batch_size = 16
width = 16
num_eval_envs = 4
eval_every = 1600
checkpoint_every = [160, 320]
[slurm]
slurm_partition = "gpu"
timeout_min = 30
"""


def start(folder, *arguments, **variables):
    """The program at work on a sweep's file."""
    (folder / "often.toml").write_text(SWEEP)
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **variables}
    command = [sys.executable, sweep.__file__, "often.toml", *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def process_of(folder):
    """The process that trains into a folder."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        words = file.read_bytes().decode(errors="replace").split("\0")
        if any("crl.py" in word for word in words) and any(str(folder) in word for word in words):
            return int(file.parent.name)
    return None


def test_a_killed_job_is_started_again_and_ends_as_an_unbroken_one(tmp_path, cache):
    runs = tmp_path / "runs/sweeps/often"
    killed, whole = runs / "checkpoint_every=160", runs / "checkpoint_every=320"
    process = start(tmp_path, "--workers=2", **cache)
    deadline = time.monotonic() + 600
    while not (killed / "metrics.csv").exists() or len(metrics(killed)) < 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process_of(killed), signal.SIGKILL)
    out = ended(process)
    assert [out.count(f"checkpoint_every={each}: started") for each in (160, 320)] == [2, 1]
    assert "checkpoint_every=160: stopped, exit code -9" in out and "checkpoint_every=160: done, exit code 0" in out
    assert metrics(killed) == metrics(whole) and len(metrics(whole)) == 98
    assert re.search(r"checkpoint_every=160 \| done \| 8000 \| eval/success_any", out)
    assert (runs / "sweep.png").stat().st_size > 5000
    (name,) = {row["run"] for row in figures.lines(runs / "sweep")[1]} - {"checkpoint_every=320"}
    curve = figures.read(f"{runs / 'sweep'}::{name}")
    assert curve["env_steps"].tolist() == [1600, 3200, 4800, 6400, 8000]
    assert "2 of 2 runs are done or under way, 0 to go" in ended(start(tmp_path, **cache))


def test_a_job_whose_time_is_up_lets_its_script_save_and_does_not_hang(tmp_path):
    """As in submitit: `checkpoint` is called by a signal's handler, in the thread that waits for the script."""
    script = tmp_path / "script.py"
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print('ready', flush=True); time.sleep(60)"
    script.write_text(f"import signal, sys, time; {wait}")
    code = f"""
import signal, sys
sys.path.insert(0, {str(Path(sweep.__file__).parent)!r})
import sweep
from pathlib import Path
job = sweep.Job({str(script)!r}, ["--a=1"], Path({str(tmp_path / "run")!r}), 7)
def handler(*_):
    again = job.checkpoint().function
    print(again.flags, again.total, flush=True)
signal.signal(signal.SIGUSR2, handler)
print(job(), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGUSR2)  # all of them get it
    assert process.communicate(timeout=30)[0] == "['--a=1'] 7\n143\n"


def test_slurm_gets_an_array_of_jobs(tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/asked\necho Submitted batch job 12\n')
    for name in ("srun", "sbatch"):
        (tmp_path / name).chmod(0o755)
    out = ended(start(tmp_path, "--cluster=slurm", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    asked = (tmp_path / "asked").read_text()
    assert re.search(r"#SBATCH --array=0-1", asked) and "#SBATCH --partition=gpu" in asked
    assert "#SBATCH --time=30" in asked and "0 of 2 runs are done or under way, 2 to go" in out
    assert ended(start(tmp_path, "--status")).count("| waiting | 0 |") == 2
    # what is still in the queue is not asked for again
    (tmp_path / "sacct").write_text("#!/bin/sh\nprintf 'JobID|State|NodeList\\n12_0|PENDING|\\n12_1|FAILED|\\n'\n")
    (tmp_path / "sacct").chmod(0o755)
    out = ended(start(tmp_path, "--cluster=slurm", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert "1 of 2 runs are done or under way, 1 to go" in out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("script = ", "is no sweep: Invalid value"),
        ('script = "crl"', "script of .* is 'crl'; it is one of algorithms/"),
        ('script = "crl.py"\nseeds = 3', "has seeds; a sweep has script, flags, slurm and local"),
        ('script = "crl.py"\n[flags]\ndept = [4, 8]', "dept.*depth"),
        ('script = "crl.py"\n[flags]\ndepth = [4, 6]', "depth is 6; it is a positive multiple of 4"),
        ('script = "crl.py"\n[flags]\nrun_dir = "x"', "no run_dir, no resume"),
        ('script = "crl.py"\n[flags]\ndepth = []', r"depth is \[\]; it has values"),
        ('script = "crl.py"\n[flags]\ndepth = [4, 4]', r"depth is \[4, 4\]; it has values, each of them once"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, complaint):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        sweep.read(str(tmp_path / "bad.toml"))
    assert "\n" not in str(error.value)
