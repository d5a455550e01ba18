"""Published learning curves: python results/figures.py redraws every figure from the CSV files beside it.

    python results/figures.py                        draw
    python results/figures.py publish NAME RUN...    take the evaluations of runs into NAME.csv, with how they were made

A CSV begins with a comment for each run: its command, commit, versions and device.
"""

import csv
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from shared import run

HERE = Path(__file__).parent


class Figure(NamedTuple):
    """One panel a metric, one line a CSV."""

    panels: dict[str, str]
    """Metric -> title."""
    curves: dict[str, str]
    """Label -> name of the CSV."""


FIGURES = {
    "goals": Figure(
        {
            "eval/success_any": "episodes that reach their goal: uniform goals, mean action",
            "eval/far/sampled/success_any": "far goals, sampled action",
        },
        {
            "goals drawn anew at each reset (default)": "point_u_maze",
            "fixed goals (published behaviour)": "point_u_maze_fixed_goals",
            "published relabelling": "point_u_maze_published_relabelling",
        },
    ),
    "minicraft": Figure(
        {
            "eval/success/collect_iron": "episodes that unlock the deepest achievement",
            "eval/return": "achievements unlocked in an episode",
        },
        {
            "PPO with achievement distillation": "minicraft",
            "without prediction": "minicraft_matching",
            "without matching": "minicraft_prediction",
            "without either, regularisers only": "minicraft_regularisers",
            "without memory": "minicraft_no_memory",
            "plain PPO": "minicraft_plain",
        },
    ),
}


KEPT = ("train/return", "train/episode_length", "train/episodes", "train/score")
"""Columns of training that are published too."""


def publish(name: str, *folders: str) -> None:
    """Writes the evaluations in the metrics.csv of run folders to results/NAME.csv, one after another."""
    facts, rows = [], []
    for folder in folders:
        made = json.loads((Path(folder) / "config.json").read_text())
        made["command"] = re.sub(r" --run_dir[= ]\S+", "", made["command"])  # a path of one machine
        facts.append({key: made[key] for key in ("command", "commit", "versions", "device")})
        with (Path(folder) / "metrics.csv").open() as file:
            rows += [row for row in csv.DictReader(file) if any(row[name] for name in row if name.startswith("eval/"))]
    columns = [name for name in rows[0] if name in KEPT or not name.startswith(("train/", "auxiliary/"))]
    with (HERE / f"{name}.csv").open("w", newline="") as file:
        file.writelines(f"# {json.dumps(fact)}\n" for fact in facts)
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(name: str) -> dict[str, np.ndarray]:
    """The columns of results/NAME.csv as numbers."""
    with (HERE / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {column: np.array([float(row[column] or "nan") for row in rows]) for column in rows[0]}


def draw(name: str) -> None:
    """A line is the mean over seeds and its band reaches from the lowest to the highest."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels, curves = FIGURES[name]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items()):
        for label, file in curves.items():
            curve = read(file)
            run.plot_seeds(axis, curve["env_steps"], curve[metric], label)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="environment steps", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / f"{name}.png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]:
        publish(*sys.argv[2:])
    else:
        for figure_name in FIGURES:
            draw(figure_name)
