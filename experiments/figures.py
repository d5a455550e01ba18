"""Every figure and every table of results that this project shows, from the CSV files of results/.

    make figures                        redraw all, and say which differ from what was there
    python experiments/figures.py --check   only say; exit code 1 if any differs

Figures go beside the CSVs; tables and captions go into the pages, between the comments that name them. A figure's line
is the mean over seeds at each evaluation, its band the 95 % bootstrap interval of that mean; a table has the last
evaluation, never the best. experiments/runs.py redoes the runs; a measurement of speed names its script.
"""

import csv
import io
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

import envs
from algorithms import crl
from shared import evaluation, pictures, run

RESULTS = Path(__file__).parent.parent / "results"
WITH_TABLES = ("crl", "crl_offline", "sac", "ppo_ad", "cocoa")
PAGES = ("README.md", "envs/README.md", *(f"algorithms/{name}.md" for name in WITH_TABLES))


class Figure(NamedTuple):
    """A row of panels for each metric; with one panel only, the metrics stand side by side."""

    metrics: dict[str, str]
    """Metric -> title."""
    panels: dict[str, dict[str, str]]
    """Name of a panel -> its lines: label -> the CSV, a name in results/ or a path, without its ending."""
    bars: bool = False
    """At the end, the last values of the first metric."""


