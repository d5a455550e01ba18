"""A sweep: a script with lists of values for some flags, each combination a job on this machine or of SLURM.

    python experiments/sweep.py FILE                    the jobs on this machine, one after another
    python experiments/sweep.py FILE --cluster slurm    an array of jobs of SLURM; ends when they are in its queue
    python experiments/sweep.py FILE --status           which run, are done, stopped or waiting; their last scores

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
is not done, and trains nothing twice. All evaluations are in sweep.csv there, and sweep.png shows them, a curve for
each combination of all flags but the seed; `--status` writes both too. Needs `pip install -e '.[sweep]'`.
"""

import argparse
import csv
import importlib
import itertools
import json
import os
import signal
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
WEEK = 7 * 24 * 60


class Job:
    """One run: begins, or goes on where it was stopped. Ends with the exit code of its script."""

    def __init__(self, script: str, flags: list[str], folder: Path, total: int):
        self.script, self.flags, self.folder, self.total = script, flags, folder, total
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> int:
        environment = dict(os.environ)
        if environment.get("SUBMITIT_EXECUTOR") == "local":  # which hides all GPUs
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            environment |= {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        folder = "resume" if (self.folder / "config.json").exists() else "run_dir"
        command = [sys.executable, self.script, *self.flags, f"--{folder}={self.folder}"]
        deaf = lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM may send it to all
        self.process = subprocess.Popen(command, env=environment, preexec_fn=deaf)
        return self.process.wait()

    def checkpoint(self):
        """What submitit calls, in a signal handler, when the job's time is up."""
        import submitit

        self.process.terminate()  # it saves
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # `wait` is in use below this handler
        return submitit.helpers.DelayedSubmission(Job(self.script, self.flags, self.folder, self.total))


def state(job: Job) -> str:
    """done, running, stopped (perhaps by an error), or waiting (a run that fails at once leaves nothing)."""
    if not (job.folder / "config.json").exists():
        return "waiting"
    saved = max((int(path.stem) for path in (job.folder / "checkpoints").glob("*.eqx")), default=0)
    return "running" if watch.going_on(job.folder) else "done" if saved >= job.total else "stopped"


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
    for name, values in lists.items():
        run.need(len(values) == len({*map(str, values)}) > 0, f"{name} is {values}; it has values, each of them once")
    jobs = []
    for values in itertools.product(*lists.values()):
        flags = [f"--{name}={x}" for name, x in zip(lists, values)]
        config = run.configure(module.Config, module.RECIPES, None, [script, *flags])
        swept = [f"{name}={x}" for (name, all_values), x in zip(lists.items(), values) if len(all_values) > 1]
        folder = Path("runs/sweeps", Path(path).stem, ("-".join(swept) or "run").replace("/", "_")).absolute()
        total = getattr(config, f"total_{run.clock(config)}")
        jobs.append(Job(str(ROOT / "algorithms" / script), flags, folder, total))
    return jobs, sweep


def submit(jobs: list[Job], sweep: dict, cluster: str, workers: int) -> None:
    """Has the jobs that are not done run: on this machine until all are, of SLURM until they are in its queue."""
    try:
        import submitit
    except ImportError:
        raise run.UserError("the package submitit is not installed; pip install -e '.[sweep]'") from None
    folder = jobs[0].folder.parent / "jobs"
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=100)
    try:
        executor.update_parameters(name="sweep", timeout_min=WEEK)
        executor.update_parameters(**sweep.get(cluster, {}))
    except (NameError, TypeError, ValueError) as error:
        raise run.UserError(f"[{cluster}]: {error}".split("\n")[0]) from None
    left = [job for job in jobs if state(job) in ("waiting", "stopped")]
    if cluster == "slurm":
        noted = folder / "queued.json"
        queued = json.loads(noted.read_text()) if noted.exists() else {}
        ended = lambda job: job.folder.name not in queued or submitit.SlurmJob(folder, queued[job.folder.name]).done()
        left = [job for job in left if ended(job)]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done or under way, {len(left)} to go", flush=True)
    if cluster == "slurm":
        with executor.batch():
            started = {job.folder.name: executor.submit(job) for job in left}
        noted.write_text(json.dumps(queued | {name: job.job_id for name, job in started.items()}))
        return
    lock, interrupted = threading.Lock(), threading.Event()

    def until_done(job: Job) -> None:
        code = -1
        while code < 0 and not interrupted.is_set():  # killed
            with lock:
                started = executor.submit(job)
            print(f"{job.folder.name}: started; log {started.paths.stdout}", flush=True)
            while not started.done():
                time.sleep(0.5)
            code = -1 if started.exception() else started.result()
            print(f"{job.folder.name}: {state(job)}, exit code {code}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(until_done, left))
        except KeyboardInterrupt:
            interrupted.set()  # the jobs got it too, and save
            raise


def collect(jobs: list[Job]) -> None:
    """Writes sweep.csv and sweep.png beside the runs, and prints a table."""
    folder, rows, table, metric = jobs[0].folder.parent, [], [], None
    begun = [job.folder for job in jobs if (job.folder / "metrics.csv").exists()]
    names = {path: name for name, paths in watch.group(begun).items() for path in paths}
    for job in jobs:
        steps, score = "0", ""
        if job.folder in begun:
            with (job.folder / "metrics.csv").open() as file:
                every = [{"run": names[job.folder], **row} for row in csv.DictReader(file)]
            steps = every[-1].get("env_steps") or every[-1]["gradient_steps"]
            rows += [row for row in every if any(row[name] for name in row if name.startswith("eval/"))]
            metric, curve = watch.read([job.folder], metric)
            if len(curve[metric]):
                score = f"{metric} {figures.last(curve, metric).mean():.3g}"
        table.append([job.folder.name, state(job), steps, score])
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
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time on this machine")
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
