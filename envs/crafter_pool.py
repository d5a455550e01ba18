"""The original Crafter (Hafner 2022, package crafter), which is not in JAX: its worlds live in other processes.

Scores of Crafter compare with the published ones; those of envs/crafter.py, the rewrite in JAX, are of another game.
`CrafterPool` has the methods of `VectorEnv` and may be used like it, under jit and in loops: each of its two calls
leaves the compiled program for the processes of envs/pool.py, and returns with the observations.
"""

import importlib.util
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Int, Int32, Key, UInt8

from envs.base import AchievementEnv, AchievementState, VectorEnv, VectorState
from envs.crafter import EPISODES_DRAWN, save_gif, side_by_side
from envs.pool import Pool


class Crafter(AchievementEnv):
    """Crafter: survive in a world of 64 x 64 cells, and unlock 22 achievements.

    Reward: 1 for a step that unlocks achievements for the first time in the episode, and 0.1 for each of the 9 points
    of health won or lost. Death ends an episode; the time limit is `CrafterPool`'s (published: 10,000 steps).

    Where the package numba is installed, the same worlds are generated about 15 times faster (0.05 s instead of 0.8 s);
    the very first start then takes longer, for compiling. numba keeps the result beside the package or under the home
    directory; where it may write to neither, set NUMBA_CACHE_DIR.

    Args:
      workers: how many processes step the worlds; by default one for each world, but no more than 8 or the number
        of cores, whichever is more.
    """

    name = "crafter"
    simulator = "crafter"
    observation_shape = (64, 64, 3)
    observation_dtype = "uint8"
    num_actions = 17
    achievement_names = (
        *("collect_coal", "collect_diamond", "collect_drink", "collect_iron", "collect_sapling", "collect_stone"),
        *("collect_wood", "defeat_skeleton", "defeat_zombie", "eat_cow", "eat_plant", "make_iron_pickaxe"),
        *("make_iron_sword", "make_stone_pickaxe", "make_stone_sword", "make_wood_pickaxe", "make_wood_sword"),
        *("place_furnace", "place_plant", "place_stone", "place_table", "wake_up"),
    )
    in_jax = False

    def __init__(self, workers: int | float = 0):
        if workers < 0 or workers != int(workers):
            raise ValueError(f"option workers of crafter is {workers}; it is a whole number, 0 or more")
        # not imported: with it comes numba, which only the workers need
        if importlib.util.find_spec("crafter") is None:
            raise ValueError("the package crafter is not installed; pip install -e '.[crafter]'")
        self.workers = int(workers)

    def reset(self, key: Key[Array, ""]) -> AchievementState:
        raise NotImplementedError("crafter does not run in JAX: only its vectorise(...) can be reset")

    def step(self, state: AchievementState, action: Int[Array, ""]) -> AchievementState:
        raise NotImplementedError("crafter does not run in JAX: only its vectorise(...) can be stepped")

    def vectorise(self, num_envs: int, episode_length: int) -> "CrafterPool":
        """`num_envs` worlds that are reset by themselves; its processes start with its first reset."""
        return CrafterPool(self, num_envs, episode_length)

    def render(self, states: AchievementState, stem: str) -> str:
        """A GIF of the first episodes side by side; each stays as it was when it ended."""
        states = jax.tree.map(lambda x: np.asarray(x[:EPISODES_DRAWN]), (states.observation, states.terminated))
        save_gif(side_by_side(*states), f"{stem}.gif", fps=10)
        return f"{stem}.gif"


class Worlds(NamedTuple):
    """From what the worlds of the processes can be made again; leading axis `num_envs`."""

    seed: Int32[Array, " num_envs"]
    episode: Int32[Array, " num_envs"]
    """The number of the current episode, from 1."""
    actions: UInt8[Array, "num_envs episode_length"]
    """Those taken in the current episode come first, as many as `VectorState.steps` says."""


