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
BATCH = 500
RESET, STEP = jax.jit(jax.vmap(ENV.reset)), jax.jit(jax.vmap(ENV.step))
"""Of so many worlds, that they are compiled once."""
NEEDS = {"wood": TREE, "stone": STONE, "iron": IRON}


@pytest.fixture(scope="module")
def starts():
    return RESET(jax.random.split(jax.random.key(1), BATCH))


def step(states, actions):
    """Each world takes its action; of a few, the rest of the batch repeats them."""
    return STEP(states, jnp.asarray(np.resize(actions, BATCH), jnp.int32))


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


def test_random_play_follows_the_rules(starts):
    """From bags that are full at random, so that late rules apply too; 60 worlds of 150 steps."""
    rng = np.random.default_rng(0)
    bags = rng.integers(0, 3, (60, 5))
    inventory = jnp.asarray(np.resize(bags, (BATCH, 5)), jnp.int32)
    states = starts._replace(physics=starts.physics._replace(inventory=inventory))
    models = [Model(np.asarray(starts.physics.cells[i]), starts.physics.position[i]) for i in range(60)]
    for model, bag in zip(models, bags):
        model.bag = dict(zip(model.bag, map(int, bag)))
    seen = set()
    for _ in range(150):
        actions = rng.integers(len(ACTIONS), size=60)
        states = step(states, actions)
        rewards = [model.act(ACTIONS[a]) for model, a in zip(models, actions)]
        np.testing.assert_array_equal(states.reward[:60], rewards)
        world, achievements = jax.device_get((states.physics._replace(key=None), states.achievements))
        for i, model in enumerate(models):
            assert tuple(world.position[i]) == model.position and tuple(world.facing[i]) == model.facing
            assert list(world.inventory[i]) == list(model.bag.values())
            assert {(x, y): world.cells[i, x, y] for x, y in model.cells} == model.cells
            assert {n for n, bit in zip(ENV.achievement_names, achievements[i]) if bit} == model.done
            seen |= model.done
    assert seen == set(ENV.achievement_names)


def test_a_world_is_played_through_in_the_only_order(starts):
    cells = np.full((SIZE, SIZE), GRASS)
    cells[0, 0], cells[2, 0], cells[2, 2] = TREE, STONE, IRON
    world = World(jnp.array(cells), jnp.array([1, 0]), jnp.array([0, 1]), jnp.zeros(5, jnp.int32), jax.random.key(0))
    states = starts._replace(physics=jax.tree.map(lambda x: jnp.broadcast_to(x, (BATCH, *x.shape)), world))
    plan = "left collect collect down place_table make_wood_pickaxe up right collect down make_stone_pickaxe right "
    plan += "down collect"
    order = []
    for action in plan.split():
        before, states = states.achievements, step(states, ACTIONS.index(action))
        order += [name for name, new in zip(ENV.achievement_names, (states.achievements & ~before)[0]) if new]
    assert order == list(ENV.achievement_names)


def test_a_reset_draws_a_world_and_an_observation_shows_what_is_around(starts):
    states = jax.device_get(starts._replace(physics=starts.physics._replace(key=None)))
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
    after = step(starts, 0).observation[:, -minicraft.NOISE :]
    assert abs(np.corrcoef(noise.ravel(), np.asarray(after).ravel())[0, 1]) < 0.04


def test_the_film_shows_every_step(starts, tmp_path):
    states = [starts]
    for action in range(7):
        states.append(step(states[-1], action))
    films = jax.tree.map(lambda *x: jnp.stack([each[:2] for each in x], axis=1), *states)
    path = ENV.render(films, str(tmp_path / "film"))
    with Image.open(path) as film:
        assert film.n_frames >= 2 and film.size[0] > film.size[1]


def test_actions_are_integers(starts):
    with pytest.raises(Exception, match="action"):
        ENV.step(jax.tree.map(lambda x: x[0], starts), jnp.zeros(1))
