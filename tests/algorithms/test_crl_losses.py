"""The losses of crl.py against NumPy written from the formulas, and one update against Adam by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import envs
from algorithms import crl
from shared import run

KINDS = ("norm", "l2", "dot", "cosine", "mrn")


def numpy_energy(phi, psi, kind):
    return {
        "norm": lambda: -np.linalg.norm(phi - psi),
        "l2": lambda: -np.sum((phi - psi) ** 2),
        "dot": lambda: phi @ psi,
        "cosine": lambda: phi @ psi / np.linalg.norm(phi) / np.linalg.norm(psi),
        "mrn": lambda: -np.linalg.norm((phi - psi)[: len(phi) // 2]) - max(0, (phi - psi)[len(phi) // 2 :].max()),
    }[kind]()


def representations(offset=0.0, batch=12, size=6):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(2, batch, size)) + offset).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_energies_equal_numpy(kind, offset):
    phi, psi = representations(offset)
    exact = np.array([[numpy_energy(x, y, kind) for y in psi.astype(float)] for x in phi.astype(float)])
    np.testing.assert_allclose(crl.pairwise_energy(jnp.array(phi), jnp.array(psi), kind), exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(crl.energy(jnp.array(phi), jnp.array(psi), kind), np.diag(exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_pairwise_energies_equal_finite_differences(kind):
    phi, psi = representations()
    weights = np.random.default_rng(1).normal(size=(12, 12))

    def exact(phi, psi):
        return sum(weights[i, j] * numpy_energy(phi[i], psi[j], kind) for i in range(12) for j in range(12))

    gradient = jax.grad(lambda *x: jnp.sum(crl.pairwise_energy(*x, kind) * weights), (0, 1))(phi, psi)
    for argument in (0, 1):
        for entry in ((0, 0), (7, 3), (11, 4)):
            moved = [[np.array(phi, float), np.array(psi, float)] for _ in range(2)]
            moved[0][argument][entry] += 1e-5
            moved[1][argument][entry] -= 1e-5
            difference = (exact(*moved[0]) - exact(*moved[1])) / 2e-5
            np.testing.assert_allclose(gradient[argument][entry], difference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_where_representations_coincide(kind):
    phi = jnp.ones((3, 4))
    for function in (crl.energy, crl.pairwise_energy):
        gradient = jax.grad(lambda x, f=function: jnp.sum(f(x, phi, kind)))(phi)
        assert jnp.isfinite(gradient).all()


def test_the_quasimetric_is_that_of_the_sheet():
    """Golden numbers of baselines_gcrl, 9.5."""
    x, y = jnp.array([[0.5, -1, 2, 0.3, 1, -0.4]]), jnp.array([[0.1, 0.2, 1.5, 0.9, -0.5, 0.1]])
    np.testing.assert_allclose(crl.mrn_distance(x, y), 2.860147, atol=1e-5)
    np.testing.assert_allclose(crl.mrn_distance(y, x), 1.960147, atol=1e-5)
    x = jnp.array([(0.5, -1, 2, 0.3), (0, 0.4, -1, 1), (1.2, 0.3, 0.6, -0.7)])
    y = jnp.array([(0.4, -0.8, 1.5, 0.5), (0.2, 0.1, -0.6, 0.4), (1, 0.9, 0.3, -0.2)])
    logits = crl.pairwise_energy(x, y, "mrn")
    distances = [(0.723607, 3.740175, 3.664688), (1.764911, 0.960555, 2.318034), (1.360147, 2.219804, 0.932456)]
    np.testing.assert_allclose(-logits, distances, atol=1e-5)
    np.testing.assert_allclose(crl.contrastive_loss(logits, "bwd_infonce"), 0.401170, atol=1e-5)
    np.testing.assert_allclose(crl.contrastive_loss(logits, "fwd_infonce"), 0.428932, atol=1e-5)
    triples = np.random.default_rng(0).normal(size=(3, 200, 6)).astype(np.float32)
    a, b, c = map(jnp.array, triples)
    assert (crl.mrn_distance(a, b) + crl.mrn_distance(b, c) >= crl.mrn_distance(a, c) - 1e-5).all()


def numpy_contrastive_loss(logits, kind):
    batch = len(logits)
    forward = np.mean([logsumexp(logits[i, :]) - logits[i, i] for i in range(batch)])
    backward = np.mean([logsumexp(logits[:, i]) - logits[i, i] for i in range(batch)])
    if kind == "binary_nce":
        log_sigmoid = lambda x: -np.log1p(np.exp(-x))
        true = [log_sigmoid(logits[i, i]) for i in range(batch)]
        false = [log_sigmoid(-logits[i, j]) for i in range(batch) for j in range(batch) if i != j]
        return -np.mean(true) - np.mean(false)
    return {"fwd_infonce": forward, "bwd_infonce": backward, "sym_infonce": forward + backward}[kind]


@pytest.mark.parametrize("kind", ["fwd_infonce", "bwd_infonce", "sym_infonce", "binary_nce"])
def test_contrastive_losses_equal_numpy(kind):
    logits = np.random.default_rng(0).normal(size=(9, 9)) * 3
    np.testing.assert_allclose(
        crl.contrastive_loss(jnp.array(logits), kind), numpy_contrastive_loss(logits, kind), rtol=1e-5
    )


@pytest.fixture(scope="module")
def setting():
    """A config, its environment, a training state with experience, and a batch."""
    config = crl.Config(
        env="point_u_maze", num_envs=4, episode_length=9, unroll_length=40, min_replay_size=40, max_replay_size=40,
        batch_size=16, width=8, representation_size=6, updates_per_chunk=2, total_env_steps=1000, random_goals=0.25,
    )  # fmt: skip
    env = envs.make(config.env)
    state = jax.jit(lambda key: crl.collect(config, env, crl.init(config, env, key)))(jax.random.key(0))
    return config, env, state, crl.sample(config, env, state.replay, jax.random.key(1))


def test_critic_loss_and_metrics_equal_numpy(setting):
    config, _, state, batch = setting
    critic = state.agent.critic
    loss, (encoded, info) = crl.critic_loss(critic, batch, config)
    phi = np.asarray(critic.encode_state_action(batch.observation, batch.action), float)
    psi = np.asarray(critic.encode_goal(batch.goal), float)
    logits = np.array([[-np.linalg.norm(x - y) for y in psi] for x in phi])
    rows = logsumexp(logits, axis=1)
    expected = np.mean(rows - np.diag(logits)) + 0.1 * np.mean(rows**2)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    np.testing.assert_allclose(info["train/logsumexp"], rows.mean(), rtol=1e-3)
    np.testing.assert_allclose(info["train/positive_energy"], np.diag(logits).mean(), rtol=1e-3)
    off = logits[~np.eye(16, dtype=bool)]
    np.testing.assert_allclose(info["train/negative_energy"], off.mean(), rtol=1e-3)
    np.testing.assert_allclose(info["train/accuracy"], np.mean(logits.argmax(1) == np.arange(16)))
    np.testing.assert_allclose(encoded, psi, rtol=1e-6)


def test_actor_loss_equals_numpy(setting):
    config, _, state, batch = setting
    key, alpha = jax.random.key(5), 0.7
    agent = state.agent._replace(log_alpha=jnp.log(alpha))
    psi = agent.critic.encode_goal(batch.goal)
    loss, info = crl.actor_loss(agent.actor, agent, psi, batch, key, config)
    goal = np.asarray(batch.goal).copy()
    goal[:4] = np.asarray(batch.goal)[[15, 0, 1, 2]]  # random_goals=0.25 of 16 rows
    output = jax.vmap(agent.actor)(jnp.concatenate([batch.observation, jnp.array(goal)], axis=1))
    mean, raw = np.split(np.asarray(output, float), 2, axis=1)
    std = np.exp(-5 + 3.5 * (np.tanh(raw) + 1))
    noise = np.asarray(jax.random.normal(key, mean.shape), float)
    x = mean + std * noise
    log_prob = np.sum(-0.5 * noise**2 - np.log(std * np.sqrt(2 * np.pi)) - np.log(1 - np.tanh(x) ** 2), axis=1)
    phi = agent.critic.encode_state_action(batch.observation, jnp.array(np.tanh(x), jnp.float32))
    value = -np.linalg.norm(np.asarray(phi) - np.asarray(agent.critic.encode_goal(jnp.array(goal))), axis=1)
    np.testing.assert_allclose(loss, np.mean(alpha * log_prob - value), rtol=1e-3)
    np.testing.assert_allclose(info["train/entropy"], -log_prob.mean(), rtol=1e-3)


def test_alpha_falls_while_the_entropy_is_above_its_target():
    gradient = jax.grad(crl.alpha_loss)
    np.testing.assert_allclose(gradient(jnp.log(0.5), jnp.array(3.0), 1.0), 0.5 * (3.0 - 1.0), rtol=1e-6)
    assert gradient(jnp.array(0.0), jnp.array(-2.0), -1.0) < 0


def adam_by_hand(parameters, gradient, rate):
    """Adam's first step, with its bias corrections written out."""
    first, second = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
    return parameters - rate * first / (np.sqrt(second) + 1e-8)


