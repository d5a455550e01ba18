"""Every task by its name, and the page that describes them."""

import contextlib
import csv
import importlib
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from stubs import Sizes

import envs
from envs import mazes

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "envs" / "README.md").read_text()
PAPER = {
    # observation, goal, action, success radius, control step: the published ones
    "ant_u4_maze": (29, 2, 8, 0.5, 0.05),
    "ant_u5_maze": (29, 2, 8, 0.5, 0.05),
    "ant_big_maze": (29, 2, 8, 0.5, 0.05),
    "ant_hardest_maze": (29, 2, 8, 0.5, 0.05),
    "humanoid": (268, 3, 17, 0.5, 0.03),
    "humanoid_u_maze": (268, 3, 17, 0.5, 0.015),
    "humanoid_big_maze": (268, 3, 17, 0.5, 0.015),
    "arm_push_easy": (17, 3, 5, 0.1, 0.05),
    "arm_push_hard": (17, 3, 5, 0.1, 0.05),
    "arm_binpick_hard": (17, 3, 5, 0.1, 0.05),
}
OTHERS = {
    "ant": (29, 2, 8, 0.5, 0.05),
    "ant_u_maze_gen_1f2f3f": (29, 2, 8, 0.5, 0.05),
    "ant_random_start": (29, 2, 8, 0.5, 0.05),
    "ant_ball": (31, 2, 8, 0.5, 0.05),
    "ant_ball_u_maze": (31, 2, 8, 0.5, 0.05),
    "ant_push": (31, 2, 8, 0.5, 0.05),
    "humanoid_jaxgcrl": (268, 3, 17, 0.5, 0.015),
    "humanoid_hardest_maze": (268, 3, 17, 0.5, 0.015),
    "arm_reach": (13, 3, 4, 0.1, 0.05),
    "arm_binpick_easy": (17, 3, 5, 0.1, 0.05),
    "arm_binpick_easy_EEF": (10, 3, 4, 0.1, 0.05),
    "arm_grasp": (23, 7, 5, 0.1, 0.05),
    "reacher": (10, 3, 2, 0.05, 0.02),
    "pusher_easy": (20, 3, 7, 0.1, 0.05),
    "pusher_hard": (20, 3, 7, 0.1, 0.05),
    "pusher2": (23, 6, 7, 0.1, 0.05),
    "half_cheetah": (18, 1, 6, 0.5, 0.05),
    "simple_u_maze": (4, 2, 2, 0.5, 0.05),
    "point_u_maze": (2, 2, 2, 0.25, None),
}
NOT_DRAWN = {"ant_random_start", "ant_u_maze_gen_1f2f3f", "humanoid_jaxgcrl", "humanoid_hardest_maze"}
ROWS = {row.split("`")[1]: row.split(" | ") for row in re.findall(r"^\| `.*", PAGE, re.M) if row.count(" | ") == 7}


@pytest.mark.parametrize("name", [*PAPER, *OTHERS])
def test_sizes_are_the_published_ones_and_those_of_the_states(name):
    """Traced, not run: the robots' own tests run them."""
    env = envs.make(name)
    observation, goal, action, radius, step = (PAPER | OTHERS)[name]
    assert (env.observation_size, len(env.goal_indices), env.action_size) == (observation, goal, action)
    assert env.name == name
    assert env.success_radius == radius
    assert env.control_step == pytest.approx(step)
    state = jax.eval_shape(env.reset, jax.random.key(0))
    after = jax.eval_shape(env.step, state, jax.ShapeDtypeStruct((action,), jnp.float32))
    for now in (state, after):
        chex.assert_shape([now.observation, now.goal, now.reward, now.terminated], [(observation,), (goal,), (), ()])
        chex.assert_type(now.terminated, bool)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert jax.eval_shape(env.sample_goal, jax.random.key(0)).shape == (goal,)
    if env.maze:
        placed = jax.eval_shape(env.place, jnp.zeros(2), jnp.zeros(2))
        assert jax.tree.structure(placed) == jax.tree.structure(state)


