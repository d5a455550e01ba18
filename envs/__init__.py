"""Environments by name."""

import difflib
from functools import partial

from envs import mazes
from envs.base import Env, State, Transition, VectorEnv, VectorState

__all__ = ["Env", "State", "Transition", "VectorEnv", "VectorState", "make", "names"]


# Physics backends take seconds to import, so each robot's file is imported when the robot is made.
def _point(layout):
    from envs.point import PointMaze

    return PointMaze(layout)


def _ant(layout):
    from envs.ant import Ant

    return Ant(layout)


def _makers() -> dict:
    robots = {"point": _point, "ant": _ant}
    in_mazes = {f"{robot}_{layout}": partial(new, layout) for robot, new in robots.items() for layout in mazes.DRAWINGS}
    return in_mazes | {"ant": partial(_ant, None)}


def names() -> list[str]:
    """All names that `make` takes: `<robot>_<layout>` for every drawing in `envs/mazes.py`, and robots in the open."""
    return sorted(_makers())


def make(name: str) -> Env:
    """The environment of this name; ValueError in one line, with the nearest names, if there is none."""
    makers = _makers()
    if name not in makers:
        near = difflib.get_close_matches(name, makers, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(makers)}"
        raise ValueError(f"unknown environment {name!r}; {hint}")
    return makers[name]()