class CrafterPool(VectorEnv):
    """Steps `num_envs` worlds of Crafter in other processes, and resets each when its episode ends.

    There is one set of worlds, so only the latest state can be stepped, by one program at a time and not under vmap.
    `VectorState.key` only names the worlds' origin: all later worlds follow from their seeds.

    Attributes:
      failure: why a call failed, in one line, such as that a process died; else None. JAX itself raises a
        JaxRuntimeError with a long message. Until the next `reset` or `restore`, `step` fails for the same reason.
    """

    def __init__(self, env: Crafter, num_envs: int, episode_length: int):
        super().__init__(env, num_envs, episode_length)
        self.pool = Pool("Crafter", "crafter_worker.py", min(env.workers or max(8, os.cpu_count() or 1), num_envs))
        self._latest: np.ndarray | None = None
        """Seeds, episodes and steps of the state that can be stepped, int32 (3, num_envs); None if there is none."""

    def reset(self, key: Key[Array, ""]) -> VectorState:
        seed_key, key = jax.random.split(key)
        zeros = lambda *shape, dtype: jnp.zeros((self.num_envs, *shape), dtype)
        worlds = Worlds(
            seed=jax.random.randint(seed_key, (self.num_envs,), 0, 2**31 - 1, jnp.int32),
            episode=jnp.ones(self.num_envs, jnp.int32),
            actions=zeros(self.episode_length, dtype=jnp.uint8),
        )
        env = AchievementState(
            physics=worlds,
            observation=io_callback(self._begin, self._images, worlds.seed, ordered=True),
            reward=zeros(dtype=jnp.float32),
            terminated=zeros(dtype=bool),
            achievements=zeros(len(self.env.achievement_names), dtype=bool),
        )
        steps, broken = zeros(dtype=jnp.int32), zeros(dtype=jnp.int32)  # not one buffer, for both may be donated
        return VectorState(env, steps, jax.random.split(key, self.num_envs), None, broken)

    def step(
        self, state: VectorState, action: Int[Array, " num_envs"]
    ) -> tuple[VectorState, AchievementState, Bool[Array, " num_envs"]]:
        row = lambda dtype, *shape: jax.ShapeDtypeStruct((self.num_envs, *shape), dtype)
        flags = row(bool, len(self.env.achievement_names))
        worlds, steps = state.env.physics, state.steps + 1
        last_observation, observation, reward, terminated, achievements = io_callback(
            self._step,
            (self._images, self._images, row(jnp.float32), row(bool), flags),
            jnp.stack([worlds.seed, worlds.episode, state.steps]),
            action,
            ordered=True,
        )
        truncated = (steps >= self.episode_length) & ~terminated
        ended = terminated | truncated
        actions = worlds.actions.at[jnp.arange(self.num_envs), state.steps].set(action.astype(jnp.uint8))
        worlds = worlds._replace(actions=actions)
        after = AchievementState(worlds, last_observation, reward, terminated, achievements)
        env = AchievementState(
            physics=worlds._replace(episode=worlds.episode + ended),
            observation=observation,
            reward=jnp.where(ended, 0, reward),
            terminated=jnp.zeros_like(terminated),
            achievements=achievements & ~ended[:, None],
        )
        return state._replace(env=env, steps=jnp.where(ended, 0, steps)), after, truncated

    def restore(self, state: VectorState) -> None:
        """Brings the worlds to a saved state, for `step` to go on from; not for use under jit.

        They are made anew and replay their present episode, which takes about 2 ms a step. PoolError in one line if a
        process dies, or if the worlds do not come out as they were, because of another version of crafter, say.
        """
        seed, episode, actions = map(np.asarray, state.env.physics)
        steps = np.asarray(state.steps)
        observation = self._open(seed, episode, [row[:n] for row, n in zip(actions, steps)])
        (odd,) = np.nonzero((observation != np.asarray(state.env.observation)).any(axis=(1, 2, 3)))
        if odd.size:
            self.pool.fail(
                f"Crafter's world {odd[0]} differs from the saved one after replaying its {steps[odd[0]]} actions; "
                "was it saved with other versions of crafter or its dependencies?"
            )
        self._latest = np.stack([seed, episode, steps])

    def close(self) -> None:
        """Ends the processes; the next `reset` or `restore` starts new ones."""
        self._latest = None
        self.pool.close()

    @property
    def failure(self) -> str | None:
        return self.pool.failure

    @property
    def _images(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.num_envs, *self.env.observation_shape), jnp.uint8)

    # What follows is called from inside compiled programs, where JAX itself must not be used.

    def _begin(self, seed: Array) -> UInt8[np.ndarray, "num_envs 64 64 3"]:
        seed, first = np.asarray(seed), np.ones(self.num_envs, np.int32)
        observation = self._open(seed, first, [()] * self.num_envs)
        self._latest = np.stack([seed, first, 0 * first])
        return observation

    def _step(self, clock: Array, action: Array) -> tuple[np.ndarray, ...]:
        if self.failure:
            self.pool.fail(self.failure)
        clock = np.asarray(clock)
        if self._latest is None or not self.pool.workers or (clock != self._latest).any():
            self.pool.fail(
                "Crafter was stepped from a state that is not its latest: it has one set of worlds, for one program "
                "at a time; use restore(state) to go back to a state"
            )
        last = clock[2] + 1 >= self.episode_length
        results = self.pool.ask("step", np.asarray(action), last)
        ended = results[3] | last
        self._latest = np.stack([clock[0], clock[1] + ended, np.where(ended, 0, clock[2] + 1)])
        return results

    def _open(self, seed: np.ndarray, episode: np.ndarray, actions: list) -> UInt8[np.ndarray, "num_envs 64 64 3"]:
        self._latest = None
        self.pool.start()
        (observation,) = self.pool.ask("begin", seed, episode, actions)
        return observation
