"""Curves of runs, while they run or afterwards: a picture that is redrawn, and a table in the terminal.

    python experiments/watch.py RUN...                              run folders, or folders that hold some
    python experiments/watch.py --metric eval/far/success_any RUN...
    python experiments/watch.py --once --picture mine.png RUN...    draw once, then end

Runs of one script whose settings differ in seeds and budget only are one curve: the mean over all their seeds, with its
95 % bootstrap interval, where each of them was evaluated. Of runs of one seed the one that came farthest counts.
Settings that differ between curves are their names, so a variant is compared with a baseline by naming the folders of
both. It changes nothing in the folders, and ends when no process is at work on them any more.
"""

import argparse
import fcntl
import json
import time
from pathlib import Path

import numpy as np

import figures
from shared import run

METRICS = ("eval/success_any", "eval/score", "eval/return_adapted")
"""What is shown without --metric: the first one that the runs have."""
NOT_COMPARED = (*run.UNTOLD, "num_seeds", "resume", "total_env_steps", "total_gradient_steps")
"""Settings that may differ within a curve."""


def find(paths: list[str]) -> list[Path]:
    """The run folders among and below these; UserError where there is none."""
    found = []
    for path in map(Path, paths):
        below = sorted(file.parent for file in path.rglob("config.json"))
        run.need(len(below) > 0, f"{path} is no run folder and holds none: there is no config.json")
        found += below
    return found


def group(folders: list[Path]) -> dict[str, list[Path]]:
    """Name of a curve -> its runs."""
    settings = {}
    for folder in folders:
        made = json.loads((folder / "config.json").read_text())
        script = {"script": Path(made["command"].split()[1]).name}
        settings[folder] = script | {k: v for k, v in made["config"].items() if k not in NOT_COMPARED}
    names = dict.fromkeys(name for each in settings.values() for name in each)
    values = lambda name: {str(each[name]) for each in settings.values() if name in each}
    differ = [name for name in names if len(values(name)) > 1]  # among the scripts that have it
    curves = {}
    for folder, each in settings.items():
        name = ", ".join(f"{name}={each[name]}" for name in differ if name in each) or each["env"]
        curves.setdefault(name, []).append(folder)
    return curves


def read(folders: list[Path], metric: str | None) -> tuple[str | None, dict[str, np.ndarray]]:
    """The metric's name, and the evaluations (rows,) of all seeds of these runs, at steps where each seed has one."""
    seeds = {}
    for folder in folders:
        try:
            columns = run.read_metrics(folder)
        except (OSError, IndexError):  # it has just begun
            continue
        metric = metric or next((name for name in METRICS if name in columns), None)
        run.need(metric in columns, f"{folder} has no metric {metric}; it has {', '.join(columns)}")
        for seed in np.unique(columns["seed"]):
            steps = "env_steps" if "env_steps" in columns else "gradient_steps"  # of an offline run
            rows = np.stack([columns[name][columns["seed"] == seed] for name in (steps, "seed", metric)])
            seeds[seed] = max(seeds.get(seed, rows), rows, key=lambda rows: rows[0].max())
    env_steps, seed, values = np.concatenate([*seeds.values(), np.zeros((3, 0))], axis=1)
    steps, counts = np.unique(env_steps[~np.isnan(values)], return_counts=True)
    everyone = np.isin(env_steps, steps[counts == len(seeds)])
    return metric, {"env_steps": env_steps[everyone], "seed": seed[everyone], metric: values[everyone]}


def going_on(folder: Path) -> bool:
    """Whether a process holds the lock of a run folder."""
    try:
        with (folder / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock
        pass
    return False


def show(curves: dict[str, list[Path]], metric: str | None, picture: str) -> None:
    """Draws the picture and prints the table."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    rows = []
    for name, folders in curves.items():
        metric, curve = read(folders, metric)
        seeds, last = len(np.unique(curve["seed"])), "not evaluated by all seeds yet"
        if seeds:
            figures.plot(axis, curve, metric, f"{name} ({seeds} seed{'s' * (seeds > 1)})")
            last = figures.entry(figures.last(curve, metric))
        rows.append([name, f"{seeds}", f"{curve['env_steps'].max(initial=0):,.0f}", last])
    axis.set(xlabel="steps", ylabel=metric)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    Path(picture).write_bytes(figures.png(figure))
    print(figures.table(["run", "seeds", "steps", f"{metric}, last"], rows), picture, sep="\n", flush=True)


@run.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--metric", help="a column of metrics.csv")
    parser.add_argument("--picture", default="watch.png")
    parser.add_argument("--every", type=float, default=10, help="seconds between pictures")
    parser.add_argument("--once", action="store_true")
    flags = parser.parse_args(argv and argv[1:])
    while True:
        folders = find(flags.runs)
        show(group(folders), flags.metric, flags.picture)
        if flags.once or not any(map(going_on, folders)):
            return
        time.sleep(flags.every)


if __name__ == "__main__":
    main()
