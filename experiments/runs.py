"""The published runs, and the one command that redoes each: python experiments/runs.py NAME...

    python experiments/runs.py                            the names
    python experiments/runs.py point_u_maze               one run, then its CSV
    python experiments/runs.py point_depth.u4             the runs of a panel of a figure (experiments/figures.py)
    python experiments/runs.py point_depth                those of a whole figure
    python experiments/runs.py publish NAME FOLDER        the evaluations of a run made elsewhere, into NAME.csv

Two runs at a time. They go to runs/published/NAME: one that was stopped or killed there goes on, one that is done is
not trained again. A CSV holds the evaluations, a row a seed, under a comment that says how they were made: command,
commit, versions, device.
"""

import csv
import difflib
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import figures
import measure
from algorithms import crl
from shared import evaluation, pictures, run

RESULTS = Path(__file__).parent.parent / "results"
FOLDER = RESULTS.parent / "runs/published"

MAZES = ("u", "u4", "u5", "big")
DEPTHS = (4, 8, 16, 32)
BLOCKS = {
    "no_norm": "--norm none",
    "relu": "--activation relu",
    "no_residual": "--residual=false",
    "hyperspherical": "--norm hyperspherical",
}
"""Name -> flags of crl.py, of other blocks than the paper's."""


def _study(flags: str = "", maze: str = "u4_maze", script: str = "crl.py") -> str:
    command = f"{script} --env point_{maze} --num_seeds 5 --total_env_steps 500000 --eval_every 50000 {flags}"
    return command.rstrip()


def _point_goal(flags: str = "") -> str:
    return f"cocoa.py --num_seeds 3 {flags}".rstrip()


def _equal_steps() -> dict[str, str]:
    """The meta-learners with as many environment steps each."""
    points = "--total_env_steps 480_000 --eval_every 48_000 --num_seeds 3"
    pearl_points = f"{points.replace(' --eval', ' --updates_per_iteration 100 --eval')}"
    robot = "--env half_cheetah_dir --total_env_steps 512_000 --episode_length 100 --eval_every 64_000 --num_seeds 3"
    pearl_robot = (
        f"{robot} --initial_steps 1000 --prior_steps 400 --extra_steps 400 --tasks_per_iteration 4 "
        "--updates_per_iteration 150 --replay_size 600_000 --batch_size 128 --width 128 --encoder_width 128"
    )
    runs = {
        "point_goal_rl2": f"rl2.py {points}",
        "point_goal_maml": f"maml.py {points}",
        "half_cheetah_dir_rl2": f"rl2.py {robot} --num_episodes 2 --num_trials 32 --reward_scale 1 --update_epochs 8 "
        "--eval_repeats 4",
        "half_cheetah_dir_maml": f"maml.py {robot} --num_tasks 16 --num_episodes 10 --eval_repeats 4",
    }
    for agent, flag in {"cocoa": "", "pearl": "--contrastive=false ", "oracle": "--context=oracle "}.items():
        runs[f"point_goal_{agent}"] = f"cocoa.py {flag}{pearl_points}"
        runs[f"half_cheetah_dir_{agent}"] = f"cocoa.py {flag}{pearl_robot}"
    return {f"{name}_equal_steps": command for name, command in runs.items()}


def _reach(flags: str = "") -> str:
    short = "--total_env_steps 300_000 --initial_steps 1000 --tasks_per_iteration 10 --prior_steps 400 "
    short += "--extra_steps 400 --updates_per_iteration 1000 --replay_size 400_000 --batch_size 128 --width 128 "
    short += "--encoder_width 64 --eval_every 25_000 --exploration_episodes 2 --eval_episodes 3"
    return f"cocoa.py --env metaworld_reach {flags}--num_seeds 3 {short}"


def _offline(env: str, flags: str, width: int = 128) -> str:
    small = f"--num_seeds 3 --width {width} --latent_size 64 --batch_size 256 --total_gradient_steps 10_000"
    return f"crl_offline.py --env {env} {flags} {small} --chunk 500 --eval_every 1000 --checkpoint_every 1000"


