"""Environments by name; what each is, is on the page README.md beside this file."""

import difflib
import importlib
import inspect
from typing import Any

from envs import mazes
from envs.base import (
    AchievementEnv,
    AchievementState,
    Env,
    GoalEnv,
    GoalState,
    State,
    TaskFamily,
    TaskState,
    VectorEnv,
    VectorState,
    intact,
    select,
)

__all__ = [
    "AchievementEnv",
    "AchievementState",
    "Env",
    "GoalEnv",
    "GoalState",
    "State",
    "TaskFamily",
    "TaskState",
    "VectorEnv",
    "VectorState",
    "far_goals",
    "intact",
    "make",
    "make_kind",
    "names",
    "select",
]

# Physics backends take seconds to import, so each robot's file is imported when the robot is made.
IN_MAZES = {
    "point": "envs.point.PointMaze",
    "simple": "envs.simple.SimpleMaze",
    "ant": "envs.ant.Ant",
    "ant_ball": "envs.ant_objects.AntBall",
    "humanoid": "envs.humanoid.Humanoid",
}
"""Robots that take every maze, as `<robot>_<maze>`; their first argument is the maze."""
PIXELS = "_pixels"
"""What the name of a point maze ends in whose observations and goals are images."""
ARM_TASKS = ("reach", "push_easy", "push_hard", "binpick_easy", "binpick_hard", "binpick_easy_EEF", "grasp")
IN_THE_OPEN = {
    "ant": ("envs.ant.Ant", {"layout": None}),
    "ant_random_start": ("envs.ant.AntRandomStart", {"layout": None}),
    "ant_ball": ("envs.ant_objects.AntBall", {"layout": None}),
    "ant_push": ("envs.ant_objects.AntPush", {}),
    "humanoid": ("envs.humanoid.Humanoid", {"layout": None}),
    "humanoid_jaxgcrl": ("envs.humanoid.Humanoid", {"layout": None, "control_step": 0.015}),
    **{f"arm_{task}": ("envs.arm.Arm", {"task": task}) for task in ARM_TASKS},
    "reacher": ("envs.reacher.Reacher", {}),
    "pusher_easy": ("envs.pusher.Pusher", {"kind": "easy"}),
    "pusher_hard": ("envs.pusher.Pusher", {"kind": "hard"}),
    "pusher2": ("envs.pusher.Pusher2", {}),
    "half_cheetah": ("envs.half_cheetah.HalfCheetah", {}),
}
"""Other tasks with goals, with the arguments that make them."""
OGBENCH = {
    f"{robot}_{maze}": (path, {"layout": maze})
    for robot, path in {"pointmaze": "envs.ogbench_point.PointMaze", "antmaze": "envs.ogbench_ant.AntMaze"}.items()
    for maze in ("medium", "large", "giant", "teleport")
}
"""OGBench's mazes, which are tasks with goals too."""
WITH_ACHIEVEMENTS = {
    "craftax_classic_pixels": ("envs.crafter.CraftaxClassic", {"pixels": True}),
    "craftax_classic_symbolic": ("envs.crafter.CraftaxClassic", {"pixels": False}),
    "craftax_symbolic": ("envs.crafter.Craftax", {}),
    "crafter": ("envs.crafter_pool.Crafter", {}),
    "minicraft": ("envs.minicraft.Minicraft", {}),
}
"""Tasks without goals, but with achievements to unlock."""
FAMILIES = {
    "point_goal": ("envs.point.PointGoal", {}),
    "sparse_point_goal": ("envs.point.SparsePointGoal", {}),
    "half_cheetah_dir": ("envs.families.HalfCheetahDir", {}),
    "half_cheetah_vel": ("envs.families.HalfCheetahVel", {}),
    "ant_dir": ("envs.families.AntDir", {}),
    "ant_goal": ("envs.families.AntGoal", {}),
    "humanoid_dir": ("envs.families.HumanoidDir", {}),
    "walker_params": ("envs.families.WalkerParams", {}),
}
"""Task families (meta-RL)."""
THESIS_TASKS = (
    *("assembly", "bin_picking", "button_press_topdown_wall", "button_press_wall", "coffee_button", "coffee_pull"),
    *("dial_turn", "door_close", "door_lock", "drawer_close", "faucet_close", "hand_insert", "handle_press_side"),
    *("handle_pull", "peg_unplug_side", "pick_out_of_hole", "pick_place", "pick_place_wall", "plate_slide"),
    *("plate_slide_back_side", "push", "push_back", "push_wall", "reach", "reach_wall", "shelf_place", "soccer"),
    *("sweep", "sweep_into", "window_open"),
)
METAWORLD = {f"metaworld_{task}": ("envs.metaworld.MetaWorld", {"task": task}) for task in THESIS_TASKS}
"""Task families of Meta-World, those of the CoCOA thesis."""