SUCCESS = {
    "eval/success_any": "uniform goals, mean action",
    "eval/far/sampled/success_any": "far goals, sampled action",
}
METHODS = {
    "CRL": ("depth_4", "crl.py", ""),
    "SAC": ("sac", "sac.py", "--her none"),
    "SAC + HER": ("sac_her", "sac.py", ""),
    "TD3 + HER": ("td3_her", "td3.py", ""),
    "GCSL": ("gcsl", "gcsl.py", ""),
    "GCBC": ("gcbc", "gcsl.py", "--future geometric"),
    "C-learning": ("c_learning", "c_learning.py", ""),
    "NCE + C-learning": ("nce_c_learning", "c_learning.py", "--loss nce_c_learning"),
}
"""What reaches goals: label -> the end of its CSVs' names, script, flags."""
META_LEARNERS = {"told the task": "oracle", "CoCOA": "cocoa", "PEARL": "pearl", "RL2": "rl2", "MAML": "maml"}
"""Label -> a part of the CSV's name."""
OFFLINE = {"crl": (29, 39), "gcbc": (9, 29), "qrl": (82, 86)}
"""Agents that learn from given data -> OGBench's scores, in the medium and the large point maze, in percent."""
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
                "fixed": "point_u4_maze_fixed",
                "drawn anew, never switched": "point_u4_maze_resampled_no_switch",
                "fixed, never switched (published)": "point_u4_maze_fixed_no_switch",
                "published relabelling": "point_u4_maze_published_relabelling",
            },
            "energies": {
                "norm (default)": "point_u4_maze_depth_4",
                **{kind: f"point_u4_maze_{kind}" for kind in ("l2", "dot", "mrn", "cosine")},
                "cosine, no penalty": "point_u4_maze_cosine_no_penalty",
            },
            "losses": {
                "forward InfoNCE (default)": "point_u4_maze_depth_4",
                "backward InfoNCE": "point_u4_maze_bwd_infonce",
                "symmetric InfoNCE": "point_u4_maze_sym_infonce",
                "binary NCE": "point_u4_maze_binary_nce",
            },
        },
    ),
    "point_blocks": Figure(
        SUCCESS,
        {
            **{
                f"depth {depth}": {
                    "LayerNorm, swish, skip (default)": f"point_u4_maze_depth_{depth}",
                    "no LayerNorm": f"point_u4_maze_no_norm_depth_{depth}",
                    "ReLU": f"point_u4_maze_relu_depth_{depth}",
                    "no skip": f"point_u4_maze_no_residual_depth_{depth}",
                    "hyperspherical": f"point_u4_maze_hyperspherical_depth_{depth}",
                }
                for depth in (16, 32)
            },
            "published": {
                "ours (default)": "point_u4_maze_depth_32",
                "published goals, relabelling, log π": "point_u4_maze_published_depth_32",
                "the same with exact log π": "point_u4_maze_published_exact_depth_32",
            },
        },
    ),
    "width": Figure(
        SUCCESS,
        {
            "u4": {"width 64, depth 4": "point_u4_maze_depth_4"}
            | {f"width {width}, depth 4": f"point_u4_maze_width_{width}" for width in (128, 256)}
            | {f"width 64, depth {depth}": f"point_u4_maze_depth_{depth}" for depth in (8, 16)}
        },
    ),
    "actor_critic": Figure(
        SUCCESS,
        {
            f"critic of depth {critic}": {
                f"actor of depth {actor}": f"point_u4_maze_depth_{actor}"
                if actor == critic
                else f"point_u4_maze_actor_{actor}_critic_{critic}"
                for actor in (4, 8, 16)
            }
            for critic in (4, 8, 16)
        },
    ),
    "batch": Figure(
        SUCCESS,
        {
            f"depth {depth}": {
                f"batch {batch}": f"point_u4_maze_depth_{depth}" + f"_batch_{batch}" * (batch != 256)
                for batch in (64, 128, 256, 512)
            }
            for depth in (4, 16)
        },
    ),
    "collectors": Figure(
        {
            f"eval/{name}/time_at_goal": title
            for name, title in {
                "collector": "the collector",
                "deep": "learner of depth 16",
                "shallow": "learner of depth 4",
            }.items()
        },
        {"u4": {f"collector of depth {depth}": f"point_u4_maze_collector_{depth}" for depth in (4, 16)}},
    ),
    "stitching": Figure(
        {"eval/success_any": "trained ways, mean action", "eval/far/sampled/success_any": "far goals, sampled action"},
        {"u": {f"depth {depth}": f"point_u_maze_stitching_depth_{depth}" for depth in (4, 8, 16)}},
    ),
    "ant": Figure(
        {
            "eval/success_any": "mean action",
            "eval/sampled/success_any": "sampled action",
            "eval/time_at_goal": "mean action: steps at the goal",
        },
        {"ant": {"episodes that reach their goal": "ant"}},
    ),
    "point_pixels": Figure(SUCCESS, {"u": {"from images": "point_u_maze_pixels"}}),
    "offline": Figure(
        {"eval/success": "episodes that reach their goal"},
        {
            **{
                f"pointmaze-{maze}-navigate": {agent.upper(): f"pointmaze_{maze}_{agent}" for agent in OFFLINE}
                for maze in ("medium", "large")
            },
            "medium, width 64": {f"CRL, depth {depth}": f"pointmaze_medium_crl_depth_{depth}" for depth in (4, 16)},
        },
    ),
    "baselines": Figure(
        {"eval/time_at_goal": "steps at the goal, of 100"},
        {maze: {label: f"point_{maze}_maze_{name}" for label, (name, *_) in METHODS.items()} for maze in ("u", "u4")},
        bars=True,
    ),
    "baselines_depth": Figure(
        SUCCESS,
        {
            label: {"depth 4": f"point_u4_maze_{METHODS[label][0]}"}
            | {f"depth {depth}": f"point_u4_maze_{name}depth_{depth}" for depth in (16, 32)}
            for label, name in {"CRL": "", "SAC + HER": "sac_her_", "TD3 + HER": "td3_her_", "GCBC": "gcbc_"}.items()
        },
    ),
    "achievements": Figure(
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
    "distillation": Figure(
        {
            "eval/success/collect_iron": "episodes that unlock iron",
            "eval/return": "achievements in an episode",
        },
        {
            "temperature": {
                f"{each}": "minicraft" if each == 0.1 else f"minicraft_temperature_{each}"
                for each in (0.03, 0.1, 0.3, 1)
            },
            "rollouts between phases": {
                f"{each}": "minicraft" if each == 8 else f"minicraft_every_{each}" for each in (2, 4, 8, 16)
            },
            "an achievement is": {"the change of the latent state": "minicraft", "the state after": "minicraft_after"},
        },
    ),
    **{
        f"meta_learning_{family}": Figure(
            {"eval/return_adapted": "return in test tasks, adapted"},
            {family: {label: f"{family}_{name}_equal_steps" for label, name in META_LEARNERS.items()}},
        )
        for family in ("point_goal", "half_cheetah_dir")
    },
    "craftax": Figure(
        {
            "eval/score": "score, fresh episodes, %",
            "train/score": "score in training, %",
            "eval/return": "return, fresh episodes",
        },
        {"craftax_classic_symbolic": {"PPO with achievement distillation": "craftax", "plain PPO": "craftax_plain"}},
    ),
}