@pytest.mark.parametrize("entropy_tuning", [True, False])
def test_update_takes_each_gradient_at_the_old_parameters(setting, entropy_tuning):
    base, env, state, _ = setting
    config = crl.dataclasses.replace(
        base, actor_lr=1e-2, critic_lr=2e-2, alpha_lr=3e-2, entropy_tuning=entropy_tuning, final_lr_fraction=1.0
    )
    key = jax.random.key(7)
    new, _ = jax.jit(lambda state: crl.update(config, env, state, key))(state)
    batch_key, actor_key = jax.random.split(key)
    batch = crl.sample(config, env, state.replay, batch_key)
    agent = state.agent
    psi = agent.critic.encode_goal(batch.goal)
    loss = lambda p: crl.actor_loss(p, agent, psi, batch, actor_key, config)
    actor, info = jax.jit(jax.grad(loss, has_aux=True))(agent.actor)
    assert info["train/alpha"] == (1.0 if entropy_tuning else 0.0)
    critic = jax.jit(jax.grad(lambda p: crl.critic_loss(p, batch, config)[0]))(agent.critic)
    for old, gradient, got, rate in (
        (agent.actor, actor, new.agent.actor, 1e-2),
        (agent.critic, critic, new.agent.critic, 2e-2),
    ):
        for p, g, q in zip(*(jax.tree.leaves(x) for x in (old, gradient, got))):
            clear = np.abs(g) > 1e-5  # Adam's first step is the gradient's sign, which rounding decides near zero
            np.testing.assert_allclose(q[clear], adam_by_hand(np.asarray(p), np.asarray(g), rate)[clear], atol=1e-4)
    by_hand = adam_by_hand(0.0, np.asarray(info["train/entropy"]) + 1.0, 3e-2)
    np.testing.assert_allclose(new.agent.log_alpha, by_hand, rtol=1e-4)


