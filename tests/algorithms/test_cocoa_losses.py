"""The posterior, the losses and the gradient step of cocoa.py against NumPy, finite differences and Adam by hand."""

import dataclasses
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from algorithms import cocoa
from algorithms.cocoa import Gaussian
from envs.point import PointGoal
from shared import run

KINDS = ("mahalanobis", "bhattacharyya", "wasserstein", "bilinear")
TASKS, ROWS, LATENT = 3, 7, 4


@pytest.fixture(scope="module")
def family():
    return PointGoal()


def small(**options):
    flags = {"width": 8, "encoder_width": 8, "latent_size": LATENT, "num_train_tasks": 6, "tasks_per_iteration": 4}
    flags |= {"meta_batch": TASKS, "batch_size": 5, "context_size": ROWS, "num_trajectories": 4, "replay_size": 6400}
    argv = ["cocoa.py", *(f"--{name}={value}" for name, value in (flags | options).items())]
    return cocoa.settle(run.configure(cocoa.Config, cocoa.RECIPES, "", argv), PointGoal())


def numpy_mlp(layers, x):
    for layer in layers[:-1]:
        x = np.maximum(np.asarray(layer.weight, float) @ x + np.asarray(layer.bias, float), 0)
    return np.asarray(layers[-1].weight, float) @ x + np.asarray(layers[-1].bias, float)


def entry(tree, *index):
    return jax.tree.map(lambda x: np.asarray(x[index], float), tree)


def gaussians(seed, batch=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, LATENT)), rng.uniform(0.01, 2.0, (batch, LATENT))


def as_gaussian(pair):
    return Gaussian(*(jnp.asarray(x, jnp.float32) for x in pair))


# ---- the posterior


def test_product_of_gaussians_equals_the_loop_and_a_grid():
    rng = np.random.default_rng(0)
    mean, variance = rng.normal(size=(6, LATENT)), rng.uniform(0.1, 2, (6, LATENT))
    valid = np.array([1, 1, 0, 1, 0, 1], bool)
    ours = cocoa.product(as_gaussian((mean, variance)), jnp.array(valid))
    grid = np.linspace(-8, 8, 160_001)
    for dim in range(LATENT):
        log_density = sum(
            stats.norm.logpdf(grid, mean[i, dim], np.sqrt(variance[i, dim])) for i in range(6) if valid[i]
        )
        density = np.exp(log_density - log_density.max())
        density /= density.sum()
        centre = (grid * density).sum()
        np.testing.assert_allclose(ours.mean[dim], centre, rtol=1e-4)
        np.testing.assert_allclose(ours.variance[dim], ((grid - centre) ** 2 * density).sum(), rtol=1e-3)


def test_equal_factors_divide_the_variance():
    factors = Gaussian(jnp.full((8, 2), 0.3), jnp.full((8, 2), 0.5))
    mean, variance = cocoa.product(factors, jnp.ones(8, bool))
    np.testing.assert_allclose(mean, 0.3, rtol=1e-6)
    np.testing.assert_allclose(variance, 0.5 / 8, rtol=1e-6)


