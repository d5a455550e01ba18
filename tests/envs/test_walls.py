"""Walls hold robots up, however they are driven, and merged walls are the walls of one box a cell."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax import contact

from envs import mazes
from envs.ant import Ant
from envs.humanoid import Humanoid

WIND = 10.0
"""Metres per square second: about the weight of the robot, sideways."""
STEPS, RANDOM = 200, 16
DIRECTIONS = np.float32([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 1]])
# in u_maze: four cells with a wall in that direction, and one without
CELLS = np.float32([[1, 1], [1, 1], [1, 3], [1, 1], [1, 1]])
GOLDEN = {
    # start in u_maze, and q[:7] after 20 steps of the actions sin(t (k + 1) / 10): the published code's numbers
    Ant: {
        (4.0, 4.0): [4.14493, 2.88517, 0.83042, 0.88980, -0.38312, 0.07783, 0.23543],
        (5.3, 4.0): [4.93916, 3.02557, 0.88566, 0.88554, -0.37235, 0.09864, 0.25970],  # a foot touches the wall
    },
    Humanoid: {(2.0, 2.0): [2.04272, 2.00689, 1.22796, 0.96595, -0.02187, -0.23137, -0.11373]},
}


def blow(env, state, direction):
    """Adds a control step of wind to the velocity of every link."""
    velocity = state.physics.xd_i.vel + WIND * env.control_step * jnp.append(direction, 0.0)
    return state._replace(physics=state.physics.replace(xd_i=state.physics.xd_i.replace(vel=velocity)))


@pytest.fixture(scope="module", params=[Ant, Humanoid], ids=["ant", "humanoid"])
def driven(request, optimisations):
    """Positions of all links, and q, of robots in wind: for merged walls 200 steps, for a box a cell the first 40.

    The first four are limp and blown against a wall, the fifth along a free way. The others act at random, from cells
    all over the maze, in wind from all sides: they hit walls, also at the seams of boxes. Between them are those of the
    golden rollouts, without wind.
    """
    golden = GOLDEN[request.param]
    envs = {merged: request.param("u_maze", merged_walls=merged) for merged in (True, False)}
    cell, size = envs[True].maze.cell_size, envs[True].action_size
    keys = jax.random.split(jax.random.key(0), 3)
    angle = jax.random.uniform(keys[0], (RANDOM,), maxval=2 * np.pi)
    direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    start = jax.random.choice(keys[1], jnp.asarray(envs[True].maze.corridor()), (RANDOM,)) + 0.2 * cell * direction
    actions = jax.random.uniform(keys[2], (RANDOM, STEPS, size), minval=-1, maxval=1)
    start = jnp.concatenate([CELLS * cell, jnp.array([*golden]), start])
    direction = jnp.concatenate([DIRECTIONS, jnp.zeros((len(golden), 2)), direction])
    waves = np.sin(0.1 * np.outer(np.arange(1, STEPS + 1), np.arange(1, size + 1)))
    actions = jnp.concatenate([jnp.zeros((5, STEPS, size)), jnp.stack([waves] * len(golden)), actions])

    def rollout(env, start, direction, actions):
        def step(state, action):
            state = env.step(blow(env, state, direction), action)
            return state, (state.physics.x.pos, state.physics.q)

        return jax.lax.scan(step, env.place(start, jnp.full(2, 3 * cell)), actions)[1]

    def paths(env, steps):
        batched = jax.jit(jax.vmap(partial(rollout, env)))
        return jax.tree.map(np.asarray, batched(start, direction, actions[:, :steps]))

    with optimisations():  # for 200 steps they are worth it
        merged = paths(envs[True], STEPS)
    return envs[True].maze, {True: merged, False: paths(envs[False], 40)}, list(golden.values())


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "a box a cell"])
def test_golden_rollouts_in_a_maze(driven, merged):
    _, paths, golden = driven
    np.testing.assert_allclose(paths[merged][1][5:-RANDOM, 19, :7], golden, atol=1e-4)


def test_a_robot_driven_into_a_wall_for_200_steps_never_passes_through(driven):
    maze, paths, _ = driven
    links, cell = paths[True][0][:4], maze.cell_size
    for path, direction, start in zip(links[:, :, 0, :2], DIRECTIONS, CELLS * cell):
        ahead = (path - start) @ direction
        assert ahead.max() < cell / 2 + 0.15  # the wall's face is half a cell ahead; a humanoid leans over it
        assert ahead.max() > cell / 4
    # nor does any part of it get into a wall
    assert depth_in_walls(maze, links).max() < 0.05


def test_torsos_of_robots_that_act_at_random_never_pass_through_walls(driven):
    """Until they fall: an ant's torso may then sink through the floor, under the walls."""
    maze, paths, _ = driven
    links, q = (x[-RANDOM:] for x in paths[True])
    depth = depth_in_walls(maze, links[:, :, :1])[..., 0]
    fallen = np.cumsum((q[..., 2] < 0.2) | (q[..., 2] > 2), axis=1) > 0
    assert (~fallen).sum() > 500
    assert depth[~fallen].max() < 0.05


