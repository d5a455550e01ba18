"""A sweep: a script with lists of values for some flags, each combination a job on this machine or of SLURM.

    python experiments/sweep.py FILE                    the jobs here, two at a time
    python experiments/sweep.py FILE --cluster slurm    an array of jobs of SLURM; ends when they are in its queue
    python experiments/sweep.py FILE --status           what runs, is done or failed, and its last score

FILE is TOML:

    script = "crl.py"
    [flags]
    env = "point_u_maze"
    depth = [4, 8]
    seed = [0, 1, 2]
    [slurm]                 # or [local]: what submitit's executor takes
    slurm_partition = "gpu"
    gpus_per_node = 1
    timeout_min = 600

Runs lie in runs/sweeps/, in a folder with the name of FILE. A job that SLURM preempts or that runs out of time saves,
is put into the queue again and goes on; one that is killed here is started again. The same command goes on with what
is not done, and trains nothing twice. All evaluations are in sweep.csv there, and sweep.png shows them; `--status`
writes both too.
Needs `pip install -e '.[sweep]'`.
"""

import argparse
import csv
import importlib
import itertools
import json
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

import figures
import watch
from shared import run

ROOT = Path(__file__).parent.parent
TRIES = 5
"""Starts of a job on this machine."""
WEEK = 7 * 24 * 60


class Job:
    """One run: begins, or goes on where it was stopped. submitit calls `checkpoint` when its time is up."""

    def __init__(self, script: str, flags: list[str], folder: Path):
        self.script, self.flags, self.folder = script, flags, folder
        self.process = None

    def __call__(self):
        begun = (self.folder / "config.json").exists()
        flags = [f"--resume={self.folder}"] if begun else [*self.flags, f"--run_dir={self.folder}"]
        self.process = subprocess.Popen([sys.executable, self.script, *flags])
        code = self.process.wait()
        if code:
            raise SystemExit(f"{self.folder.name} ended with exit code {code}")

    def checkpoint(self):
        import submitit

        self.process.terminate()  # it saves
        self.process.wait()
        return submitit.helpers.DelayedSubmission(Job(self.script, self.flags, self.folder))


def state(job: Job) -> str:
    """done, running, stopped (perhaps by an error), or waiting."""
    if not (job.folder / "config.json").exists():
        return "waiting"
    config = json.loads((job.folder / "config.json").read_text())["config"]
    total = config.get("total_env_steps") or config["total_gradient_steps"]
    saved = max((int(path.stem) for path in (job.folder / "checkpoints").glob("*.eqx")), default=0)
    return "running" if watch.going_on(job.folder) else "done" if saved >= total else "stopped"


def read(path: str) -> tuple[list[Job], dict]:
    """The jobs of a sweep's file, and the file; UserError, in one line, where a script would refuse its flags."""
    try:
        sweep = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise run.UserError(f"{path} is no sweep: {error}") from None
    odd = ", ".join(set(sweep) - {"script", "flags", "slurm", "local"})
    run.need(not odd, f"{path} has {odd}; a sweep has script, flags, slurm and local")
    script = sweep.get("script", "")
    run.need((ROOT / "algorithms" / script).is_file(), f"script of {path} is {script!r}; it is one of algorithms/")
    module = importlib.import_module(f"algorithms.{Path(script).stem}")
    lists = {name: x if isinstance(x, list) else [x] for name, x in sweep.get("flags", {}).items()}
    run.need(not {"run_dir", "resume"} & lists.keys(), "the runs have folders of their own: no run_dir, no resume")
    jobs = []
    for values in itertools.product(*lists.values()):
        flags = [f"--{name}={x}" for name, x in zip(lists, values)]
        run.configure(module.Config, module.RECIPES, None, [script, *flags])
        swept = [f"{name}={x}" for (name, all_values), x in zip(lists.items(), values) if len(all_values) > 1]
        folder = Path("runs/sweeps", Path(path).stem, ("-".join(swept) or "run").replace("/", "_")).absolute()
        jobs.append(Job(str(ROOT / "algorithms" / script), flags, folder))
    return jobs, sweep


def submit(jobs: list[Job], sweep: dict, cluster: str, workers: int) -> None:
    """Has the jobs that are not done run: on this machine until all are, of SLURM until they are in its queue."""
    try:
        import submitit
    except ImportError:
        raise run.UserError("the package submitit is not installed; pip install -e '.[sweep]'") from None
    executor = submitit.AutoExecutor(jobs[0].folder.parent / "jobs", cluster=cluster, slurm_max_num_timeout=100)
    executor.update_parameters(name="sweep", timeout_min=WEEK)
    executor.update_parameters(**sweep.get(cluster, {}))
    left = [job for job in jobs if state(job) in ("waiting", "stopped")]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done or running, {len(left)} to go", flush=True)
    if cluster == "slurm":
        with executor.batch():
            for job in left:
                executor.submit(job)
        return
    lock = threading.Lock()

    def until_done(job: Job) -> None:
        for attempt in range(TRIES):
            with lock:
                started = executor.submit(job)
            print(f"{job.folder.name}: {'again ' * (attempt > 0)}started; log {started.paths.stdout}", flush=True)
            while not started.done():
                time.sleep(0.5)
            print(f"{job.folder.name}: {state(job)}", flush=True)
            if state(job) == "done":
                return

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(until_done, left))


def collect(jobs: list[Job]) -> None:
    """Writes sweep.csv and sweep.png beside the runs, and prints a table."""
    folder, rows, table = jobs[0].folder.parent, [], []
    begun = [job for job in jobs if (job.folder / "metrics.csv").exists()]
    names = {path: name for name, paths in watch.group([job.folder for job in begun]).items() for path in paths}
    for job in jobs:
        last, score = {}, ""
        if job in begun:
            with (job.folder / "metrics.csv").open() as file:
                for row in csv.DictReader(file):
                    last = row
                    if any(row[column] for column in row if column.startswith("eval/")):
                        rows.append({"run": names[job.folder], **row})
                        metric = next(name for name in (*watch.METRICS, *row) if row.get(name) and "/" in name)
                        score = f"{metric} {float(row[metric]):.3g}"
        table.append([job.folder.name, state(job), last.get("env_steps", last.get("gradient_steps", "0")), score])
    print(figures.table(["run", "state", "steps", "last score"], table))
    if rows:
        with (folder / "sweep.csv").open("w") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
        curves = {name: f"{folder / 'sweep'}::{name}" for name in dict.fromkeys(names.values())}
        drawn = figures.draw_curves(figures.Figure({metric: metric}, {"": curves}))
        (folder / "sweep.png").write_bytes(drawn)
        print(folder / "sweep.csv", folder / "sweep.png", sep="\n")


@run.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--cluster", choices=["local", "slurm"], default="local")
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time on this machine")
    parser.add_argument("--status", action="store_true")
    flags = parser.parse_args(argv and argv[1:])
    run.need(flags.workers > 0, f"workers is {flags.workers}; it is at least 1")
    jax.config.update("jax_platforms", "cpu")  # of this process: a GPU is for the jobs
    jobs, sweep = read(flags.file)
    if not flags.status:
        submit(jobs, sweep, flags.cluster, flags.workers)
    if flags.status or flags.cluster == "local":
        collect(jobs)
    unfinished = [job for job in jobs if state(job) != "done"]
    if unfinished and not flags.status and flags.cluster == "local":
        raise run.UserError(f"{len(unfinished)} of {len(jobs)} runs are not done; their logs say why, see above")


if __name__ == "__main__":
    main()
