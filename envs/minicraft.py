"""A small world with a hierarchy of achievements, in pure JAX: achievement distillation on a laptop, and tests.

A square meadow with a few trees, rocks and ores. Six achievements need one another in turn: collect wood, place a
table, make a wooden pickaxe, collect stone, make a stone pickaxe, collect iron.
As in Crafter, which it is a miniature of, what an episode achieves for the first time is rewarded with 1, and part of
what the agent sees is noise, as Crafter's nights are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs.base import AchievementEnv, AchievementState

SIZE = 7
"""Cells along each side."""
VIEW = 5
"""The robot sees a square of so many cells around itself."""
GRASS, TREE, STONE, IRON, TABLE, WALL = range(6)
COUNTS = {TREE: 3, STONE: 3, IRON: 2}
"""How many of each a world has. A cell that is collected becomes grass."""
ACTIONS = (*("left", "right", "up", "down", "collect", "place_table", "make_wood_pickaxe", "make_stone_pickaxe"),)
MOVES = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])
WOOD, ROCK, ORE, WOOD_PICKAXE, STONE_PICKAXE = range(5)
"""Entries of the inventory."""
MOST = 5
"""Of each thing at most so many are carried."""
NOISE = 32
"""Numbers in an observation that mean nothing."""


class World(NamedTuple):
    cells: Int[Array, "size size"]
    position: Int[Array, "2"]
    facing: Int[Array, "2"]
    inventory: Int[Array, "5"]
    key: Key[Array, ""]
    """Where the noise of the next observations comes from."""


class Minicraft(AchievementEnv):
    """Nothing ends an episode but the time limit.

    Observation: the cells around the robot as indicators (beyond the edge is wall), the direction it faces, the
    inventory, each count divided by `MOST`, and `NOISE` standard normal numbers, drawn anew at each step.
    """

    name = "minicraft"
    num_actions = len(ACTIONS)
    observation_shape = (VIEW * VIEW * 6 + 2 + 5 + NOISE,)
    achievement_names = (
        *("collect_wood", "place_table", "make_wood_pickaxe", "collect_stone", "make_stone_pickaxe", "collect_iron"),
    )

    def reset(self, key: Key[Array, ""]) -> AchievementState:
        """A new meadow: everything lies in random cells, the robot in another one."""
        contents = jnp.concatenate([jnp.full(count, kind) for kind, count in COUNTS.items()])
        key, world_key = jax.random.split(key)
        places = jax.random.choice(world_key, SIZE * SIZE, (len(contents) + 1,), replace=False)
        cells = jnp.full(SIZE * SIZE, GRASS).at[places[1:]].set(contents).reshape(SIZE, SIZE)
        position = jnp.stack(jnp.divmod(places[0], SIZE))
        world = World(cells, position, jnp.array([0, 1]), jnp.zeros(5, jnp.int32), key)
        return self._state(world, jnp.zeros(len(self.achievement_names), bool), jnp.zeros(()))

    def step(self, state: AchievementState, action: Int[Array, ""]) -> AchievementState:
        world, achieved = act(state.physics, action)
        achievements = state.achievements | achieved
        reward = jnp.sum(achievements & ~state.achievements).astype(jnp.float32)
        return self._state(world, achievements, reward)

    def _state(
        self, world: World, achievements: Bool[Array, " achievements"], reward: Float[Array, ""]
    ) -> AchievementState:
        key, noise_key = jax.random.split(world.key)
        observation = jnp.concatenate([observe(world), jax.random.normal(noise_key, (NOISE,))])
        world = world._replace(key=key)
        return AchievementState(world, observation, reward, jnp.zeros((), bool), achievements)

    def render(self, states: AchievementState, stem: str) -> str:
        """A GIF of up to four episodes side by side: cells in colour, the robot black, what it carries below."""
        from envs.crafter import save_gif

        films = [film(*world) for world in zip(*(np.asarray(x[:4]) for x in states.physics[:-1]))]
        save_gif(np.concatenate(films, axis=2), f"{stem}.gif", fps=8)
        return f"{stem}.gif"


def act(world: World, action: Int[Array, ""]) -> tuple[World, Bool[Array, "6"]]:
    """The world after an action, and which achievements the action amounts to (again, maybe)."""
    cells, position, facing, bag, key = world
    moving = action < len(MOVES)
    facing = jnp.where(moving, jnp.asarray(MOVES)[jnp.minimum(action, len(MOVES) - 1)], facing)
    ahead = position + facing
    inside = jnp.all((ahead >= 0) & (ahead < SIZE))
    kind = jnp.where(inside, cells[tuple(jnp.clip(ahead, 0, SIZE - 1))], WALL)
    position = jnp.where(moving & (kind == GRASS), ahead, position)

    around = jax.lax.dynamic_slice(jnp.pad(cells, 1, constant_values=WALL), tuple(world.position), (3, 3))
    table = (around == TABLE).any()
    wish = {name: action == i for i, name in enumerate(ACTIONS)}
    done = {
        "collect_wood": wish["collect"] & (kind == TREE) & (bag[WOOD] < MOST),
        "place_table": wish["place_table"] & (kind == GRASS) & (bag[WOOD] >= 1),
        "make_wood_pickaxe": wish["make_wood_pickaxe"] & table & (bag[WOOD] >= 1),
        "collect_stone": wish["collect"] & (kind == STONE) & (bag[WOOD_PICKAXE] >= 1) & (bag[ROCK] < MOST),
        "make_stone_pickaxe": wish["make_stone_pickaxe"] & table & (bag[ROCK] >= 1),
        "collect_iron": wish["collect"] & (kind == IRON) & (bag[STONE_PICKAXE] >= 1) & (bag[ORE] < MOST),
    }
    change = {  # wood, rock, ore, pickaxes of wood and of stone
        "collect_wood": [1, 0, 0, 0, 0],
        "place_table": [-1, 0, 0, 0, 0],
        "make_wood_pickaxe": [-1, 0, 0, 1, 0],
        "collect_stone": [0, 1, 0, 0, 0],
        "make_stone_pickaxe": [0, -1, 0, 0, 1],
        "collect_iron": [0, 0, 1, 0, 0],
    }
    achieved = jnp.stack([done[name] for name in Minicraft.achievement_names])
    bag = bag + achieved @ jnp.array([change[name] for name in Minicraft.achievement_names])
    # a tree stays, so that wood never runs out
    collected = done["collect_stone"] | done["collect_iron"]
    new = jnp.where(done["place_table"], TABLE, jnp.where(collected, GRASS, kind))
    cells = cells.at[tuple(jnp.where(inside, ahead, SIZE))].set(new, mode="drop")
    return World(cells, position, facing, jnp.minimum(bag, MOST), key), achieved


def observe(world: World) -> Float[Array, " features"]:
    """What is seen, without the noise."""
    margin = VIEW // 2
    padded = jnp.pad(world.cells, margin, constant_values=WALL)
    view = jax.lax.dynamic_slice(padded, tuple(world.position), (VIEW, VIEW))
    parts = jax.nn.one_hot(view, 6).reshape(-1), world.facing.astype(jnp.float32), world.inventory / MOST
    return jnp.concatenate(parts)


COLOURS = np.array([[124, 179, 66], [27, 94, 32], [140, 140, 140], [214, 140, 80], [121, 85, 72]])
"""Of grass, trees, stone, iron and tables."""


def film(cells: np.ndarray, position: np.ndarray, facing: np.ndarray, inventory: np.ndarray, cell: int = 16):
    """Frames (time, height, width, 3) in uint8 of the worlds of one episode; all arguments have a leading axis of time.

    Below the meadow is the inventory: a bar for each of wood, stone and ore, a square for each pickaxe.
    """
    frames = []
    for meadow, (x, y), (dx, dy), bag in zip(cells, position * cell + cell // 2, 4 * facing, inventory):
        picture = COLOURS[meadow].repeat(cell, 0).repeat(cell, 1)
        picture[x - 5 : x + 5, y - 5 : y + 5] = 0
        picture[x + dx - 2 : x + dx + 2, y + dy - 2 : y + dy + 2] = 255
        shelf = np.full((cell, SIZE * cell, 3), 40)
        for i, (count, kind) in enumerate(zip(bag, (TREE, STONE, IRON, TREE, STONE))):
            width = 2 * count if i < 3 else 10 * min(count, 1)
            shelf[3:13, 4 + 18 * i : 4 + 18 * i + width] = COLOURS[kind]
        frames.append(np.pad(np.concatenate([picture.swapaxes(0, 1), shelf]), ((0, 0), (0, 6), (0, 0))))
    return np.stack(frames).astype(np.uint8)