def names() -> list[str]:
    """All names that `make` takes, but for stitching tasks of other distances than the published ones."""
    in_mazes = [f"{robot}_{maze}" for robot in IN_MAZES for maze in mazes.names()]
    in_pixels = [f"point_{maze}{PIXELS}" for maze in mazes.names()]
    return sorted([*in_mazes, *in_pixels, *IN_THE_OPEN, *OGBENCH, *WITH_ACHIEVEMENTS, *FAMILIES, *METAWORLD])


def make(name: str, /, **options: Any) -> Env:
    """The environment of this name, with options of its class.

    ValueError in one line, with the nearest names, if there is no such environment, maze or option.
    """
    path, arguments = _class_and_arguments(name)
    module, _, attribute = path.rpartition(".")
    robot_class = getattr(importlib.import_module(module), attribute)
    known = {o.name: o for o in inspect.signature(robot_class).parameters.values() if o.name not in arguments}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        kind = bool if isinstance(known[option].default, bool) else float
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, bool | int | float):
            wanted = "true or false" if kind is bool else "a number"
            raise ValueError(f"option {option} of {name} is {value!r}; it is {wanted}")
        arguments = {**arguments, option: kind(value)}
    env = robot_class(**arguments)
    env.name = name
    return env


def make_kind(name: str, kind: type[Env], /, **options: Any) -> Env:
    """`make` for a script that takes this kind only: GoalEnv, AchievementEnv or TaskFamily; else ValueError."""
    _class_and_arguments(name)  # an unknown name is no environment of another kind
    actual, script = GoalEnv, "crl.py"
    if name in WITH_ACHIEVEMENTS:
        actual, script = AchievementEnv, "ppo_ad.py"
    elif name in FAMILIES | METAWORLD:
        actual, script = TaskFamily, "cocoa.py"
    complaint = {
        GoalEnv: f"has no goals to reach; it is for {script}",
        AchievementEnv: f"has no achievements to unlock; take one of {', '.join(WITH_ACHIEVEMENTS)}, or run {script}",
        TaskFamily: f"is not a task family; take one of {', '.join(FAMILIES)} or of Meta-World, as metaworld_reach",
    }
    if actual is not kind:
        raise ValueError(f"{name} {complaint[kind]}")
    return make(name, **options)


def far_goals(name: str) -> str | None:
    """The name of the environment with the same walls and the far goals, on which a policy is evaluated, if any."""
    pixels = PIXELS if name.endswith(PIXELS) else ""
    far_name = f"{name.removesuffix(PIXELS).partition('_gen_')[0]}_eval{pixels}"
    return far_name if far_name in names() else None


def _class_and_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Where the class of an environment is, and the arguments that its name stands for; ValueError if there is none."""
    robot = max((robot for robot in IN_MAZES if name.startswith(f"{robot}_")), key=len, default="")
    without_maze = IN_THE_OPEN | OGBENCH | WITH_ACHIEVEMENTS | FAMILIES | METAWORLD
    if name in without_maze:
        return without_maze[name]
    if robot and (name in names() or "_gen_" in name):
        layout = name.removeprefix(f"{robot}_")
        if robot == "point" and layout.endswith(PIXELS):
            return "envs.point.PointMazePixels", {"layout": layout.removesuffix(PIXELS)}
        return IN_MAZES[robot], {"layout": layout}
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    listed = f"{', '.join(without_maze)}, and {', '.join(IN_MAZES)} with a maze: {', '.join(mazes.DRAWINGS)}"
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {listed}"
    raise ValueError(f"unknown environment {name!r}; {hint}")
