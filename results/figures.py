"""Published learning curves: python results/figures.py redraws every figure from the CSV files beside it.

    python results/figures.py                        draw
    python results/figures.py publish NAME RUN...    take the evaluations of runs into NAME.csv, with how they were made

A CSV begins with a comment for each run: its command, commit, versions and device.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from shared import run

HERE = Path(__file__).parent


class Figure(NamedTuple):
    """A row of panels for each metric; with one panel only, the metrics stand side by side."""

    metrics: dict[str, str]
    """Metric -> title."""
    panels: dict[str, dict[str, str]]
    """Name of a panel -> its lines: label -> name of the CSV."""


SUCCESS = {
    "eval/success_any": "uniform goals, mean action",
    "eval/far/sampled/success_any": "far goals, sampled action",
}
FIGURES = {
    "point_depth": Figure(
        SUCCESS,
        {
            maze: {f"depth {depth}": f"point_{maze}_maze_depth_{depth}" for depth in (4, 8, 16, 32)}
            for maze in ("u", "u4", "u5", "big")
        },
    ),
    "point_choices": Figure(
        SUCCESS,
        {
            "goals": {
                "drawn anew at each reset (default)": "point_u4_maze_depth_4",
                "fixed (published)": "point_u4_maze_fixed",
                "drawn anew, never switched": "point_u4_maze_resampled_no_switch",
                "fixed, never switched": "point_u4_maze_fixed_no_switch",
                "published relabelling": "point_u4_maze_published_relabelling",
            },
            "energies": {
                "norm (default)": "point_u4_maze_depth_4",
                **{kind: f"point_u4_maze_{kind}" for kind in ("l2", "dot", "cosine")},
            },
            "losses": {
                "forward InfoNCE (default)": "point_u4_maze_depth_4",
                "backward InfoNCE": "point_u4_maze_bwd_infonce",
                "symmetric InfoNCE": "point_u4_maze_sym_infonce",
                "binary NCE": "point_u4_maze_binary_nce",
            },
        },
    ),
    "minicraft": Figure(
        {
            "eval/success/collect_iron": "episodes that unlock the deepest achievement",
            "eval/return": "achievements unlocked in an episode",
        },
        {
            "parts": {
                "PPO with achievement distillation": "minicraft",
                "without prediction": "minicraft_matching",
                "without matching": "minicraft_prediction",
                "without either, regularisers only": "minicraft_regularisers",
                "without memory": "minicraft_no_memory",
                "plain PPO": "minicraft_plain",
            }
        },
    ),
}


def read(name: str) -> dict[str, np.ndarray]:
    """The columns of results/NAME.csv as numbers."""
    with (HERE / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {column: np.array([float(row[column] or "nan") for row in rows]) for column in rows[0]}


def draw(name: str) -> None:
    """A line is the mean over seeds and its band reaches from the lowest to the highest."""
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


def normalised(family: str, name: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps and returns of `metric` in results/NAME.csv, where on the test tasks of a seed the return of
    the random policy is 0 and that of an agent that was told them, at its last evaluation, is 1."""
    curve, oracle, random = read(name), read(f"{family}_oracle"), read("random_points")
    scores = np.empty_like(curve[metric])
    for i, seed in enumerate(curve["seed"]):
        zero = random[f"{family}_return"][random["seed"] == seed].item()
        one = oracle["eval/return_oracle"][oracle["seed"] == seed][-1]
        scores[i] = (curve[metric][i] - zero) / (one - zero)
    return curve["env_steps"], scores


def draw_adaptation() -> None:
    """Normalised returns of cocoa.py on held-out tasks, a panel a family; prints the last ones of each seed."""
    from matplotlib import pyplot

    families = "point_goal", "sparse_point_goal"
    figure, axes = pyplot.subplots(1, len(families), figsize=(10, 3.6), layout="constrained")
    for axis, family in zip(axes, families):
        for label, name, metric in (
            ("told the goal", f"{family}_oracle", "eval/return_oracle"),
            ("CoCOA", family, "eval/return_adapted"),
            ("PEARL", f"{family}_pearl", "eval/return_adapted"),
            ("CoCOA before adaptation", family, "eval/return_prior"),
        ):
            steps, scores = normalised(family, name, metric)
            run.plot_seeds(axis, steps, scores, label)
            last = ", ".join(f"{score:.3f}" for score in scores[steps == steps[-1]])
            print(f"{family}: {label}: {scores[steps == steps[-1]].mean():.3f} ({last})")
        axis.set(title=f"{family}: return on held-out goals", xlabel="environment steps")
        axis.set_ylabel("0: random policy, 1: told the goal")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "point_goal.png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def draw_choices() -> None:
    """What results/cocoa_choices.py measured: a dot a seed, a bar at the mean; the line is PEARL's mean."""
    from matplotlib import pyplot

    with (HERE / "cocoa_choices.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    names = list(dict.fromkeys(row["choice"] for row in rows))
    panels = {
        "eval/probe_r2": "variance of held-out goals that a linear probe explains",
        "eval/return_adapted": "return on held-out goals, adapted",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 5), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items()):
        for height, name in enumerate(names):
            values = np.array([float(row[metric]) for row in rows if row["choice"] == name])
            axis.plot(values, np.full(len(values), height), "o", color="tab:blue", alpha=0.4, markersize=4)
            axis.plot(values.mean(), height, "|", color="black", markersize=14)
            if name == "PEARL":
                axis.axvline(values.mean(), color="grey", linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.savefig(HERE / "cocoa_choices.png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    matplotlib.use("agg")
    if sys.argv[1:2] == ["publish"]:
        publish(*sys.argv[2:])
    else:
        for figure_name in FIGURES:
            draw(figure_name)
        draw_adaptation()
        draw_choices()
