"""The README's own instructions, followed to the letter in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = (
    "--total_env_steps 1200 --num_envs 8 --episode_length 20 --unroll_length 20 --min_replay_size 40 "
    "--max_replay_size 60 --updates_per_chunk 2 --batch_size 16 --width 16 --num_eval_envs 4"
)
SHOWN = "episodes that reach their goal: uniform goals"
"""What a run prints after an evaluation."""


@pytest.fixture
def clone(tmp_path, cache, monkeypatch):
    for name, value in (cache | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}).items():
        monkeypatch.setenv(name, value)
    for folder in ("algorithms", "envs", "experiments", "shared"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    return tmp_path


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)^## ", README, re.M | re.S)[1]


def command_in(text: str) -> list[str]:
    """The one command `python algorithms/...` that a section gives."""
    (command,) = re.findall(r"`python (algorithms/[^`]+)`", text)
    return command.split()


def run_in(clone: Path, command: list[str], *flags: str) -> str:
    """What Python prints for this command in the copy."""
    done = subprocess.run(
        [sys.executable, *command, *flags],
        cwd=clone, env={**os.environ, "PYTHONPATH": str(clone)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def apply(diff: str, text: str) -> str:
    """Applies a diff without line numbers: `...` lies between places, each of which is found once."""
    for place in diff.split("...\n"):
        rows = place.splitlines()
        old = "".join(row[1:] + "\n" for row in rows if row[:1] in "- ")
        new = "".join(row[1:] + "\n" for row in rows if row[:1] in "+ ")
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_fork_with_another_energy_takes_under_ten_lines_and_trains(clone):
    text = section("Forking")
    (diff,) = re.findall(r"```diff\n(.*?)```", text, re.S)
    assert sum(line[0] in "+-" for line in diff.splitlines()) < 10
    (copied,) = re.findall(r"`(cp [^`]+)`", text)
    subprocess.run(copied.split(), cwd=clone, check=True)
    fork = clone / "algorithms/my_crl.py"
    fork.write_text(apply(diff, fork.read_text()))
    assert SHOWN in run_in(clone, command_in(text), *TINY.split(), "--run_dir", "run")
    check = """
import numpy as np
from algorithms import my_crl
phi, psi = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
logits = [[-sum(abs(a - b) for a, b in zip(x, y)) for y in psi] for x in phi]
np.testing.assert_allclose(my_crl.pairwise_energy(phi, psi, "l1"), logits, rtol=1e-5)
np.testing.assert_allclose(my_crl.energy(phi, psi, "l1"), np.diag(logits), rtol=1e-5)
"""
    run_in(clone, ["-c", check])


def test_the_papers_ablations_are_flags():
    rows = re.findall(r"^\| ([\w ]+) \| `(--\w+=\w+)` \|$", section("Forking"), re.M)
    assert dict(rows) == {
        "skip connection": "--residual=false",
        "LayerNorm": "--norm=none",
        "swish": "--activation=relu",
    }


def test_a_trained_agent_is_loaded_in_three_lines(clone):
    run_in(clone, ["algorithms/crl.py", "--residual=false", "--norm=none"], *TINY.split(), "--run_dir", "run")
    (lines,) = re.findall(r"```python\n(.*?)```", section("A trained agent in three lines"), re.S)
    assert lines.count("RUN_FOLDER") == 1
    said = run_in(clone, ["-c", lines.replace("RUN_FOLDER", "run")])
    assert re.fullmatch(r"distance to the goal: \d+\.\d\d\n", said)
    commands = re.findall(r"^python (experiments.*?) *#", section("Watching, comparing, playing"), re.M)
    watch, below, play, play_elsewhere, compare, paper = (
        re.sub(r"RUN_FOLDER(\.\.\.)?", "run", command).split() for command in commands
    )
    assert below[1:] == ["runs/crl"]
    assert compare[0] == "experiments/compare.py"  # hours; its own test has it without the training
    assert "does width do what depth does?" in run_in(clone, paper)
    table = run_in(clone, watch)
    assert re.search(r"^\| point_u_maze \| 1 \| 1,280 \| \d\.\d\d \|$", table, re.M) and (clone / "watch.png").exists()
    for command in (play, play_elsewhere):
        assert re.search(r"^success_any +\d", run_in(clone, command), re.M)
        (clone / "film.gif").unlink()


def test_a_maze_that_is_drawn_exists_for_every_robot_and_trains(clone):
    text = section("Adding a maze")
    (drawing,) = re.findall(r"```\n(    \".*?)```", text, re.S)
    path = clone / "envs/mazes.py"
    mazes = path.read_text()
    assert mazes.count("DRAWINGS = {\n") == 1
    path.write_text(mazes.replace("DRAWINGS = {\n", "DRAWINGS = {\n" + drawing))
    assert SHOWN in run_in(clone, command_in(text), *TINY.split(), "--run_dir", "run")
    assert (clone / "run/value_map.png").exists()
    check = """
import envs
for robot in ("point", "ant", "humanoid"):
    maze = envs.make(f"{robot}_zigzag").maze
    assert maze.cells == ("#######", "#R#GGG#", "#...#G#", "#######"), maze
    assert envs.far_goals(f"{robot}_zigzag") is None
envs.mazes.DRAWINGS["zigzag_eval"] = envs.mazes.DRAWINGS["zigzag"].replace("#GGG#", "#...#")
assert envs.far_goals("point_zigzag") == "point_zigzag_eval"
"""
    run_in(clone, ["-c", check])


def test_an_environment_of_ones_own_is_a_class_and_a_line(clone):
    text = re.search(r"^## An environment of your own\n(.*?)^## ", (ROOT / "envs/README.md").read_text(), re.M | re.S)[
        1
    ]
    cart, _, pendulum = text.partition("### One of Gymnasium")
    blocks = lambda text: re.findall(r"```(?:python)?\n(.*?)```", text, re.S)
    code, line = blocks(cart)
    assert code.count("\n") < 32
    (clone / "envs/cart.py").write_text(code)
    worker, family, family_line = blocks(pendulum)
    (clone / "envs/pendulum_worker.py").write_text(worker)
    (clone / "envs/pendulum.py").write_text(family)
    path = clone / "envs/__init__.py"
    names = path.read_text().replace("IN_THE_OPEN = {\n", "IN_THE_OPEN = {\n" + line)
    path.write_text(names.replace("\nFAMILIES = {\n", "\nFAMILIES = {\n" + family_line))
    assert SHOWN in run_in(clone, [*command_in(cart), *TINY.split()], "--run_dir", "run")
    assert (clone / "run/rollout.html").exists()
    small = "--total_env_steps 400 --num_trials 4 --num_episodes 2 --episode_length 20 --width 8"
    said = run_in(clone, [*command_in(pendulum), *small.split()], "--run_dir", "pendulum")
    assert "50 train tasks, 10 test tasks, by Pendulum in" in said and (clone / "pendulum/rollout.png").exists()
