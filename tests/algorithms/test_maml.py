"""maml.py: golden numbers of the fact sheet (metaworld_and_metarl, section 11), episodes, and resumed runs."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import check_repeats_its_end, metrics

from algorithms import maml
from envs.point import PointGoal
from shared import run
from shared.networks import Dense


def rows_of(**fields):
    """Rows of which only these fields are known; all are valid."""
    valid = jnp.ones(fields["reward"].shape, bool) if "reward" in fields else None
    return maml.Rows(*({"valid": valid, **fields}.get(name) for name in maml.Rows._fields))


# ---- baseline and advantages ---------------------------------------------------------------------------------------

RETURNS = [
    (-0.265775, 0.76025, -0.3775, 0.525, -0.75),
    (3.21506, 3.6834, 1.926, 2.14, 0.1),
    (0.179895, -0.63345, 0.6295, -0.245, 0.95),
]
VALUES = [
    (1.34809326, 1.35739735, 1.02514451, -0.43449557, -1.07305672),
    (1.57834285, 2.03428684, 1.23724175, 1.38685865, 0.1579128),
    (0.07395357, -0.06048714, 0.8773172, 1.47357401, 0.85527796),
]
AFTER_A_FALL = 2
"""Steps that the longer episodes below have, and that count nowhere."""


@pytest.fixture(params=[0, AFTER_A_FALL])
def episodes(request):
    """Of the sheet: three episodes of five steps, perhaps with more steps after a fall."""
    t, i = np.arange(5)[:, None], np.arange(3)
    observation = np.stack([0.1 * (t + 1) - 0.3 * i, ((3 * t + 2 * i) % 7) / 2 - 1], axis=-1)
    observation[4, 2, 1] = 12
    reward = (2 * t + 5 * i) % 4 - 1 + 0.5 * observation[..., 0]
    fallen = request.param
    pad = lambda x, value: np.concatenate([x, np.full((fallen, *x.shape[1:]), value)])
    return rows_of(
        observation=jnp.array(pad(observation, 3.0)),
        reward=jnp.array(pad(reward, 0.0)),
        valid=jnp.array(pad(np.ones((5, 3)), 0.0)).astype(bool),
    )


def test_the_baseline_is_that_of_the_sheet(episodes):
    returns = maml.discounted(0.9, episodes.reward)
    np.testing.assert_allclose(returns[:5], np.transpose(RETURNS), atol=1e-6)
    value = maml.fitted(maml.Config(discount=0.9), episodes)
    np.testing.assert_allclose(value[:5], np.transpose(VALUES), atol=5e-3)  # float32; the condition is 1e9
    assert (value[5:] == 0).all()


@pytest.mark.parametrize(
    ("gae_lambda", "first"),
    [
        (1.0, (-1.61386826, -0.59714735, -1.40264451, 0.95949557, 0.32305672)),
        (0.95, (-1.57107308, -0.58092065, -1.45587205, 0.94260114, 0.32192548)),
    ],
)
def test_advantages_are_those_of_the_sheet_normalised(episodes, gae_lambda, first, monkeypatch):
    exact = jnp.zeros(episodes.reward.shape).at[:5].set(np.transpose(VALUES))
    monkeypatch.setattr(maml, "fitted", lambda config, rows: exact)
    found = np.asarray(maml.advantages(maml.Config(discount=0.9, gae_lambda=gae_lambda), episodes))
    if gae_lambda == 1:  # the sheet has these before they are normalised: R - V
        plain = np.transpose(np.subtract(RETURNS, VALUES))
        first = (np.array(first) - plain.mean()) / plain.std()
    np.testing.assert_allclose(found[:5, 0], first, atol=1e-5)
    np.testing.assert_allclose([found[:5].mean(), found[:5].std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize(("time", "number", "tolerance"), [(100, 10, 0.02), (20, 2, 0.2)])
def test_the_baseline_of_a_robot_with_idle_and_equal_joints_is_finite_and_right(time, number, tolerance):
    """Columns of zeros, ones and copies, and more columns than rows: a single ridge of 1e-5 gives NaN in float32."""
    random = np.random.default_rng(0)
    observation = 3 * random.normal(size=(time, number, 20)).astype(np.float32)
    observation[..., 5], observation[..., 6], observation[..., 8] = 0, observation[..., 7], 1
    reward = random.normal(size=(time, number)).astype(np.float32)
    zeros = jnp.zeros((time, number, 2))
    rows = maml.Rows(jnp.array(observation), zeros, zeros, jnp.zeros(2), jnp.array(reward), zeros[..., 0] == 0)
    seen, t = np.clip(observation, -10, 10).astype(np.float64), np.arange(time)[:, None, None] / 100
    powers = np.broadcast_to(np.concatenate([t, t**2, t**3, t**0], axis=2), (time, number, 4))
    x = np.concatenate([seen, seen**2, powers], axis=2).reshape(time * number, -1)
    returns = np.asarray(maml.discounted(0.99, jnp.array(reward)), np.float64).ravel()
    exact = x @ np.linalg.solve(x.T @ x + 1e-5 * np.eye(x.shape[1]), x.T @ returns)
    error = np.asarray(maml.fitted(maml.Config(), rows)).ravel() - exact
    assert np.sqrt(np.mean(error**2)) < tolerance * returns.std()


def test_without_a_baseline_returns_are_normalised(episodes):
    found = maml.advantages(maml.Config(discount=0.9, baseline=False), episodes)
    returns = np.transpose(RETURNS)
    np.testing.assert_allclose(found[:5], (returns - returns.mean()) / returns.std(), atol=1e-5)


# ---- the inner and the outer step ----------------------------------------------------------------------------------

THETA = np.array([0.3, -0.2, 0.1, -0.5])


def policy_of(theta):
    """mean = w1 s1 + w2 s2 + b, and the log standard deviation."""
    layer = eqx.tree_at(
        lambda d: (d.weight, d.bias), Dense(2, 1, jax.random.key(0)), (jnp.array([theta[:2]]), jnp.array(theta[2:3]))
    )
    return maml.Policy((layer,), jnp.array(theta[3:]))


def theta_of(policy):
    (layer,) = policy.layers
    return np.concatenate([layer.weight[0], layer.bias, policy.log_std])


def acted(policy, states, actions):
    """Rows of one episode."""
    observation = jnp.array(states, jnp.float32)[:, None]
    mean = maml.over_batch(policy.mean, observation)
    action = jnp.array(actions, jnp.float32)[:, None, None]
    return rows_of(
        observation=observation, action=action, mean=mean, log_std=policy.log_std, reward=jnp.zeros((len(states), 1))
    )


POLICY = policy_of(THETA)
D0 = [
    ([(1, 0), (0, 1), (-1, 0.5), (0.5, -1)], [0.5, -0.4, 0.2, 0.9], [1, -1, 0.5, -0.5]),
    ([(0, 0), (1, 1), (-0.5, -1), (2, 0.5)], [-0.3, 1, 0, 0.4], [-1, 0.5, 1.5, -1]),
]
D1 = [
    ([(0.5, 0.5), (-1, 0), (0, -1)], [0.7, -0.1, 0.3], [1, -0.5, -0.5]),
    ([(1, -0.5), (0, 0.5), (-1, -1)], [0, -0.5, 0.2], [-1.2, 0.2, 1]),
]
ADAPTED = [
    (0.282161276, -0.15582792, 0.128881744, -0.503822584),
    (0.362010804, -0.150731142, 0.15266671, -0.489551604),
]
GRADIENT = {
    "ratio": (-0.439701157, 0.083723781, -0.5969316, 0.06640199),
    "log_likelihood": (-0.436833386, 0.090594044, -0.600445331, 0.059168957),
    "first_order": (-0.327513773, 0.177991713, -0.593900784, 0.009024679),
}
HESSIAN = {
    "ratio": """
        1.970210466 .403791656 .2115886 -.261990693 / .403791656 1.16908335 -.257557581 -.328895694 /
        .2115886 -.257557581 2.697690599 -.393743019 / -.261990693 -.328895694 -.393743019 2.060044429""",
    "log_likelihood": """
        1.821813668 .293065183 .168092746 -.236959552 / .293065183 1.136097158 -.375235232 -.271331309 /
        .168092746 -.375235232 2.659424144 -.350767131 / -.236959552 -.271331309 -.350767131 2.012724125""",
    "first_order": """
        1.458010782 .335969954 -.228261933 0 / .335969954 1.236171794 -.671939908 0 /
        -.228261933 -.671939908 2.700605521 0 / 0 0 0 2""",
}


def config_of(kind, **more):
    if kind == "first_order":
        return maml.Config(first_order=True, **more)
    return maml.Config(inner_loss=kind, **more)


@pytest.fixture(scope="module")
def data():
    """Both tasks; the policies that acted after the inner step are the adapted ones."""
    tasks = []
    for (states, actions, advantage), after, theta in zip(D0, D1, ADAPTED):
        column = lambda x: jnp.array(x, jnp.float32)[:, None]
        tasks.append(
            maml.Data(
                acted(POLICY, states, actions), column(advantage), acted(policy_of(theta), *after[:2]), column(after[2])
            )
        )
    return jax.tree.map(lambda *x: jnp.stack(x), *tasks)


@pytest.mark.parametrize("kind", ["ratio", "log_likelihood"])
def test_the_inner_step_is_that_of_the_sheet(kind, data):
    for i, (adapted, loss) in enumerate(zip(ADAPTED, (-0.0191129191, 0.0522419789))):
        before, advantage = jax.tree.map(lambda x, i=i: x[i], (data.before, data.before_advantage))
        new = maml.adapt(config_of(kind), POLICY, before, advantage)
        np.testing.assert_allclose(theta_of(new), adapted, atol=1e-6)
        if kind == "log_likelihood":
            np.testing.assert_allclose(maml.surrogate(POLICY, before, advantage, kind), loss, atol=1e-6)


@pytest.mark.parametrize("kind", list(GRADIENT))
def test_outer_gradient_and_hessian_are_those_of_the_sheet(kind, data):
    """And the gradient is that by finite differences, where the inner one is not taken as constant."""
    losses = jax.jit(lambda theta: jnp.stack(maml.outer_loss(policy_of(theta), data, config_of(kind))))
    theta = jnp.array(THETA)
    np.testing.assert_allclose(losses(theta), 0, atol=1e-6)
    gradients = jax.jit(jax.jacrev(losses))(theta)
    np.testing.assert_allclose(gradients[0], GRADIENT[kind], atol=2e-6)
    np.testing.assert_allclose(gradients[1], 0, atol=1e-6)
    hessian = jax.jit(jax.jacfwd(jax.jacrev(lambda theta: losses(theta)[1])))(theta)
    golden = np.array([row.split() for row in HESSIAN[kind].split("/")], float)
    np.testing.assert_allclose(hessian, golden, atol=1e-5)
    if kind != "first_order":
        ends = [[losses(theta + sign * 1e-2 * np.eye(4)[i])[0] for sign in (1, -1)] for i in range(4)]
        np.testing.assert_allclose(np.subtract(*np.transpose(ends)) / 2e-2, GRADIENT[kind], atol=2e-3)
        moved = losses(theta + jnp.array([0.02, -0.01, 0.03, 0.01]))
        golden = {"ratio": (-0.0264816610, 0.0017046513), "log_likelihood": (-0.0267962126, 0.0017207201)}[kind]
        np.testing.assert_allclose(moved, golden, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "step", "tries", "loss", "kl"),
    [
        ("ratio", (-0.067333688, 0.030221865, -0.058787742, -0.005334684), 0, -0.0661172766, 0.0095516118),
        ("log_likelihood", (-0.069235214, 0.019668544, -0.060377371, -0.007355727), 1, -0.0543971735, 0.0064191229),
    ],
)
def test_the_outer_step_is_that_of_the_sheet(kind, step, tries, loss, kl, data):
    """The log-likelihood's full step diverges by more than 0.01, so that it is taken 0.8 times."""
    new, info = jax.jit(partial(maml.trpo_step, config=config_of(kind, damping=0.0)))(POLICY, data)
    np.testing.assert_allclose(theta_of(new), THETA - 0.8**tries * np.array(step), atol=1e-5)
    assert int(info["train/tries"]) == tries
    np.testing.assert_allclose(info["train/improvement"], -loss, atol=1e-5)
    np.testing.assert_allclose(info["train/kl"], kl, atol=1e-5)