# ---- numbers ------------------------------------------------------------------------------------------------------


def lines(name: str) -> tuple[list[str], list[dict[str, str]]]:
    """The comments and the rows of results/NAME.csv."""
    with (RESULTS / f"{name}.csv").open() as file:
        text = file.readlines()
    comments = [line[1:].strip() for line in text if line.startswith("#")]
    return comments, list(csv.DictReader(line for line in text if not line.startswith("#")))


def read(name: str) -> dict[str, np.ndarray]:
    """The columns of results/NAME.csv as numbers; of NAME::RUN, those of a run of a sweep."""
    name, _, one = name.partition("::")
    rows = [row for row in lines(name)[1] if row.pop("run", one) == one]
    columns = {column: np.array([float(row[column] or "nan") for row in rows]) for column in rows[0]}
    columns.setdefault("env_steps", columns.get("gradient_steps"))  # the clock of an offline run
    if "eval/return_oracle" in columns:  # who is told the task need not adapt
        columns["eval/return_adapted"] = columns["eval/return_oracle"]
    return columns


def clock(name: str) -> str:
    """What `env_steps` of `read` are in this CSV."""
    return "environment steps" if "env_steps" in lines(name.partition("::")[0])[1][0] else "gradient steps"


def made(name: str) -> dict:
    """How the run in results/NAME.csv was made: command, commit, versions, device."""
    return json.loads(lines(name)[0][0])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of values (seeds,); of three seeds, all that they span."""
    found = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def last(curve: dict[str, np.ndarray], metric: str) -> np.ndarray:
    """A metric at the last evaluation, (seeds,)."""
    return curve[metric][curve["env_steps"] == curve["env_steps"].max()]


def normalised(family: str, name: str, metric: str) -> dict[str, np.ndarray]:
    """`metric` of results/NAME.csv and its environment steps, where on the test tasks of a seed the return of the
    random policy is 0 and that of an agent that was told them, at its last evaluation, is 1."""
    curve, oracle, random = read(name), read(f"{family}_oracle"), read("random_points")
    scores = np.empty_like(curve[metric])
    for i, seed in enumerate(curve["seed"]):
        zero = random[f"{family}_return"][random["seed"] == seed].item()
        one = oracle["eval/return_oracle"][oracle["seed"] == seed][-1]
        scores[i] = (curve[metric][i] - zero) / (one - zero)
    return {"env_steps": curve["env_steps"], metric: scores}


# ---- figures ------------------------------------------------------------------------------------------------------


def plot(axis, curve: dict[str, np.ndarray], metric: str, label: str) -> None:
    steps = np.unique(curve["env_steps"])
    seeds = [curve[metric][curve["env_steps"] == step] for step in steps]
    (line,) = axis.plot(steps, [values.mean() for values in seeds], label=label)
    if len(seeds[0]) > 1:
        band = np.transpose([interval(values) for values in seeds])
        axis.fill_between(steps, *band, alpha=0.2, color=line.get_color())


def plot_bars(axis, curves: dict[str, str], metric: str, title: str) -> None:
    """The means of the last evaluations, with their intervals, in the colours of the lines."""
    for i, file in enumerate(curves.values()):
        values = last(read(file), metric)
        axis.barh(i, values.mean(), xerr=np.abs(np.array([interval(values)]).T - values.mean()), color=f"C{i}")
    axis.set_yticks(range(len(curves)), curves)
    axis.set_ylim(len(curves) - 0.5, -0.5)
    axis.set(xlabel=f"{title}, last evaluation", xlim=(0, None))
    axis.grid(axis="x", alpha=0.3)


def made_already(figure: Figure) -> bool:
    """Whether the CSVs of all its lines are there."""
    return all((RESULTS / f"{name}.csv").exists() for curves in figure.panels.values() for name in curves.values())


def png(figure) -> bytes:
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, dpi=130, metadata={"Software": None})  # no version of matplotlib in the file
    pyplot.close(figure)
    return file.getvalue()


def draw_curves(shown: Figure) -> bytes:
    from matplotlib import pyplot, ticker

    metrics, panels, bars = shown
    shape = (len(metrics) + bars, len(panels)) if len(panels) > 1 else (1, len(metrics) + bars)
    figure, axes = pyplot.subplots(
        *shape, figsize=(max(2.4 * shape[1], 9), 2.8 * shape[0]), squeeze=False,
        sharey="row" if len(panels) > 1 else False, layout="constrained",
    )  # fmt: skip
    spots = iter(axes.flat)
    for metric, title in metrics.items():
        row = []
        for panel, curves in panels.items():
            axis = next(spots)
            row.append(axis)
            for label, file in curves.items():
                plot(axis, read(file), metric, label)
            axis.set(title=panel if len(panels) > 1 else title, xlabel=clock(next(iter(curves.values()))))
            axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
            axis.grid(alpha=0.3)
        lowest = min(line.get_ydata().min() for axis in row for line in axis.lines)
        for axis in row:
            axis.set_ylim(0 if lowest >= 0 else None)
    for axis, curves in zip(spots, panels.values()):
        plot_bars(axis, curves, *next(iter(metrics.items())))
    if len(panels) > 1:
        for row, title in zip(axes, metrics.values()):
            row[0].set_ylabel(title.replace(", ", ",\n"))
    if len({tuple(curves) for curves in panels.values()}) == 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    else:
        for axis in axes[-1]:
            axis.legend(fontsize=7)
    return png(figure)


FAMILIES = "point_goal", "sparse_point_goal"
ADAPTATION = {
    "told the goal": ("{}_oracle", "eval/return_oracle"),
    "CoCOA": ("{}", "eval/return_adapted"),
    "PEARL": ("{}_pearl", "eval/return_adapted"),
    "CoCOA before adaptation": ("{}", "eval/return_prior"),
    "PEARL before adaptation": ("{}_pearl", "eval/return_prior"),
}
"""Label -> CSV of a family, metric."""


def draw_adaptation() -> bytes:
    """Normalised returns of cocoa.py on held-out tasks, a panel a family."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FAMILIES), figsize=(10, 3.6), layout="constrained")
    for axis, family in zip(axes, FAMILIES):
        for label, (file, metric) in ADAPTATION.items():
            plot(axis, normalised(family, file.format(family), metric), metric, label)
        axis.set(title=f"{family}: return on held-out goals", xlabel="environment steps")
        axis.set_ylabel("0: random policy, 1: told the goal")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return png(figure)


