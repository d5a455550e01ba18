"""Craftax-Classic: Crafter's survival game with its 22 achievements, rewritten in JAX by the authors of Craftax; and
Craftax itself, a larger game with nine floors and 67 achievements.

The rules are those of the package craftax (1.6), which differ from Crafter's in places: scores of the two games do not
compare. A reward is 1 for each achievement unlocked (in Craftax 1, 3, 5 or 8), plus 0.1 for each point of health won,
minus 0.1 for each lost (of 9). Death ends an episode; the time limit is `VectorEnv`'s. Observation: the image in
[0, 1], or a vector of the same; in Craftax the vector.
"""

import functools
import importlib
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8
from PIL import Image

from envs.base import AchievementEnv, AchievementState

NEVER = 2**31 - 1
"""Craftax's own time limit, in steps: `VectorEnv` has the one that counts."""
EPISODES_DRAWN = 4


class Physics(NamedTuple):
    world: Any
    """Craftax's EnvState."""
    key: Key[Array, ""]
    """Where the next steps draw from."""


class CraftaxClassic(AchievementEnv):
    """Craftax-Classic as images (`pixels`), or as vectors, which are cheaper to compute: the game is the same."""

    simulator = "craftax"
    # even among 128 random players only about one dies in a step, and more worlds at a time were no faster (CPU)
    fresh_worlds = 1

    game = "CraftaxClassic"
    package = "craftax.craftax_classic"
    tile = 7
    """Pixels along an edge of one of the 9 x 9 tiles of an image: 7 rows of map, 2 of inventory."""

    def __init__(self, pixels: bool):
        # imported here, as this takes a second: craftax imports matplotlib
        kind = "pixels" if pixels else "symbolic"
        games = importlib.import_module(f"{self.package}.envs.craftax_{kind}_env")
        self._renderer = importlib.import_module(f"{self.package}.renderer")
        constants = importlib.import_module(f"{self.package}.constants")
        self._renderer.load_all_textures = lambda: _textures(constants)
        self.pixels = pixels
        self._game = getattr(games, f"{self.game}{kind.title()}EnvNoAutoReset")()
        self._params = self._game.default_params.replace(max_timesteps=NEVER)
        self.observation_shape = self._game.observation_space(self._params).shape
        self.num_actions = self._game.num_actions
        in_order = sorted(constants.Achievement, key=lambda achievement: achievement.value)
        self.achievement_names = tuple(achievement.name.lower() for achievement in in_order)

    def reset(self, key: Key[Array, ""]) -> AchievementState:
        world_key, key = jax.random.split(key)
        observation, world = self._game.reset(world_key, self._params)
        return _state(world, key, observation, jnp.zeros(()), jnp.zeros((), bool))

    def step(self, state: AchievementState, action: Int[Array, ""]) -> AchievementState:
        step_key, key = jax.random.split(state.physics.key)
        observation, world, reward, dead, _ = self._game.step(step_key, state.physics.world, action, self._params)
        return _state(world, key, observation, reward, dead)

    def render(self, states: AchievementState, stem: str) -> str:
        """A GIF of the first episodes side by side; each stays as it was when it ended."""
        states = jax.tree.map(lambda x: x[:EPISODES_DRAWN], states)
        images = 255 * states.observation if self.pixels else self._draw(states.physics.world)
        frames = side_by_side(np.rint(images).astype(np.uint8), np.asarray(states.terminated))
        save_gif(frames, f"{stem}.gif", fps=10)
        return f"{stem}.gif"

    def _draw(self, worlds: Any) -> Float[Array, "episodes time height width 3"]:
        """Images in 0..255 of Craftax's states with leading axes (episode, time)."""
        draw = self._renderer.make_craftax_pixel_renderer(self.tile)
        return jax.jit(jax.vmap(lambda worlds: jax.lax.map(draw, worlds, batch_size=32)))(worlds)


class Craftax(CraftaxClassic):
    """The full game, as vectors: nine floors, magic, ranged combat, potions, 43 actions."""

    game = "Craftax"
    package = "craftax.craftax"
    tile = 10
    """Of the 13 x 11 tiles of a film: 9 rows of map, 4 of inventory."""

    def __init__(self):
        super().__init__(pixels=False)


def _state(
    world: Any, key: Key[Array, ""], observation: Float[Array, "..."], reward: Float[Array, ""], dead: Bool[Array, ""]
) -> AchievementState:
    # some of craftax's numbers are weakly typed after a reset and not after a step, for which jit would compile twice
    world = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), world)
    return AchievementState(Physics(world, key), observation, reward, dead, world.achievements)


class _Textures(dict):
    """Craftax's textures by the tile size in pixels, each drawn, in memory, when it is first asked for: 2 s.

    By itself craftax draws all sizes (20 s), and keeps them in a file inside its own package, where one may have no
    right to write, and which two processes that start together write at the same time.
    """

    def __init__(self, constants):
        self._constants = constants

    def __missing__(self, tile: int):
        self[tile] = self._constants.load_all_textures_given_size(tile)
        return self[tile]


@functools.cache
def _textures(constants) -> _Textures:
    """Those of a game, by its module of constants."""
    return _Textures(constants)


def side_by_side(
    images: UInt8[np.ndarray, "episodes time height width 3"], ended: Bool[np.ndarray, "episodes time"]
) -> UInt8[np.ndarray, "frames height all_widths 3"]:
    """One film of several episodes, each of which stands still where it has ended; over when all have."""
    last = np.where(ended.any(axis=1), ended.argmax(axis=1), ended.shape[1] - 1)
    time = np.minimum(np.arange(last.max() + 1), last[:, None])
    gap = [(0, 0)] * 3 + [(0, 1), (0, 0)]
    return np.concatenate(np.pad(images[np.arange(len(images))[:, None], time], gap), axis=2)


def save_gif(
    frames: UInt8[np.ndarray, "time height width 3"], path: str | os.PathLike, fps: int, enlarge: int = 3
) -> None:
    """Writes a film that repeats; each pixel becomes `enlarge` x `enlarge` pixels."""
    # one small palette for all, from a few frames, as the static of Crafter's nights does not compress; of Pillow's
    # methods this one keeps rare colours too
    some = np.concatenate(frames[:: -(-len(frames) // 32)])
    palette = Image.fromarray(some).quantize(96, Image.Quantize.FASTOCTREE)
    size = (frames.shape[2] * enlarge, frames.shape[1] * enlarge)
    film = [
        Image.fromarray(x).quantize(palette=palette, dither=Image.Dither.NONE).resize(size, Image.Resampling.NEAREST)
        for x in frames
    ]
    film[0].save(path, save_all=True, append_images=film[1:], duration=1000 / fps, loop=0)
