"""Data sets that are given: OGBench's files, the scripted expert's episodes, and which rows are goals.

A data set is episodes one after another, each T + 1 states s_0 ... s_T and the actions taken there; the last action
leads nowhere. So every row but an episode's last is a transition, to the next row.
"""

import math
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from envs.ogbench_point import PointMaze
from shared import run

SCRIPTED = {"navigate": (1000, 2000), "stitch": (200, 200)}
"""What the expert makes -> steps of an episode, and in the giant maze."""
KEYS = ("observations", "actions", "terminals")


class Data(NamedTuple):
    observation: Float[Array, "all state"]
    action: Float[Array, "all action"]
    rows: Int[Array, " transitions"]
    """Those that are transitions."""
    final: Int[Array, " all"]
    """Of each row, the last transition of its episode: as in OGBench, s_T is nobody's goal."""


def demonstrate(env: PointMaze, kind: str, steps: int, key: Key[Array, ""]) -> Data:
    """So many steps of the expert, in whole episodes."""
    length = SCRIPTED[kind][env.layout == "giant"]
    episodes = math.ceil(steps / length)
    observation, action, _ = jax.vmap(partial(env.demonstration, kind, length))(jax.random.split(key, episodes))
    number = jnp.arange(episodes * (length + 1)).reshape(episodes, length + 1)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    final = jnp.broadcast_to(number[:, -2:-1], number.shape)
    return Data(flat(observation), flat(action), flat(number[:, :-1]), flat(final))


def load(path: str, env: PointMaze) -> Data:
    """A file of OGBench; UserError, in one line, if it is none or of another environment."""
    need, name = run.need, Path(path).name
    what = "neither navigate, stitch nor a file" if env.in_jax else "no file, and the scripted data are of point mazes"
    fetch = f"ogbench.download_datasets(['{env.name.replace('_', '-')}-navigate-v0'])"
    need(Path(path).is_file(), f"data is {path!r}, which is {what}; the package ogbench fetches its own: {fetch}")
    try:
        with np.load(path) as file:
            missing = [key for key in KEYS if key not in file]
            need(not missing, f"{name} has no {', '.join(missing)}; a file of OGBench has {', '.join(KEYS)}")
            observation, action, terminal = (file[key] for key in KEYS)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise run.UserError(f"{name} is no npz file of arrays: {error}") from None
    for what, array, size in (
        ("observations", observation, env.observation_size),
        ("actions", action, env.action_size),
    ):
        need(
            array.ndim == 2 and array.shape[1] == size and np.issubdtype(array.dtype, np.number),
            f"{what} of {name} are {array.dtype} {array.shape}; those of {env.name} are numbers in {size} columns",
        )
        need(bool(np.isfinite(array).all()), f"{what} of {name} are not all finite")
    numbers = len(observation), len(action), terminal.size
    need(len(set(numbers)) == 1, f"{name} has {numbers} observations, actions and terminals; it takes as many of each")
    need(
        env.in_the_open(observation[:, :2]),
        f"{name} is of another maze than {env.name}: it has states inside its walls",
    )
    ends = np.flatnonzero(terminal)
    need(len(ends) > 0, f"{name} has no terminals; each episode's last row has one")
    need(int(ends[-1]) == len(action) - 1, f"the last row of {name} is no terminal, so its last episode has no end")
    need(int(np.diff(ends, prepend=-1).min()) > 1, f"{name} has an episode of one row; it takes two to make a step")
    final = np.repeat(ends - 1, np.diff(ends, prepend=-1))
    rows = np.flatnonzero(~terminal.astype(bool))
    arrays = np.float32(observation), np.float32(action), np.int32(rows), np.int32(final)
    return Data(*map(jnp.asarray, arrays))


def rows(data: Data, key: Key[Array, ""], number: int) -> Int[Array, " number"]:
    """Transitions, uniformly."""
    return jax.random.choice(key, data.rows, (number,))


def geometric_future(data: Data, row: Int[Array, " batch"], key: Key[Array, ""], discount: float):
    """Rows k >= 1 steps later with probability (1 - discount) discount^(k - 1), at most the episode's last transition,
    where all that is beyond gathers."""
    u = jax.random.uniform(key, row.shape, minval=jnp.finfo(jnp.float32).tiny)
    offset = 1 + jnp.floor(jnp.log(u) / math.log(discount)).astype(jnp.int32)
    return jnp.minimum(row + offset, data.final[row])


def uniform_future(data: Data, row: Int[Array, " batch"], key: Key[Array, ""]):
    """Rows uniformly later in the episode: round(u min(i + 1, F) + (1 - u) F), F its last transition."""
    u = jax.random.uniform(key, row.shape)
    first, last = jnp.minimum(row + 1, data.final[row]), data.final[row]
    # only the difference is rounded: float32 has no room for fractions of large rows
    return first + jnp.round((1 - u) * (last - first)).astype(jnp.int32)