def draw_cocoa_choices() -> bytes:
    """What experiments/cocoa_choices.py measured: a dot a seed, a bar at the mean; the line is PEARL's mean."""
    from matplotlib import pyplot

    _, rows = lines("cocoa_choices")
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
    return png(figure)


def draw_value_map() -> bytes:
    """The critic's values over the U for three goals, from results/point_u_maze.json."""
    shown = what_pictures_show()
    maps = np.array(shown["maps"], float)
    return saved(pictures.draw_value_map, shown["goals"], shown["x"], shown["y"], maps)


def draw_trajectories() -> bytes:
    shown = what_pictures_show()
    return saved(pictures.draw_trajectories, np.array(shown["tracks"]), shown["track_goals"], shown["sampled"])


def draw_film() -> bytes:
    """Eight episodes of the trained demo, the last four with sampled actions."""
    shown = what_pictures_show()
    tracks = np.array(shown["tracks"])
    goals = np.repeat(np.array(shown["track_goals"])[:, None], tracks.shape[1], axis=1)
    states = envs.GoalState(tracks, tracks, goals, reward=None, terminated=None)
    sampled = np.array(shown["sampled"])
    return saved(lambda env, path: Path(pictures.film(env, states, sampled, str(path.with_suffix("")))))


def what_pictures_show() -> dict:
    """What experiments/runs.py published of the run point_u_maze."""
    return json.loads((RESULTS / "point_u_maze.json").read_text())


