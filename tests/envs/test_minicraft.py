"""minicraft against a model of its rules in plain Python, and a played-through world."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import envs
from envs import minicraft
from envs.minicraft import ACTIONS, GRASS, IRON, SIZE, STONE, TABLE, TREE, World

ENV = envs.make("minicraft")
NEEDS = {"wood": TREE, "stone": STONE, "iron": IRON}


class Model:
    """The rules as the page states them, with names instead of indices."""

    def __init__(self, cells, position):
        self.cells = {(x, y): int(cells[x, y]) for x in range(SIZE) for y in range(SIZE)}
        self.position, self.facing = tuple(map(int, position)), (0, 1)
        self.bag = dict.fromkeys(["wood", "stone", "iron", "wood_pickaxe", "stone_pickaxe"], 0)
        self.done = set()

    def act(self, action):
        """Returns how many achievements are new."""
        before = len(self.done)
        moves = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
        self.facing = moves.get(action, self.facing)
        x, y = self.position
        ahead = (x + self.facing[0], y + self.facing[1])
        there = self.cells.get(ahead)
        near_table = any(self.cells.get((x + i, y + j)) == TABLE for i in (-1, 0, 1) for j in (-1, 0, 1))
        if action in moves and there == GRASS:
            self.position = ahead
        if action == "collect":
            tool = {"wood": None, "stone": "wood_pickaxe", "iron": "stone_pickaxe"}
            for thing, kind in NEEDS.items():
                if there == kind and (not tool[thing] or self.bag[tool[thing]]) and self.bag[thing] < 5:
                    self.bag[thing] += 1
                    self.done.add(f"collect_{thing}")
                    if thing != "wood":
                        self.cells[ahead] = GRASS
        if action == "place_table" and there == GRASS and self.bag["wood"]:
            self.bag["wood"] -= 1
            self.cells[ahead] = TABLE
            self.done.add("place_table")
        for thing in ("wood", "stone"):
            if action == f"make_{thing}_pickaxe" and near_table and self.bag[thing]:
                self.bag[thing] -= 1
                self.bag[f"{thing}_pickaxe"] = min(self.bag[f"{thing}_pickaxe"] + 1, 5)
                self.done.add(action)
        return len(self.done) - before


def test_random_play_follows_the_rules():
    """From bags that are full at random, so that late rules apply too; 60 worlds of 150 steps."""
    rng = np.random.default_rng(0)
    states = jax.vmap(ENV.reset)(jax.random.split(jax.random.key(0), 60))
    bags = rng.integers(0, 3, (60, 5))
    states = states._replace(physics=states.physics._replace(inventory=jnp.array(bags, jnp.int32)))
    models = [Model(np.asarray(c), p) for c, p in zip(states.physics.cells, states.physics.position)]
    for model, bag in zip(models, bags):
        model.bag = dict(zip(model.bag, map(int, bag)))
    step, seen = jax.jit(jax.vmap(ENV.step)), set()
    for _ in range(150):
        actions = rng.integers(len(ACTIONS), size=60)
        states = step(states, jnp.array(actions, jnp.int32))
        rewards = [model.act(ACTIONS[a]) for model, a in zip(models, actions)]
        np.testing.assert_array_equal(states.reward, rewards)
        world = jax.device_get(states.physics._replace(key=None))
        for i, model in enumerate(models):
            assert tuple(world.position[i]) == model.position and tuple(world.facing[i]) == model.facing
            assert list(world.inventory[i]) == list(model.bag.values())
            assert {(x, y): world.cells[i, x, y] for x, y in model.cells} == model.cells
            assert {n for n, bit in zip(ENV.achievement_names, states.achievements[i]) if bit} == model.done
            seen |= model.done
    assert seen == set(ENV.achievement_names)


def test_a_world_is_played_through_in_the_only_order():
    cells = np.full((SIZE, SIZE), GRASS)
    cells[0, 0], cells[2, 0], cells[2, 2] = TREE, STONE, IRON
    world = World(jnp.array(cells), jnp.array([1, 0]), jnp.array([0, 1]), jnp.zeros(5, jnp.int32), jax.random.key(0))
    state = ENV.reset(jax.random.key(0))._replace(physics=world)
    plan = "left collect collect down place_table make_wood_pickaxe up right collect down make_stone_pickaxe right "
    plan += "down collect"
    step, order = jax.jit(ENV.step), []
    for action in plan.split():
        before, state = state.achievements, step(state, jnp.array(ACTIONS.index(action), jnp.int32))
        order += [name for name, new in zip(ENV.achievement_names, state.achievements & ~before) if new]
    assert order == list(ENV.achievement_names)


def test_a_reset_draws_a_world_and_an_observation_shows_what_is_around():
    states = jax.vmap(ENV.reset)(jax.random.split(jax.random.key(1), 500))
    assert not states.achievements.any() and states.observation.shape == (500, *ENV.observation_shape)
    for kind, count in minicraft.COUNTS.items():
        assert ((states.physics.cells == kind).sum(axis=(1, 2)) == count).all()
    position = np.asarray(states.physics.position)
    assert (np.asarray(states.physics.cells)[np.arange(500), *position.T] == GRASS).all()
    counts = np.bincount(position[:, 0] * SIZE + position[:, 1], minlength=SIZE**2)
    assert ((counts - 500 / 49) ** 2 / (500 / 49)).sum() < 85  # chi-square with 48 degrees of freedom: 0.001
    view = np.asarray(states.observation[:, :150]).reshape(500, 5, 5, 6)
    assert (view.sum(-1) == 1).all()
    padded = np.pad(np.asarray(states.physics.cells), ((0, 0), (2, 2), (2, 2)), constant_values=minicraft.WALL)
    around = np.stack([p[x : x + 5, y : y + 5] for p, (x, y) in zip(padded, position)])
    np.testing.assert_array_equal(view.argmax(-1), around)
    noise = np.asarray(states.observation[:, -minicraft.NOISE :])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    after = jax.vmap(ENV.step)(states, jnp.zeros(500, jnp.int32)).observation[:, -minicraft.NOISE :]
    assert abs(np.corrcoef(noise.ravel(), np.asarray(after).ravel())[0, 1]) < 0.04


def test_the_film_shows_every_step(tmp_path):
    states = jax.vmap(ENV.reset)(jax.random.split(jax.random.key(0), 2))
    films = jax.lax.scan(lambda s, a: (jax.vmap(ENV.step)(s, a), s), states, jnp.tile(jnp.arange(8)[:, None], 2))[1]
    path = ENV.render(jax.tree.map(lambda x: x.swapaxes(0, 1), films), str(tmp_path / "film"))
    with Image.open(path) as film:
        assert film.n_frames >= 2 and film.size[0] > film.size[1]


def test_actions_are_integers():
    with pytest.raises(Exception, match="action"):
        ENV.step(ENV.reset(jax.random.key(0)), jnp.zeros(1))