def test_names_are_every_task_and_every_robot_in_every_maze():
    names = envs.names()
    assert {*PAPER, *OTHERS} <= set(names)
    assert {
        f"{robot}_{maze}" for robot in ("point", "simple", "ant", "ant_ball", "humanoid") for maze in mazes.DRAWINGS
    } <= (set(names))
    assert len(names) == len(set(names)) and names == sorted(names)
    assert set(envs.IN_THE_OPEN) <= {*PAPER, *OTHERS}


def test_options_are_those_of_the_class_and_wrong_ones_are_refused_in_one_line():
    assert envs.make("humanoid", control_step=0.02).control_step == pytest.approx(0.02)
    assert envs.make("humanoid_u_maze", goal_in_state=False).observation_size == 246
    for name, options, complaint in (
        ("ant", {"walls": True}, "ant has no option 'walls'; it has merged_walls"),
        ("ant_u_maze", {"merged_walls": "no"}, "option merged_walls of ant_u_maze is 'no'; it is true or false"),
        ("humanoid", {"control_step": "fast"}, "option control_step of humanoid is 'fast'; it is a number"),
        ("humanoid", {"control_step": True}, "option control_step of humanoid is True; it is a number"),
        ("reacher", {"layout": 1}, "reacher has no option 'layout'; it has none"),
        ("arm_reach", {"task": "push_easy"}, "arm_reach has no option 'task'; it has all_contacts"),
    ):
        with pytest.raises(ValueError) as error:
            envs.make(name, **options)
        assert str(error.value) == complaint


KINDS = {
    "point_u_maze": envs.GoalEnv,
    "minicraft": envs.AchievementEnv,
    "point_goal": envs.TaskFamily,
}


@pytest.mark.parametrize("name", KINDS)
def test_an_environment_has_one_kind_and_its_states_have_that_kinds_fields(name):
    env = envs.make_kind(name, KINDS[name])
    assert env.name == name and [kind for kind in KINDS.values() if isinstance(env, kind)] == [KINDS[name]]
    fields = {"goal", "task", "achievements"} & set(jax.eval_shape(env.reset, jax.random.key(0))._fields)
    assert fields == {{"point_u_maze": "goal", "minicraft": "achievements", "point_goal": "task"}[name]}
    assert hasattr(env, "goal_indices") == hasattr(env, "success_radius") == (name == "point_u_maze")


def test_make_kind_takes_every_name_as_what_its_class_is(monkeypatch):
    monkeypatch.setattr(envs, "make", lambda name: Sizes(1, 1, 1))
    for name in envs.names():
        module, _, attribute = envs._class_and_arguments(name)[0].rpartition(".")
        env_class = getattr(importlib.import_module(module), attribute)
        for kind in KINDS.values():
            refused = contextlib.nullcontext() if issubclass(env_class, kind) else pytest.raises(ValueError, match=name)
            with refused:
                envs.make_kind(name, kind)


@pytest.mark.parametrize(
    ("name", "kind", "complaint"),
    [
        ("minicraft", envs.GoalEnv, "has no goals to reach; it is for ppo_ad.py"),
        ("point_goal", envs.GoalEnv, "has no goals to reach; it is for cocoa.py"),
        ("ant_u_maze", envs.AchievementEnv, "has no achievements to unlock; take one of {games}, or run crl.py"),
        ("point_goal", envs.AchievementEnv, "has no achievements to unlock; take one of {games}, or run cocoa.py"),
        ("half_cheetah", envs.TaskFamily, "is not a task family; take one of {families}"),
        ("minicraft", envs.TaskFamily, "is not a task family; take one of {families}"),
    ],
)
def test_an_environment_of_another_kind_is_refused_in_one_line(name, kind, complaint, monkeypatch):
    """Before its file is imported, which takes seconds."""
    monkeypatch.setattr(envs, "importlib", None)
    complaint = complaint.format(
        games=", ".join(envs.WITH_ACHIEVEMENTS),
        families=", ".join(envs.FAMILIES) + " or of Meta-World, as metaworld_reach",
    )
    with pytest.raises(ValueError) as error:
        envs.make_kind(name, kind)
    assert str(error.value) == f"{name} {complaint}"