def saved(draw, *data) -> bytes:
    """What a function of shared/pictures.py that draws in the U puts into a file."""
    with tempfile.TemporaryDirectory() as folder:
        return draw(envs.make("point_u_maze"), *data, Path(folder, "picture.png")).read_bytes()


# ---- tables -------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def entry(values: np.ndarray, digits: int = 2) -> str:
    """Mean and interval of values (seeds,); of one seed, its value."""
    numbers = [values.mean(), *(interval(values) if len(values) > 1 else ())]
    mean, *ends = (f"{x:z.{digits}f}".replace("-", "\N{MINUS SIGN}") for x in numbers)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


DEMO = evaluation.SCORES.curves | {"eval/success_any": "uniform goals, mean action (as the paper evaluates)"}


def goals_table(name: str, root: str) -> str:
    """The four last evaluations of one run of crl.py in a maze."""
    curve = read(name)
    rows = [
        [title, entry(last(curve, metric)), entry(last(curve, metric.replace("success_any", "time_at_goal")), 0)]
        for metric, title in DEMO.items()
    ]
    _, *flags = made(name)["command"].removeprefix("python ").split()
    config = run.configure(crl.Config, crl.RECIPES, crl.__doc__, [crl.__name__, *flags])
    header = [
        f"last evaluation, {config.num_eval_envs} episodes a seed", "episodes that reach their goal",
        f"steps at the goal, of {config.episode_length}",
    ]  # fmt: skip
    text = f"`{made(name)['command']}`: {same_facts([name])}; [CSV]({root}results/{name}.csv)."
    return f"{text}\n\n{table(header, rows)}"


def depth_table(figure: str, what: str, name: str, root: str) -> str:
    """A row for each metric and panel, a column for each depth. `what`: a panel is; `name`: how its name is written."""
    panels = FIGURES[figure].panels
    rows = [
        [name.format(panel), title, *(entry(last(read(file), metric)) for file in curves.values())]
        for metric, title in SUCCESS.items()
        for panel, curves in panels.items()
    ]
    runs = [file for curves in panels.values() for file in curves.values()]
    text = f"`{made(runs[1])['command']}`, and so on: share of episodes that reach their goal at the last evaluation; "
    text += f"{same_facts(runs)}; all again: `python experiments/runs.py {figure}`."
    return f"{text}\n\n{table([what, 'evaluation', *next(iter(panels.values()))], rows)}"


def choices_table(figure: str, root: str) -> str:
    """A row for each run of crl.py in each panel: what was chosen, its flags, and its last evaluation."""
    panels = FIGURES[figure].panels
    default = made("point_u4_maze_depth_4")["command"].removesuffix(" --depth 4")
    rows = [
        [
            panel,
            label,
            f"`{made(name)['command'].removeprefix(default).strip()}` ([CSV]({root}results/{name}.csv))",
            *(entry(last(read(name), metric)) for metric in SUCCESS),
        ]
        for panel, curves in panels.items()
        for label, name in curves.items()
    ]
    text = f"`{default}` and these flags; "
    text += f"{same_facts([name for curves in panels.values() for name in curves.values()])}."
    return f"{text}\n\n{table(['', 'choice', 'flags', *SUCCESS.values()], rows)}"