RUNS = {
    "point_u_maze": "crl.py --num_seeds 5",
    "point_u_maze_pixels": "crl.py --env point_u_maze_pixels --num_seeds 3",
    **{
        f"point_{maze}_maze_depth_{depth}": _study(f"--depth {depth}", f"{maze}_maze")
        for depth in DEPTHS
        for maze in MAZES
    },
    "point_u4_maze_fixed": _study("--goals fixed"),
    "point_u4_maze_resampled_no_switch": _study("--goal_switch_probability 0"),
    "point_u4_maze_fixed_no_switch": _study("--goals fixed --goal_switch_probability 0"),
    "point_u4_maze_published_relabelling": _study("--relabel published"),
    **{f"point_u4_maze_{energy}": _study(f"--energy {energy}") for energy in ("l2", "dot", "cosine")},
    "point_u4_maze_cosine_no_penalty": _study("--energy cosine --logsumexp_penalty 0"),
    **{f"point_u4_maze_{loss}": _study(f"--loss {loss}") for loss in ("bwd_infonce", "sym_infonce", "binary_nce")},
    **{
        f"point_{maze}_maze_{name}": _study(flags, f"{maze}_maze", script)
        for label, (name, script, flags) in figures.METHODS.items()
        for maze in ("u", "u4")
        if label != "CRL"  # which is there already, with its depth
    },
    "point_u4_maze_published_depth_32": _study("--published --depth 32"),
    "point_u4_maze_published_exact_depth_32": _study("--published --log_prob_epsilon 0 --depth 32"),
    "point_u4_maze_mrn": _study("--energy mrn"),
    **{
        f"point_u4_maze_{name}_depth_{depth}": _study(f"{flags} --depth {depth}")
        for depth in (16, 32)
        for name, flags in BLOCKS.items()
    },
    **{
        f"point_u4_maze_{name}_depth_{depth}": _study(f"{flags} --depth {depth}".strip(), script=script)
        for depth in (16, 32)
        for name, script, flags in map(figures.METHODS.get, ("SAC + HER", "TD3 + HER", "GCBC"))
    },
    **{f"point_u4_maze_width_{width}": _study(f"--width {width}") for width in (128, 256)},
    **{
        f"point_u4_maze_actor_{actor}_critic_{critic}": _study(f"--actor_depth {actor} --critic_depth {critic}")
        for actor in (4, 8, 16)
        for critic in (4, 8, 16)
        if actor != critic
    },
    **{
        f"point_u4_maze_depth_{depth}_batch_{batch}": _study(f"--depth {depth} --batch_size {batch}")
        for depth in (4, 16)
        for batch in (64, 128, 512)
    },
    **{
        f"point_u_maze_stitching_depth_{depth}": _study(f"--depth {depth}", "u_maze_gen_1f2f3f") for depth in (4, 8, 16)
    },
    **{
        f"point_u4_maze_collector_{depth}": _study(f"--depth {depth}", script="experiments/collectors.py")
        for depth in (4, 16)
    },
    "minicraft": "ppo_ad.py --num_seeds 5",
    "minicraft_matching": "ppo_ad.py --num_seeds 5 --prediction=false",
    "minicraft_prediction": "ppo_ad.py --num_seeds 5 --matching=false",
    "minicraft_regularisers": "ppo_ad.py --num_seeds 5 --temperature 1e9",
    "minicraft_no_memory": "ppo_ad.py --num_seeds 5 --memory=false",
    "minicraft_plain": "ppo_ad.py --num_seeds 5 --distill=false",
    **{f"minicraft_temperature_{each}": f"ppo_ad.py --num_seeds 5 --temperature {each}" for each in (0.03, 0.3, 1)},
    **{f"minicraft_every_{each}": f"ppo_ad.py --num_seeds 5 --auxiliary_every {each}" for each in (2, 4, 16)},
    "minicraft_after": "ppo_ad.py --num_seeds 5 --achievement after",
    "craftax": "ppo_ad.py --env craftax_classic_symbolic --latent_size 256 --num_seeds 5",
    "craftax_plain": "ppo_ad.py --env craftax_classic_symbolic --latent_size 256 --num_seeds 5 --distill=false",
    "point_goal": _point_goal(),
    "point_goal_pearl": _point_goal("--contrastive=false"),
    "point_goal_oracle": _point_goal("--context=oracle"),
    "point_goal_published_evaluation": _point_goal("--exploration_episodes 1 --eval_episodes 3"),
    "point_goal_rl2": "rl2.py --num_seeds 3",
    "point_goal_maml": "maml.py --num_seeds 3",
    "sparse_point_goal": "cocoa.py --env sparse_point_goal --num_seeds 3",
    "sparse_point_goal_pearl": "cocoa.py --env sparse_point_goal --num_seeds 3 --contrastive=false",
    "sparse_point_goal_oracle": "cocoa.py --env sparse_point_goal --num_seeds 3 --context=oracle",
    **_equal_steps(),
    "metaworld_reach_cocoa": _reach(),
    "metaworld_reach_pearl": _reach("--contrastive=false "),
    "metaworld_reach_oracle": _reach("--context=oracle "),
    **{
        f"pointmaze_{maze}_{agent}": _offline(f"pointmaze_{maze}", f"--agent {agent}")
        for maze in ("medium", "large")
        for agent in ("gcbc", "crl", "qrl")
    },
    **{
        f"pointmaze_medium_crl_depth_{depth}": _offline("pointmaze_medium", f"--depth {depth}", 64) for depth in (4, 16)
    },
    "ant": "crl.py --env ant --num_envs 128 --updates_per_chunk 200 --batch_size 256 --total_env_steps 10000000",
}
"""Name of the CSV -> the command: a script, of algorithms/ where no folder is named, and its flags."""