def test_embedding_is_that_of_numpy_ignores_order_and_what_is_masked(family):
    encoder = cocoa.make_agent(small(), family, jax.random.key(0)).model.encoder
    context = np.random.default_rng(0).normal(size=(2, ROWS, 5)).astype(np.float32)
    ours = cocoa.embed(encoder, jnp.array(context))
    for task in range(2):
        outputs = np.array([numpy_mlp(encoder.layers, row) for row in context[task].astype(float)])
        mean, variance = outputs[:, :LATENT], np.maximum(np.log1p(np.exp(outputs[:, LATENT:])), 1e-7)
        total = 1 / (1 / variance).sum(0)
        np.testing.assert_allclose(ours.variance[task], total, rtol=1e-5)
        np.testing.assert_allclose(ours.mean[task], total * (mean / variance).sum(0), rtol=1e-4, atol=1e-7)
    shuffled = cocoa.embed(encoder, jnp.array(context[:, [3, 0, 6, 1, 5, 2, 4]]))
    np.testing.assert_allclose(shuffled.mean, ours.mean, rtol=1e-5, atol=1e-7)
    spoilt = context.copy()
    spoilt[:, 4:] = 1e3
    masked = cocoa.embed(encoder, jnp.array(spoilt), jnp.arange(ROWS) < jnp.array([[4], [4]]))
    cut = cocoa.embed(encoder, jnp.array(context[:, :4]))
    np.testing.assert_allclose(masked.mean, cut.mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(masked.variance, cut.variance, rtol=1e-5)


def test_kl_equals_numerical_integration():
    mean, variance = gaussians(1)
    ours = cocoa.kl_from_prior(as_gaussian((mean, variance)))
    grid = np.linspace(-20, 20, 200_001)
    for i in range(len(mean)):
        exact = 0.0
        for m, v in zip(mean[i], variance[i]):
            log_p = stats.norm.logpdf(grid, m, np.sqrt(v))
            exact += np.trapezoid(np.exp(log_p) * (log_p - stats.norm.logpdf(grid)), grid)
        np.testing.assert_allclose(ours[i], exact, rtol=1e-4)
    np.testing.assert_allclose(cocoa.kl_from_prior(cocoa.prior(2, LATENT)), 0, atol=1e-7)


def test_samples_have_the_moments_of_the_posterior():
    belief = Gaussian(jnp.full((40_000, 1), 1.5), jnp.full((40_000, 1), 0.25))
    z = np.asarray(belief.sample(jax.random.key(0)))
    assert stats.kstest(z[:, 0], stats.norm(1.5, 0.5).cdf).pvalue > 1e-3


# ---- similarity and contrast


def numpy_similarity(query, key, kind, bilinear):
    (m, v), (n, w) = query, key
    if kind == "bilinear":
        return m @ bilinear @ n
    if kind == "wasserstein":  # between Gaussians with commuting covariances
        return -(np.sum((m - n) ** 2) + np.trace(np.diag(v) + np.diag(w) - 2 * np.diag(np.sqrt(v * w))))
    middle = np.diag((v + w) / 2)
    distance = (m - n) @ np.linalg.inv(middle + 1e-3 * np.eye(len(m))) @ (m - n)
    if kind == "mahalanobis":
        return -distance
    ratio = np.linalg.det(middle) / np.sqrt(np.linalg.det(np.diag(v)) * np.linalg.det(np.diag(w)))
    return -(distance / 8 + 0.5 * np.log(ratio))


@pytest.mark.parametrize("kind", KINDS)
def test_similarities_equal_numpy(kind):
    query, key = gaussians(0), gaussians(1)
    bilinear = np.random.default_rng(2).normal(size=(LATENT, LATENT))
    ours = cocoa.similarity(as_gaussian(query), as_gaussian(key), kind, jnp.asarray(bilinear, jnp.float32))
    exact = [
        [numpy_similarity((query[0][i], query[1][i]), (key[0][j], key[1][j]), kind, bilinear) for j in range(5)]
        for i in range(5)
    ]
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_bhattacharyya_is_the_overlap_of_two_densities():
    (m, v), (n, w) = (x[:, :1] for x in gaussians(3, 1)), (x[:, :1] for x in gaussians(4, 1))
    grid = np.linspace(-15, 15, 300_001)
    p, q = stats.norm.pdf(grid, m[0], np.sqrt(v[0])), stats.norm.pdf(grid, n[0], np.sqrt(w[0]))
    overlap = np.log(np.trapezoid(np.sqrt(p * q), grid))
    ours = cocoa.similarity(as_gaussian((m, v)), as_gaussian((n, w)), "bhattacharyya", None)
    np.testing.assert_allclose(ours[0, 0], overlap, rtol=5e-3)  # 1e-3 is added to the variance


def test_info_nce_equals_numpy_with_and_without_exclusions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 6)) * 3
    task = np.array([0, 1, 0, 2, 1, 0])
    for excluded in (np.zeros((6, 6), bool), task[:, None] == task):
        losses, hits = [], []
        for i in range(6):
            others = [j for j in range(6) if j == i or not excluded[i, j]]
            losses.append(-logits[i, i] + np.log(np.exp(logits[i, others]).sum()))
            hits.append(all(logits[i, i] >= logits[i, j] for j in others))
        loss, accuracy = cocoa.info_nce(jnp.asarray(logits, jnp.float32), jnp.array(excluded))
        np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
        assert float(accuracy) == pytest.approx(np.mean(hits))
    assert float(cocoa.info_nce(jnp.zeros((6, 6)), jnp.zeros((6, 6), bool))[0]) == pytest.approx(np.log(6))