def test_few_iterations_of_conjugate_gradients_are_those_of_the_sheet(data):
    for iterations, direction in (
        (1, (-0.16344886, 0.031122403, -0.221895685, 0.024683423)),
        (2, (-0.218782239, 0.07043802, -0.205317254, -0.034164143)),
    ):
        config = config_of("ratio", damping=0.0, cg_iterations=iterations)
        new, _ = jax.jit(partial(maml.trpo_step, config=config))(POLICY, data)
        moved = THETA - theta_of(new)
        np.testing.assert_allclose(moved / np.linalg.norm(moved), direction / np.linalg.norm(direction), atol=1e-4)


def test_equal_advantages_move_nothing_and_a_step_that_helps_nowhere_is_not_taken(data):
    flat = data._replace(after_advantage=jnp.zeros_like(data.after_advantage))
    step = jax.jit(maml.trpo_step, static_argnames="config")
    new, info = step(POLICY, flat, config=config_of("ratio"))
    np.testing.assert_array_equal(theta_of(new), theta_of(POLICY))
    assert info["train/kl"] < 1e-6 and int(info["train/tries"]) == 15
    new, _ = step(POLICY, data, config=config_of("log_likelihood", damping=0.0, line_search_steps=1))
    np.testing.assert_array_equal(theta_of(new), theta_of(POLICY))


