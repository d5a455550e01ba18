"""Robots made of rigid bodies: what all of them share, whatever steps their physics."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike, Float

from envs import viewer
from envs.base import Env, GoalState, State


class Robot(Env):
    """An environment of rigid bodies in 3-D, which the viewer can show."""

    shapes: list[viewer.Shape]
    """What is seen: shapes fixed to the bodies of `poses`, and to the world."""
    marker_radius: float | None = None
    """Of the ball that marks the goal, in metres; None for one that suits the robot's size."""

    @abc.abstractmethod
    def poses(self, states: State) -> tuple[Float[np.ndarray, "*batch bodies 3"], Float[np.ndarray, "*batch bodies 4"]]:
        """Positions and orientations (unit quaternions, w first) of the bodies in the world."""

    def goal_position(self, states: GoalState) -> Float[np.ndarray, "*batch 3"]:
        """Where the goal is seen in the world; task families say where the task is."""
        return in_space(states.goal)

    def render(self, states: State, stem: str, labels: Sequence[str] = ()) -> str:
        """An HTML page that shows the episodes in 3-D, in any browser, offline. `labels` say what each episode is."""
        positions, rotations = self.poses(states)
        viewer.save(
            f"{stem}.html",
            self.shapes,
            positions,
            rotations,
            markers=self.goal_position(states),
            seconds_per_frame=self.control_step,
            title=self.name,
            marker_radius=self.marker_radius,
            labels=labels,
        )
        return f"{stem}.html"


def in_space(point: Float[ArrayLike, "*batch axes"]) -> Float[np.ndarray, "*batch 3"]:
    """x, y, z of a point; of x and y alone, the point on the ground."""
    point = np.asarray(point)
    return np.pad(point, [(0, 0)] * (point.ndim - 1) + [(0, 3 - point.shape[-1])])