# ---- the gradient step


def data(config, family, seed=0):
    """A state after its first data and one iteration's, and a batch."""
    begin = lambda key: cocoa.fill(config, family, cocoa.init(config, family, key))
    state = jax.jit(lambda key: cocoa.collect(config, family, begin(key)))(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    # away from the first weights, where outputs are all but 0
    noisy = lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)
    state = state._replace(agent=jax.tree.map(noisy, state.agent))
    batch = jax.jit(lambda state: cocoa.sample(config, state, jax.random.key(seed + 1)))(state)
    # here no point is paid otherwise in training, and none ends
    shape = batch.transitions.reward.shape
    training_reward = jnp.asarray(rng.normal(size=shape), jnp.float32)
    terminated = jnp.asarray(rng.integers(2, size=shape), jnp.float32)
    transitions = batch.transitions._replace(training_reward=training_reward, terminated=terminated)
    return state, batch._replace(transitions=transitions)


def numpy_loss(config, agent, batch, noise, target_value=None):
    """Critics, bottleneck and contrast, one row at a time in float64."""
    agent, batch = jax.device_get((agent, batch))
    model = agent.model

    def embed(encoder, rows, valid):
        outputs = [numpy_mlp(encoder.layers, np.asarray(row, float)) for row, v in zip(rows, valid) if v]
        mean = np.array(outputs)[:, :LATENT]
        variance = np.maximum(np.logaddexp(0, np.array(outputs)[:, LATENT:]), 1e-7)
        total = 1 / (1 / variance).sum(0)
        return total * (mean / variance).sum(0), total

    kl = lambda mean, variance: 0.5 * np.sum(variance + mean**2 - 1 - np.log(variance))
    critics = [entry(model.critics, i) for i in range(2)]
    squared, bottleneck = [[], []], 0.0
    for task in range(config.meta_batch):
        mean, variance = embed(model.encoder, batch.context[task], np.ones(ROWS))
        z = mean + np.sqrt(variance) * noise[task]
        bottleneck += kl(mean, variance)
        for i in range(config.batch_size):
            row = entry(batch.transitions, task, i)
            fixed_z = z if target_value is None else target_value[task]
            future = numpy_mlp(agent.target_value.layers, np.concatenate([row.next_observation, fixed_z]))[0]
            target = config.reward_scale * row.training_reward + (1 - row.terminated) * config.discount * future
            for k in range(2):
                q = numpy_mlp(critics[k].layers, np.concatenate([row.observation, row.action, z]))[0]
                squared[k].append((q - target) ** 2)
    loss = np.mean(squared[0]) + np.mean(squared[1]) + config.kl_weight * bottleneck
    if not config.contrastive:
        return loss
    crops, number = batch.crops, len(batch.crops.task)
    query = [embed(model.encoder, crops.rows[0][i], crops.valid[i]) for i in range(number)]
    key = [embed(agent.key_encoder, crops.rows[1][i], crops.valid[i]) for i in range(number)]
    bilinear = None if model.bilinear is None else np.asarray(model.bilinear, float)
    cross_entropy = []
    for i in range(number):
        same_task = crops.task == crops.task[i]
        same = same_task & (crops.episode == crops.episode[i])
        others = [
            j for j in range(number) if j == i or not (same_task if config.negatives == "other_tasks" else same)[j]
        ]
        logits = {
            j: numpy_similarity(query[i], key[j], config.similarity, bilinear) / config.temperature for j in others
        }
        cross_entropy.append(special.logsumexp(list(logits.values())) - logits[i])
    loss += config.contrastive_weight * np.mean(cross_entropy)
    return loss + config.contrastive_kl_weight * np.mean([kl(*q) for q in query])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"contrastive": False},
        {"similarity": "bilinear", "temperature": 0.5},
        {"negatives": "other_tasks", "next_observation_in_context": True},
    ],
)
def test_model_loss_and_its_gradient_equal_numpy_and_finite_differences(family, options):
    config = small(contrastive_weight=0.7, contrastive_kl_weight=0.3, **options)
    state, batch = data(config, family)
    key = jax.random.key(5)
    oracle = jnp.zeros((TASKS, 2))
    noise = np.asarray(jax.random.normal(key, (TASKS, LATENT)), float)
    model_loss = jax.jit(jax.value_and_grad(partial(cocoa.model_loss, config=config), has_aux=True))
    (loss, (z, _)), gradient = model_loss(state.agent.model, state.agent, oracle, batch, key)
    np.testing.assert_allclose(loss, numpy_loss(config, state.agent, batch, noise), rtol=1e-4)
    fixed = np.asarray(z, float).reshape(TASKS, -1, LATENT)[:, 0]

    def slope(where, position):
        def moved(amount):
            change = lambda x: np.asarray(x, float) + amount * (np.arange(x.size).reshape(x.shape) == position)
            agent = state.agent._replace(model=eqx.tree_at(where, state.agent.model, replace_fn=change))
            return numpy_loss(config, agent, batch, noise, target_value=fixed)

        return (moved(1e-5) - moved(-1e-5)) / 2e-5

    weights = [
        (lambda model: model.encoder.layers[0].weight, 3),
        (lambda model: model.encoder.layers[3].weight, 11),
        (lambda model: model.critics.layers[1].weight, 70),
        (lambda model: model.critics.layers[3].weight, 9),
    ]
    if config.similarity == "bilinear":
        weights.append((lambda model: model.bilinear, 6))
    for where, position in weights:
        ours = where(gradient).reshape(-1)[position]
        np.testing.assert_allclose(ours, slope(where, position), rtol=2e-3, atol=1e-5)