def baselines_table(root: str) -> str:
    """A row for each method in each maze: steps at the goal, and how many goals were reached."""
    panels, shown = FIGURES["baselines"].panels, FIGURES["baselines"].metrics | SUCCESS
    everywhere = " --num_seeds 5 --total_env_steps 500000 --eval_every 50000"
    short = lambda name: made(name)["command"].replace(everywhere, "").removeprefix("python algorithms/")
    rows = [
        [label, f"`{short(name)}` ([CSV]({root}results/{name}.csv))"]
        + [entry(last(read(name), metric), 0 if "time" in metric else 2) for metric in shown]
        for curves in panels.values()
        for label, name in curves.items()
    ]
    text = f"Steps at the goal are those of mean actions at uniform goals. Each with `{everywhere.strip()}`; "
    text += f"{same_facts([name for curves in panels.values() for name in curves.values()])}; "
    text += "one maze again: `python experiments/runs.py baselines.u4`; another task: `experiments/compare.py`."
    return f"{text}\n\n{table(['method', 'command', *shown.values()], rows)}"


def same_facts(names: list[str], slack: float = 0.0) -> str:
    """Seeds, steps, device and commits of runs that were made together, with equal steps but for a share `slack` that
    whole iterations add."""
    facts, curves = [made(name) for name in names], [read(name) for name in names]
    shared = {(len(np.unique(c["seed"])), f["device"]) for c, f in zip(curves, facts)}
    steps = sorted({int(c["env_steps"].max()) for c in curves})
    if len(shared) > 1 or steps[-1] > (1 + slack) * steps[0]:
        raise SystemExit(
            f"error: runs of one table differ in seeds, device or steps {shared, steps}: {', '.join(names)}"
        )
    ((seeds, device),) = shared
    commits = ", ".join(sorted({fact["commit"][:7] + fact["commit"][40:] for fact in facts}))
    between = " to ".join(f"{number:,}" for number in dict.fromkeys((steps[0], steps[-1])))
    return f"{seeds} seeds, {between} environment steps each; {device}; commit {commits}"


def parts_table(figure: str, root: str, slack: float = 0.0) -> str:
    """The last evaluations of a figure, a row a line."""
    metrics, panels, _ = FIGURES[figure]
    rows = [
        [
            f"`{made(name)['command'].removeprefix('python algorithms/')}` ([CSV]({root}results/{name}.csv))",
            f"{panel}: {label}" if len(panels) > 1 else label,
            *(entry(last(read(name), metric)) for metric in metrics),
        ]
        for panel, parts in panels.items()
        for label, name in parts.items()
    ]
    text = f"{same_facts([name for parts in panels.values() for name in parts.values()], slack)}."
    return f"{text}\n\n{table(['command', 'what', *metrics.values()], rows)}"


def offline_table(root: str) -> str:
    """A row for each agent in each maze: the mean of its last three evaluations beside OGBench's."""
    rows, names = [], []
    for panel, curves in FIGURES["offline"].panels.items():
        for label, name in curves.items():
            published = OFFLINE[label.lower()]["large" in panel] if label.lower() in OFFLINE else ""
            link = f"[CSV]({root}results/{name}.csv)"
            rows.append([panel, f"{label} ({link})", entry(100 * last(read(name), "eval/score"), 0), str(published)])
            names.append(name)
    text = f"`{made(names[0])['command']}`, and so on: episodes that reach their goal, in percent, mean of the last "
    text += f"three evaluations; {same_facts(names).replace('environment', 'gradient')}; all again: "
    text += "`python experiments/runs.py offline`."
    return f"{text}\n\n{table(['data', 'agent', 'here', 'OGBench, a million steps'], rows)}"


