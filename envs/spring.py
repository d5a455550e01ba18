"""brax's spring physics, without what its packages print when they are imported and used.

mujoco.mjx prints that warp, an optional backend nobody here asked for, is missing; brax warns at every model that it is
no longer maintained, which is why it is imported in this file only.
"""

import contextlib
import io
import warnings
from importlib import resources

import jax
import numpy as np

from envs import viewer
from envs.base import State
from envs.robot import Robot

with contextlib.redirect_stdout(io.StringIO()):
    from brax.base import System
    from brax.io import mjcf
    from brax.math import rotate
    from brax.spring import pipeline

__all__ = ["SpringRobot", "System", "asset", "load", "pipeline", "rotate"]


def asset(name: str) -> str:
    """The text of an MJCF file that ships with brax, e.g. 'ant.xml'."""
    return (resources.files("brax") / "envs/assets" / name).read_text()


def load(xml: str, timestep: float) -> System:
    """A brax system from MJCF text, stepped by `timestep` seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mjcf.loads(xml).tree_replace({"opt.timestep": timestep})


class SpringRobot(Robot):
    """A robot stepped by the spring physics; `State.physics` is brax's.

    Args:
      xml: the model, MJCF.
      timestep: seconds of a physics step.
      substeps: physics steps in a control step.
    """

    simulator = "brax spring"

    def __init__(self, xml: str, timestep: float, substeps: int):
        self.system = load(xml, timestep)
        self.shapes = viewer.shapes_of(self.system.mj_model)
        self.control_step, self._substeps = timestep * substeps, substeps

    def advance(self, physics, control):
        """The physics a control step later."""

        def substep(physics, _):
            return pipeline.step(self.system, physics, control), None

        return jax.lax.scan(substep, physics, None, length=self._substeps)[0]

    def poses(self, states: State):
        return np.asarray(states.physics.x.pos), np.asarray(states.physics.x.rot)
