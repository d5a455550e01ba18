"""Environments by name."""

import difflib

from envs import point
from envs.base import Env, State, Transition, VectorEnv, VectorState

__all__ = ["Env", "State", "Transition", "VectorEnv", "VectorState", "make", "names"]


def _makers() -> dict:
    return point.register()


def names() -> list[str]:
    """All names that `make` takes."""
    return sorted(_makers())


def make(name: str) -> Env:
    """The environment of this name; ValueError in one line, with the nearest names, if there is none."""
    makers = _makers()
    if name not in makers:
        near = difflib.get_close_matches(name, makers, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see envs.names()"
        raise ValueError(f"unknown environment {name!r}; {hint}")
    return makers[name]()