def adaptation_table(root: str) -> str:
    rows = []
    for family in FAMILIES:
        for label, (file, metric) in ADAPTATION.items():
            name = file.format(family)
            scaled = last(normalised(family, name, metric), metric)
            command = made(name)["command"].removeprefix("python algorithms/")
            rows.append([
                family, label, f"`{command}` ([CSV]({root}results/{name}.csv))",
                entry(last(read(name), metric)), "1" if label == "told the goal" else entry(scaled),
            ])  # fmt: skip
    names = [file.format(family) for family in FAMILIES for file, _ in ADAPTATION.values()]
    text = f"{same_facts(names)}."
    header = ["family", "agent", "command", "return on held-out goals", "0: random policy, 1: told the goal"]
    return f"{text}\n\n{table(header, rows)}"


DEPTH = {
    "depth": "depth", "parameters": "parameters", "compile_s": "compile, s", "step_ms": "gradient step, ms",
    "gradient_steps_per_s": "gradient steps/s", "temporary_mb": "XLA temporaries, MB", "peak_mb": "peak memory, MB",
}  # fmt: skip
SCRIPTS = {
    "script": "script", "env": "environment", "compile_s": "compile, s", "env_steps_per_s": "environment steps/s",
    "gradient_steps_per_s": "gradient steps/s", "peak_mb": "peak memory, MB",
}  # fmt: skip
COLLECTION = {
    "env": "environment", "num_envs": "copies", "compile_s": "compile, s", "env_steps_per_s": "environment steps/s",
}  # fmt: skip
RATIOS = {name: name for name in ("ours, against the other", "ours", "other", "other / ours")}
UPDATE = {
    "setting": "setting", "variant": "variant", "compile_s": "compile, s", "step_ms": "ms",
    "ratio": "against crl.py as it is", "kernels": "kernels a step", "temporary_mb": "XLA temporaries, MB",
}  # fmt: skip


TASKS = {
    "env": "task", "distance": "distance", "success_any": "success", "time_at_goal": "time at goal",
    "episode_length": "survival", "episodes": "episodes", "compile_s_64": "compile, s", "steps_per_s_64": "steps/s",
}  # fmt: skip
WALLS = {
    "env": "task", "boxes_merged": "boxes merged", "boxes": "boxes", "steps_per_s_merged": "steps/s merged",
    "steps_per_s": "steps/s", "speed_up": "speed-up",
}  # fmt: skip
PHYSICS = {
    "body": "body", "physics": "physics", "compile_s": "compile, s", "steps_per_s": "steps/s", "deviation": "deviation",
}  # fmt: skip
FAMILY = {
    "family": "family", "random_return": "return", "standard_error": "standard error",
    "episode_length": "episode length", "compile_s": "compile, s", "steps_per_s": "steps/s",
}  # fmt: skip
METAWORLD = {
    "family": "family", "package": "package, one process", "one": "here, one worker", "two": "here, two workers",
    "ratio": "two workers against the package",
}  # fmt: skip
IMAGES = {"what": "gradient step", "seconds": "seconds", "ratio": "against torch"}
KERNELS = {"variant": "variant", "kernels": "kernels a step", "temporary_mb": "XLA temporaries, MB"}


def measured_table(name: str, titles: dict[str, str], root: str) -> str:
    """The columns of results/NAME.csv that have titles, under them."""
    (how,), rows = lines(name)
    whole = lambda number: f"{int(number):,}" if number.isdigit() else number
    how = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"commit \1", how)
    how = how.replace("python results/", "python experiments/")  # where the programs lay before
    text = f"`{how.replace('; ', '`; ', 1)}; [CSV]({root}results/{name}.csv)."
    return f"{text}\n\n{table(list(titles.values()), [[whole(row[column]) for column in titles] for row in rows])}"


