"""brax's spring physics, without what its packages print when they are imported and used.

mujoco.mjx prints that warp, an optional backend nobody here asked for, is missing; brax warns at every model that it is
no longer maintained, which is why it is imported in this file only.
"""

import contextlib
import io
import warnings
from importlib import resources

with contextlib.redirect_stdout(io.StringIO()):
    from brax.base import System
    from brax.io import mjcf
    from brax.spring import pipeline

__all__ = ["System", "asset", "load", "pipeline"]


def asset(name: str) -> str:
    """The text of an MJCF file that ships with brax, e.g. 'ant.xml'."""
    return (resources.files("brax") / "envs/assets" / name).read_text()


def load(xml: str, timestep: float) -> System:
    """A brax system from MJCF text, stepped by `timestep` seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mjcf.loads(xml).tree_replace({"opt.timestep": timestep})