PICTURES = ("point_u_maze",)
"""Runs whose pictures are shown too."""
PROVENANCE = ("command", "commit", "versions", "device")
KEPT = tuple(f"train/{name}" for name in ("return", "episode_length", "episodes", "score", "reward", "entropy"))
"""Columns of training that are published too."""


def provenance(folder) -> dict:
    """How the run in a folder was made: command, commit, versions and device; commands that extended it, if any, and
    where it went on under another commit, version or device."""
    made = json.loads((Path(folder) / "config.json").read_text())
    first, *later = ({key: start[key] for key in PROVENANCE} for start in [made, *made.get("resumed", [])])
    for start in [first, *later]:  # without paths of one machine
        start["command"] = re.sub(r"^\S+|(?<= )--(run_dir|resume)[= ]\S+ ?", "", f"{start['command']} ").strip()
        start["command"] = f"python {start['command']}"
    extended = [start["command"] for start in later if "--total_" in start["command"]]
    elsewhere = [start for start in later if {**start, "command": ""} != {**first, "command": ""}]
    return first | ({"extended": extended} if extended else {}) | ({"resumed": elsewhere} if elsewhere else {})


def publish(name: str | Path, folder) -> None:
    """Writes the evaluations in the metrics.csv of a run folder to results/NAME.csv, or to NAME.csv where NAME is a
    whole path; SystemExit if it has none."""
    try:
        with (Path(folder) / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise SystemExit(f"error: {folder} is no run folder: {error}") from None
    rows = [row for row in rows if any(row[column] for column in row if column.startswith("eval/"))]
    if not rows:
        raise SystemExit(f"error: the run in {folder} was not evaluated yet; go on with it, or lower --eval_every")
    columns = [column for column in rows[0] if column in KEPT or not column.startswith(("train/", "auxiliary/"))]
    measure.write(name, json.dumps(provenance(folder)), [{column: row[column] for column in columns} for row in rows])


def publish_pictures(name: str, folder) -> None:
    """Writes what the pictures of a run of crl.py show, of its first seed, to results/NAME.json: the paths of eight
    episodes, and the critic's values for three goals."""
    config, env, agent = crl.load(folder)
    _, far_env = evaluation.make_envs(config)
    policy, key = partial(crl.policy, agent), run.evaluation_key(jax.random.key(config.seed))
    states, sampled = pictures.eight_episodes(env, far_env, policy, config.episode_length, key)
    goals = pictures.three_goals(far_env or env)
    x, y, maps = pictures.value_map(env, partial(crl.value, config, agent), jnp.asarray(goals))
    rounded = lambda x: np.where(np.isnan(x), None, np.round(np.asarray(x, float), 3)).tolist()
    shown = {
        "made": provenance(folder),
        "tracks": rounded(env.achieved_goal(jnp.asarray(states.observation))[..., :2]),
        "track_goals": rounded(states.goal[:, 0, :2]),
        "sampled": sampled.tolist(),
        "goals": rounded(goals),
        "x": rounded(x),
        "y": rounded(y),
        "maps": rounded(maps),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(shown) + "\n")


def typed(command: str) -> str:
    """A command of RUNS as one types it."""
    return f"python {'' if '/' in command.split()[0] else 'algorithms/'}{command}"


def train(command: str, folder: Path, name: str) -> None:
    """Trains by a command of RUNS into a folder, or goes on with what is there. What it prints is passed on."""
    _, script, *flags = shlex.split(typed(command))
    flags += ["--run_dir", str(folder)]
    if (folder / "config.json").exists():
        there = provenance(folder)
        made_by = ", then ".join([there["command"], *there.get("extended", [])])
        if made_by != typed(command):
            raise SystemExit(f"error: {folder} holds a run of {made_by!r}; delete it to train {name} anew")
        if there["commit"] != run.commit():
            raise SystemExit(f"error: {folder} was begun at commit {there['commit']}; delete it to train {name} anew")
        print(f"{name}: going on with {folder}")
        flags = ["--resume", str(folder)]
    process = subprocess.Popen(
        [sys.executable, script, *flags],
        cwd=RESULTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
    if process.wait():
        raise SystemExit(f"error: {name} failed, see above; the same command goes on with it")


def groups() -> dict[str, list[str]]:
    """The runs of each figure and of each panel with a name of its own."""
    files = dict.fromkeys(file for file, _ in figures.ADAPTATION.values())
    found = {"adaptation": [file.format(family) for family in figures.FAMILIES for file in files]}
    for name, figure in figures.FIGURES.items():
        panels = {f"{name}.{panel}": list(curves.values()) for panel, curves in figure.panels.items()}
        found |= {name: [known for runs in panels.values() for known in runs], **panels}
    return found


def choose(names: list[str]) -> list[str]:
    """The runs that names of runs, figures and panels stand for; SystemExit, with the nearest, if one is unknown."""
    known = {**groups(), **{name: [name] for name in RUNS}}
    for name in names:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "nothing"
            raise SystemExit(f"error: no run, figure or panel is named {name!r}; near it: {near}")
    return [run for run in RUNS if any(run in known[name] for name in names)]


def train_all(chosen: list[str]) -> None:
    """Trains these runs of RUNS, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: train(RUNS[name], FOLDER / name, name), chosen))


def redo(chosen: list[str]) -> None:
    """Trains and publishes these runs of RUNS."""
    train_all(chosen)
    for name in chosen:
        publish(name, FOLDER / name)
        if name in PICTURES:
            publish_pictures(name, FOLDER / name)


def main() -> None:
    names = sys.argv[1:]
    if names[:1] == ["publish"]:
        if len(names) != 3:
            raise SystemExit("error: publish takes a name and a run folder")
        publish(*names[1:])
    elif not names or names[0].startswith("-"):
        print(__doc__)
        for name, command in RUNS.items():
            print(f"{name:40s} {typed(command)}")
        for name, runs in groups().items():
            print(f"{name:40s} {len(runs)} runs: {runs[0]} ...")
    else:
        redo(choose(names))


if __name__ == "__main__":
    main()