# ---- pages --------------------------------------------------------------------------------------------------------

DRAWN = {
    **{f"{name}.png": partial(draw_curves, figure) for name, figure in FIGURES.items() if made_already(figure)},
    "point_u_maze_value_map.png": draw_value_map,
    "point_u_maze_trajectories.png": draw_trajectories,
    "point_u_maze.gif": draw_film,
    "adaptation.png": draw_adaptation,
    "cocoa_choices.png": draw_cocoa_choices,
}
"""File -> what draws it."""
TABLES = {
    "demo": partial(goals_table, "point_u_maze"),
    "pixels": partial(goals_table, "point_u_maze_pixels"),
    "depth": partial(depth_table, "point_depth", "maze", "`point_{}_maze`"),
    "choices": partial(choices_table, "point_choices"),
    "blocks": partial(choices_table, "point_blocks"),
    "width": partial(choices_table, "width"),
    "stitching": lambda root: parts_table("stitching", root),
    "baselines": baselines_table,
    "baselines_depth": partial(depth_table, "baselines_depth", "method", "{}"),
    "minicraft": lambda root: parts_table("achievements", root),
    "offline": offline_table,
    "distillation": lambda root: parts_table("distillation", root),
    "craftax": lambda root: parts_table("craftax", root),
    "meta_learning_point_goal": lambda root: parts_table("meta_learning_point_goal", root, slack=0.05),
    "meta_learning_half_cheetah_dir": lambda root: parts_table("meta_learning_half_cheetah_dir", root, slack=0.05),
    "adaptation": adaptation_table,
    "bench_depth": partial(measured_table, "bench_depth_cpu", DEPTH),
    "bench_scripts": partial(measured_table, "bench_scripts_cpu", SCRIPTS),
    "bench_envs": partial(measured_table, "bench_envs_cpu", COLLECTION),
    "bench_ratios": partial(measured_table, "bench_ratios_cpu", RATIOS),
    "bench_update": partial(measured_table, "bench_update_cpu", UPDATE),
    "bench_images": partial(measured_table, "bench_images_cpu", IMAGES),
    "gpu_kernels": partial(measured_table, "gpu_kernels", KERNELS),
    "tasks": partial(measured_table, "tasks_cpu", TASKS),
    "walls": partial(measured_table, "walls_cpu", WALLS),
    "families": partial(measured_table, "families_cpu", FAMILY),
    "metaworld": partial(measured_table, "metaworld_cpu", METAWORLD),
    "family_physics": partial(measured_table, "family_physics_cpu", PHYSICS),
}
"""Name in a page's comment -> what writes what follows it; takes the way from the page to the top folder."""
SPOT = re.compile(r"(<!-- experiments/figures\.py: (\w+) -->\n)(?:(?!<!-- ).)*?(<!-- end -->)", re.S)


def page(text: str, root: str) -> str:
    """A page with its tables written anew."""
    return SPOT.sub(lambda spot: f"{spot[1]}{TABLES[spot[2]](root)}\n{spot[3]}", text)


def main() -> None:
    matplotlib.use("agg")
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        raise SystemExit(f"error: {' '.join(sys.argv[1:])!r}; figures.py takes --check or nothing")
    contents = {RESULTS / name: draw for name, draw in DRAWN.items()}
    for name in PAGES:
        path = RESULTS.parent / name
        text = lambda path=path, name=name: page(path.read_text(), "../" * name.count("/")).encode()
        contents[path] = text
    differ = 0
    for path, content in contents.items():
        new = content()
        same = path.exists() and path.read_bytes() == new
        differ += not same
        print(
            f"{'same   ' if same else 'differs' if check else 'redrawn'} {path.relative_to(RESULTS.parent)}", flush=True
        )
        if not same and not check:
            path.write_bytes(new)
    if check and differ:
        raise SystemExit(f"error: {differ} of {len(contents)} differ from the CSVs; make figures redraws them")


if __name__ == "__main__":
    main()