@pytest.mark.parametrize("relabel", ["episode", "published"])
def test_goals_are_positions_reached_later_in_the_episode(setting, relabel):
    base, env, state, _ = setting
    config = crl.dataclasses.replace(base, relabel=relabel, batch_size=300)
    batch = crl.sample(config, env, state.replay, jax.random.key(3))
    # 40 rows of 4 environments, in order; an episode ends every 9 steps
    position = np.asarray(state.replay.data.observation)
    after = np.asarray(state.replay.data.next_goal)
    own = 0
    for observation, goal in zip(np.asarray(batch.observation), np.asarray(batch.goal)):
        (t, env_index), *_ = np.argwhere((position == observation).all(-1))
        end = min(t // 9 * 9 + 8, 39)
        later = after[t : end + 1, env_index] if relabel == "episode" else position[t + 1 : end + 1, env_index]
        if not len(later):
            own += 1
            later = position[t : t + 1, env_index]
        assert (later == goal).all(-1).any()
    assert (own > 0) == (relabel == "published")


def test_many_seeds_at_once_equal_each_seed_alone(setting):
    base, env, _, _ = setting
    together = crl.dataclasses.replace(base, num_seeds=2)

    def chunk(config, keys):
        state = jax.jit(jax.vmap(lambda key: crl.init(config, env, key)))(keys)
        return jax.jit(run.over_seeds(config.num_seeds, lambda s: crl.learn(config, env, crl.collect(config, env, s))))(
            state
        )

    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    both, info = chunk(together, keys)
    alone, info_alone = chunk(base, keys[1:])
    for name in info:
        np.testing.assert_allclose(info[name][1], info_alone[name][0], rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(both.replay.count[1:], alone.replay.count)