def test_actor_and_value_losses_equal_numpy(family):
    config = small()
    state, batch = data(config, family)
    agent, key = state.agent, jax.random.key(3)
    observation = cocoa.flatten(batch.transitions.observation)
    z = jax.random.normal(jax.random.key(4), (len(observation), LATENT))
    loss, (soft_value, _) = cocoa.actor_loss(agent.actor, agent, observation, z, key)
    noise = np.asarray(jax.random.normal(key, (len(observation), 2)), float)
    total, means, log_stds, exact = [], [], [], []
    for i in range(len(observation)):
        output = numpy_mlp(agent.actor.layers, np.concatenate([observation[i], z[i]]).astype(float))
        mean, log_std = output[:2], np.clip(output[2:], -20, 2)
        raw = mean + np.exp(log_std) * noise[i]
        log_prob = np.sum(stats.norm.logpdf(raw, mean, np.exp(log_std)) - np.log(1 - np.tanh(raw) ** 2))
        inputs = np.concatenate([observation[i], np.tanh(raw), z[i]]).astype(float)
        q = [numpy_mlp(entry(agent.model.critics, k).layers, inputs)[0] for k in range(2)]
        exact.append(min(q) - log_prob)
        total.append(log_prob - min(q))
        means.append(mean**2)
        log_stds.append(log_std**2)
    np.testing.assert_allclose(loss, np.mean(total) + 1e-3 * np.mean(means) + 1e-3 * np.mean(log_stds), rtol=1e-4)
    np.testing.assert_allclose(soft_value, exact, rtol=1e-4, atol=1e-5)
    value = [numpy_mlp(agent.value.layers, np.concatenate([o, u]).astype(float))[0] for o, u in zip(observation, z)]
    ours = cocoa.value_loss(agent.value, observation, z, soft_value)
    np.testing.assert_allclose(ours, np.mean((np.array(value) - np.array(exact)) ** 2), rtol=1e-4)


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def test_which_loss_reaches_which_network(family):
    """The table of the fact sheet, section 1.4; each weight alone."""
    config = small(kl_weight=0.0, contrastive_weight=0.0, contrastive_kl_weight=0.0)
    state, batch = data(config, family)
    oracle, key = jnp.zeros((TASKS, 2)), jax.random.key(0)

    def reach(config):
        def loss(agent):
            return cocoa.model_loss(agent.model, agent, oracle, batch, key, config)[0]

        return jax.grad(loss)(state.agent)

    critics_only = reach(config)
    assert largest(critics_only.model.encoder) > 0 and largest(critics_only.model.critics) > 0
    assert largest(critics_only.target_value) == 0, "the target is held fixed"
    for name in ("kl_weight", "contrastive_weight", "contrastive_kl_weight"):
        more = reach(dataclasses.replace(config, **{name: 1.0}))
        differs = jax.tree.map(lambda a, b: a - b, more, critics_only)
        assert largest(differs.model.encoder) > 0, name
        assert largest(differs._replace(model=differs.model._replace(encoder=None))) == 0, name
        assert largest(more.key_encoder) == 0 and largest(more.actor) == 0 and largest(more.value) == 0