def depth_in_walls(maze, points):
    """Of points (..., 3): how deep in a wall, negative outside."""
    depth = np.full(points.shape[:-1], -np.inf)
    for x, y, half_x, half_y in maze.wall_boxes(merged=False):
        inside = np.minimum(half_x - np.abs(points[..., 0] - x), half_y - np.abs(points[..., 1] - y))
        depth = np.maximum(depth, np.minimum(inside, maze.cell_size / 2 - points[..., 2]))
    return depth


def test_the_wind_moves_a_robot_that_no_wall_stops(driven):
    maze, paths, _ = driven
    assert np.abs(paths[True][0][4, :, 0, 1] - maze.cell_size).max() > 1.5 * maze.cell_size


def test_rollouts_agree_with_unmerged_walls(driven):
    """Contacts are averaged over the boxes a link touches, so that a seam makes a difference, which then grows."""
    maze, paths, _ = driven
    merged, single = (paths[kind][1][-RANDOM:, :40, :7] for kind in (True, False))
    travelled = np.abs(single[:, -1, :2] - single[:, 0, :2]).max(axis=1)
    assert np.median(travelled) > maze.cell_size / 4
    difference = np.abs(merged - single).max(axis=2)
    assert difference[:, :15].max() < 1e-4
    assert np.median(difference[:, -1]) < 1e-4
    assert np.quantile(difference[:, -1], 0.9) < 0.05


def slots(env) -> int:
    """Contacts that the physics tests in each of its steps."""
    positions = jax.eval_shape(env.place, jnp.zeros(2), jnp.zeros(2)).physics.x
    return jax.eval_shape(partial(contact.get, env.system), positions).dist.shape[0]


@pytest.mark.parametrize(
    "robot, layout, published",
    [
        (Ant, "u_maze", 264),
        (Ant, "u4_maze", 342),
        (Ant, "u5_maze", 537),
        (Ant, "big_maze", 524),
        (Ant, "hardest_maze", 836),
        (Humanoid, "u_maze", 551),
        (Humanoid, "big_maze", 1131),
    ],
)
def test_contact_slots_are_the_published_ones_and_at_most_half_when_merged(robot, layout, published):
    assert slots(robot(layout, merged_walls=False)) == published
    assert slots(robot(layout)) <= published / 2


@pytest.mark.parametrize("layout", mazes.DRAWINGS)
def test_slots_halve_in_every_maze(layout):
    """Slots are 13 a box and 30 for the ant, 29 a box and 29 for the humanoid (the test above counts them)."""
    few, many = (len(mazes.load(layout, 4.0).wall_boxes(merged)) for merged in (True, False))
    for each, more in ((13, 30), (29, 29)):
        assert each * few + more <= (each * many + more) / 2