def test_divergence_of_gaussians_equals_a_sum_over_a_grid():
    means, stds = (0.3, -0.4), (0.7, 1.2)
    x = np.linspace(-12, 12, 20001)
    p, q = (np.exp(-0.5 * ((x - m) / s) ** 2) / s / np.sqrt(2 * np.pi) for m, s in zip(means, stds))
    arguments = [jnp.array([value]) for value in (means[0], np.log(stds[0]), means[1], np.log(stds[1]))]
    np.testing.assert_allclose(maml.kl(*arguments), np.sum(p * np.log(p / q)) * (x[1] - x[0]), rtol=1e-4)


# ---- episodes and runs ---------------------------------------------------------------------------------------------


class Falls(PointGoal):
    """The robot falls where it has gone to the right."""

    def step(self, state, action):
        after = super().step(state, action)
        return after._replace(terminated=after.observation[0] > 0.12)


CONFIG = maml.Config(episode_length=5, num_tasks=4, num_episodes=3, width=8)


@pytest.mark.parametrize(("family", "scale"), [(PointGoal(), 1.0), (Falls(), 0.1)])
def test_episodes_are_steps_of_the_policy_until_a_fall(family, scale):
    config = dataclasses.replace(CONFIG, action_scale=scale)
    policy = maml.make_agent(config, family, jax.random.key(0))._replace(log_std=jnp.full(2, -0.3))
    rows, broken, states = jax.jit(
        lambda task: maml.play(config, family, policy, task, True, jax.random.key(1), lambda before, after: before)
    )(jnp.array([0.5, 0.5]))
    assert int(broken) == 0 and rows.reward.shape == (5, 3)
    x, valid = np.asarray(rows.observation), np.asarray(rows.valid)
    np.testing.assert_array_equal(x, states.observation)
    np.testing.assert_allclose(rows.mean, jax.vmap(jax.vmap(policy.mean))(rows.observation), atol=1e-6)
    moved = 0.1 * np.clip(scale * np.asarray(rows.action), -1, 1)
    np.testing.assert_allclose((x[1:] - x[:-1])[valid[1:]], moved[:-1][valid[1:]], atol=1e-6)
    fell = (x[..., 0] > 0.12) & (type(family) is Falls)
    fell[0] = False
    np.testing.assert_array_equal(valid, ~np.logical_or.accumulate(fell, axis=0))
    assert (np.asarray(rows.reward)[~valid] == 0).all()
    noise = (np.asarray(rows.action) - np.asarray(rows.mean)) / np.exp(-0.3)
    assert 0.5 < noise.std() < 1.6
    still, *_ = maml.play(config, family, policy, jnp.array([0.5, 0.5]), False, jax.random.key(1))
    np.testing.assert_array_equal(still.action, still.mean)