def test_one_update_is_adam_on_each_loss_in_turn(family):
    config = small(momentum=0.5, target_rate=0.5)
    state, _ = data(config, family)
    key = jax.random.key(9)
    after, _ = jax.jit(lambda s: cocoa.update(config, family, s, key))(state)
    batch_key, z_key, action_key = jax.random.split(key, 3)
    batch = cocoa.sample(config, state, batch_key)
    agent, oracle = state.agent, jnp.zeros((TASKS, 2))

    def first_adam(parameters, gradient):  # Adam's first step is the sign of the gradient
        step = lambda p, g: p - config.learning_rate * g / (jnp.abs(g) + 1e-8)
        return jax.tree.map(step, parameters, gradient)

    gradient, (z, _) = jax.grad(cocoa.model_loss, has_aux=True)(agent.model, agent, oracle, batch, z_key, config)
    model = first_adam(agent.model, gradient)
    observation = cocoa.flatten(batch.transitions.observation)
    stepped = agent._replace(model=model)
    gradient, (soft, _) = jax.grad(cocoa.actor_loss, has_aux=True)(agent.actor, stepped, observation, z, action_key)
    actor = first_adam(agent.actor, gradient)
    value = first_adam(agent.value, jax.grad(cocoa.value_loss)(agent.value, observation, z, soft))
    mixed = lambda rate, old, new: jax.tree.map(lambda a, b: a + rate * (b - a), old, new)
    target = mixed(config.target_rate, agent.target_value, value)
    key_encoder = mixed(1 - config.momentum, agent.key_encoder, model.encoder)
    expected = cocoa.Agent(model, actor, value, target, key_encoder)
    chex.assert_trees_all_close(after.agent, expected, rtol=1e-4, atol=1e-4 * config.learning_rate)


def test_the_key_encoder_starts_as_the_encoder_and_lags_behind(family):
    config = small()
    state = cocoa.init(config, family, jax.random.key(0))
    chex.assert_trees_all_equal(state.agent.key_encoder, state.agent.model.encoder)
    state = cocoa.fill(config, family, state)
    after, _ = jax.jit(lambda s: cocoa.learn(config, family, s))(state)
    moved = lambda tree: largest(jax.tree.map(lambda a, b: a - b, tree, state.agent.model.encoder))
    assert 0 < moved(after.agent.key_encoder) < moved(after.agent.model.encoder)
    assert int(after.gradient_steps) == config.updates_per_iteration
    assert int(after.env_steps) == int(state.env_steps)


def test_initial_weights_are_those_of_rlkit(family):
    config = small(width=50, encoder_width=20)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    for network, width, final in ((agent.model.encoder, 20, 3e-3), (agent.actor, 50, 1e-3), (agent.value, 50, 3e-3)):
        *hidden, last = network.layers
        for layer in hidden:
            assert 0.8 / np.sqrt(width) < float(jnp.abs(layer.weight).max()) <= 1 / np.sqrt(width) + 1e-6
            np.testing.assert_allclose(layer.bias, 0.1)
        assert 0.5 * final < float(jnp.abs(last.weight).max()) <= final * 1.0001
        assert float(jnp.abs(last.bias).max()) <= final
    chex.assert_trees_all_equal(agent.value, agent.target_value)
    first, second = (entry(agent.model.critics, i) for i in range(2))
    assert largest(jax.tree.map(lambda a, b: a - b, first, second)) > 0.01