def test_an_unknown_name_is_no_environment_of_another_kind_and_options_are_those_of_make():
    with pytest.raises(
        ValueError, match=r"^unknown environment 'craftax_pixels'; did you mean .*craftax_classic_pixels"
    ):
        envs.make_kind("craftax_pixels", envs.AchievementEnv)
    with pytest.raises(ValueError, match=r"^minicraft has no option 'size'; it has none$"):
        envs.make_kind("minicraft", envs.AchievementEnv, size=3)
    for option in ("name", "kind"):  # no clash with the functions' own arguments
        with pytest.raises(ValueError, match=rf"^reacher has no option '{option}'; it has none$"):
            envs.make_kind("reacher", envs.GoalEnv, **{option: 1})
    assert envs.make_kind("humanoid_u_maze", envs.GoalEnv, goal_in_state=False).observation_size == 246


@pytest.mark.parametrize("name", [name for name in {**PAPER, **OTHERS} if name in ROWS])
def test_the_pages_table_says_what_the_task_is(name):
    env = envs.make(name)
    _, observation, goal, action, _, success, simulator, step = (cell.strip(" |") for cell in ROWS[name])
    sizes = [int(cell.split(":")[0]) for cell in (observation, goal, action)]
    assert sizes == [env.observation_size, len(env.goal_indices), env.action_size]
    radii = [f"{env.success_radius:g}", *(f"{which} {radius:g}" for which, radius in env.other_radii.items())]
    assert success == "; ".join(radii)
    assert simulator == env.simulator
    assert step == ("" if env.control_step is None else f"{env.control_step:g}")


def test_the_page_has_every_task_with_its_picture():
    assert len(ROWS) > 20
    for name in {*PAPER, *OTHERS} - NOT_DRAWN:
        assert f"`{name}`" in PAGE and f"(pictures/{name}.png)" in PAGE
        assert (ROOT / "envs" / "pictures" / f"{name}.png").exists()
    for name in NOT_DRAWN - {"humanoid_hardest_maze"}:
        assert f"`{name}`" in PAGE


def table(name: str) -> dict[str, dict[str, str]]:
    lines = (ROOT / "results" / name).read_text().splitlines()
    return {row["env"]: row for row in csv.DictReader(line for line in lines if not line.startswith("#"))}


def test_the_pages_measured_tables_are_those_of_results():
    tasks, walls = table("tasks_cpu.csv"), table("walls_cpu.csv")
    assert {*PAPER, *OTHERS} <= set(tasks)
    shown = {
        name: [cell.strip().replace(",", "") for cell in rest.split("|")]
        for section in re.findall(r"\n## A random policy.*?(?=\n## |\Z)", PAGE, re.DOTALL)
        for name, rest in re.findall(r"^\| (\w+) \| (.*) \|$", section, re.MULTILINE)
        if len(rest.split("|")) == 7 and name != "task"
    }
    columns = ["distance", "success_any", "time_at_goal", "episode_length", "episodes"]
    columns += ["compile_s_64", "steps_per_s_64"]
    assert shown == {name: [row[column] for column in columns] for name, row in tasks.items()}
    for name, row in walls.items():
        columns = ["boxes_merged", "boxes", "steps_per_s_merged", "steps_per_s", "speed_up"]
        assert f"| {name} | {' | '.join(row[column] for column in columns)} |" in PAGE.replace(",", "")


def test_a_random_humanoid_falls_as_the_published_one():
    """It survives about 40 steps of 0.03 s."""
    assert 35 < float(table("tasks_cpu.csv")["humanoid"]["episode_length"]) < 45