def test_an_iteration_plays_before_and_after_the_inner_step_and_changes_the_policy():
    family = PointGoal()
    config = run.settle_tasks(CONFIG, family)
    state = maml.init(config, family, jax.random.key(0))
    new, metrics = jax.jit(partial(maml.learn, config, family))(state)
    assert (int(new.env_steps), int(new.outer_steps)) == (2 * 4 * 3 * 5, 1)
    assert 0 < metrics["train/kl"] <= config.max_kl and metrics["train/improvement"] > 0
    for old, changed in zip(jax.tree.leaves(state.agent), jax.tree.leaves(new.agent)):
        assert (np.asarray(old) != np.asarray(changed)).any()


TINY = [
    *("--episode_length=5", "--num_tasks=3", "--num_episodes=3", "--width=8", "--num_train_tasks=6"),
    *("--num_test_tasks=4", "--eval_every=180", "--checkpoint_every=360", "--num_seeds=2"),
    "--total_env_steps=720",
]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path, capsys):
    whole = tmp_path / "whole"
    maml.main(["maml.py", *TINY, f"--run_dir={whole}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(whole)
    assert len(metrics(whole)) == 2 * 8
    check_repeats_its_end(maml, whole)
    assert {"curve.png", "rollout.gif"} <= {path.name for path in whole.iterdir()}
    config, family, agent = maml.load(whole, seed=1)
    key = jax.random.fold_in(run.evaluation_key(jax.random.key(1)), int(metrics(whole)[-1]["outer_steps"]))
    test_tasks = jax.jit(partial(maml.init, config, family))(jax.random.key(1)).test_tasks
    scores = jax.jit(partial(maml.evaluate, config, family))(agent, test_tasks, key)
    for name, value in scores.items():
        assert float(value) == pytest.approx(float(metrics(whole)[-1][name]), rel=1e-3)
