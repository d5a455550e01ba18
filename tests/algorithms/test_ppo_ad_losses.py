"""The losses of ppo_ad.py against NumPy written from the fact sheet's formulas, and what each of them trains."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import ppo_ad
from envs import AchievementEnv, AchievementState

FEATURES, ACTIONS, LATENT = 5, 3, 12


class Blank(AchievementEnv):
    """Has sizes; nothing ever happens."""

    name = "blank"

    def __init__(self, shape=(FEATURES,), actions=ACTIONS, achievements=4):
        self.observation_shape, self.num_actions = shape, actions
        self.achievement_names = tuple(f"a{i}" for i in range(achievements))

    def reset(self, key):
        bits = jnp.zeros(len(self.achievement_names), bool)
        observation = jnp.zeros(self.observation_shape)
        return AchievementState((), observation, jnp.zeros(()), jnp.zeros((), bool), bits)

    def step(self, state, action):
        return state

    render = None


CONFIG = ppo_ad.Config(
    env="blank", num_envs=2, episode_length=30, unroll_length=20, auxiliary_every=2, auxiliary_epochs=2,
    auxiliary_batch_size=8, num_targets=2, latent_size=LATENT, dense_size=8, num_minibatches=4, update_epochs=2,
    transport="dykstra", learning_rate=1e-2,
)  # fmt: skip

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""

# ---- the formulas of the sheet, of one step, in float64 or (to be differentiated) in JAX ---------------------------


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def normed_dense(layer, x, xp):
    x = (x - x.mean()) / xp.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
    return xp.maximum(layer.weight @ (x * layer.layer_norm.weight + layer.layer_norm.bias), 0)


def unit(x, xp=np):
    return x / xp.maximum(xp.sqrt((x**2).sum()), 1e-12)


def encode(agent, observation, xp=np):
    first = agent.encoder.first
    x = xp.maximum(first.weight @ observation + first.bias, 0)
    return normed_dense(agent.encoder.latent, normed_dense(agent.encoder.dense, x, xp), xp)


def act(agent, latent, memory, xp=np):
    features = xp.concatenate([latent, memory])
    logits = agent.policy.weight @ features + agent.policy.bias
    return logits - xp.log(xp.exp(logits).sum()), (agent.value.weight @ features + agent.value.bias)[0]


def mlp(network, x, xp):
    return network.out.weight @ normed_dense(network.hidden, x, xp) + network.out.bias


def predict(agent, latent, action, memory, xp=np):
    modulation = mlp(agent.film, xp.eye(len(agent.policy.bias))[action], xp)
    scale, shift = modulation[: len(latent)], modulation[len(latent) :]
    return unit(mlp(agent.predictor, xp.concatenate([(1 + scale) * latent + shift, memory]), xp), xp)


def contrast(anchor, positive, negative, xp=np, temperature=0.1):
    a, b = xp.exp(anchor @ positive / temperature), xp.exp(anchor @ negative / temperature)
    return -xp.log(a / (a + b))


class SlowNormaliser:
    """1.5 of the sheet, in floats."""

    def __init__(self, normaliser=(0, 0, 0)):
        self.mean, self.square, self.weight = map(float, normaliser)

    def update(self, returns):
        returns = np.asarray(returns, np.float64)
        self.mean = 0.99 * self.mean + 0.01 * returns.mean()
        self.square = 0.99 * self.square + 0.01 * (returns**2).mean()
        self.weight = 0.99 * self.weight + 0.01

    def moments(self):
        mean = self.mean / max(self.weight, 0.01)
        return mean, math.sqrt(max(self.square / max(self.weight, 0.01) - mean**2, 0.01))

    def __call__(self, returns):
        mean, deviation = self.moments()
        return (returns - mean) / deviation

    def values(self):
        return [self.mean, self.square, self.weight]


# ---- material ------------------------------------------------------------------------------------------------------


def random_agent(config, seed, env=None):
    """An agent with random weights of ordinary size, biases and norms included, so that no parameter is without effect
    and the policy is far from uniform."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if leaf.ndim == 2:
            weight = rng.normal(size=leaf.shape) / math.sqrt(leaf.shape[1])
        else:
            weight = 0.3 * rng.normal(size=leaf.shape) + (jax.tree_util.keystr(path).endswith("norm.weight"))
        return jnp.array(weight, jnp.float32)

    shapes = jax.eval_shape(partial(ppo_ad.make_agent, config, env or Blank()), jax.random.key(0))
    return jax.tree.map_with_path(fill, shapes)


def unit_rows(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def agent():
    return random_agent(CONFIG, 0)


@pytest.fixture(scope="module")
def other():
    return random_agent(CONFIG, 1)


NORMALISER = ppo_ad.Normaliser(*map(jnp.array, (0.11, 0.35, 0.3)))


def make_rows(agent, count, seed=0):
    """Rows whose old policy and value are those of `agent`."""
    rng, slow = np.random.default_rng(seed), exact(agent)
    observation = rng.normal(size=(count, FEATURES)).astype(np.float32)
    memory = unit_rows(rng, count, LATENT) * (rng.random((count, 1)) < 0.7)
    action, returns = rng.integers(0, ACTIONS, count), rng.normal(1, 1, count)
    log_probs, value = map(np.array, zip(*(act(slow, encode(slow, o), m) for o, m in zip(observation, memory))))
    rows = observation, action, memory, returns, log_probs, value
    return ppo_ad.Rows(*(jnp.array(x, jnp.int32 if x is action else jnp.float32) for x in rows))


# ---- networks ------------------------------------------------------------------------------------------------------


def test_encoder_heads_and_predictor_equal_numpy(agent):
    rows, slow = make_rows(agent, 9), exact(agent)

    @jit
    def fast(observation):
        latent = ppo_ad.encode(agent, observation)
        return latent, *ppo_ad.act(agent, latent, rows.memory), ppo_ad.predict(agent, latent, rows.action, rows.memory)

    latent, log_probs, value, predicted = fast(rows.observation)
    for i, (o, a, m) in enumerate(zip(*(np.asarray(x) for x in rows[:3]))):
        phi = encode(slow, o.astype(float))
        np.testing.assert_allclose(latent[i], phi, rtol=1e-4, atol=1e-5)
        expected_log_probs, expected_value = act(slow, phi, m)
        np.testing.assert_allclose(log_probs[i], expected_log_probs, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(value[i], expected_value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(predicted[i], predict(slow, phi, a, m), rtol=1e-4, atol=1e-4)
    assert np.asarray(latent).max() > 0.1 and (np.asarray(latent) >= 0).all()


def test_bytes_are_scaled_to_one(agent):
    encode_all, slow = jit(partial(ppo_ad.encode, agent)), exact(agent)
    bytes_ = np.random.default_rng(0).integers(0, 256, (2, FEATURES)).astype(np.uint8)
    for observation, scale in ((bytes_, 255), (bytes_.astype(np.float32), 1)):
        expected = [encode(slow, o.astype(float) / scale) for o in observation]
        np.testing.assert_allclose(encode_all(jnp.array(observation)), expected, rtol=1e-4, atol=1e-5)


def test_unit_vectors_and_their_gradient_at_zero():
    x = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32) * np.array(
        [[1e-6], [1], [1e6], [0]], np.float32
    )
    norms = np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    np.testing.assert_allclose(ppo_ad.unit(jnp.array(x)), x / np.maximum(norms, 1e-12), rtol=1e-5)
    weights = np.random.default_rng(1).normal(size=7)
    gradient = jax.grad(lambda x: jnp.sum(ppo_ad.unit(x) * weights))(jnp.array(x))
    assert (np.asarray(gradient[3]) == 0).all()
    y = x[1].astype(float)
    slope = [weights @ (unit(y + 1e-5 * e) - unit(y - 1e-5 * e)) / 2e-5 for e in np.eye(7)]
    np.testing.assert_allclose(gradient[1], slope, rtol=1e-3, atol=1e-5)


def test_an_achievement_is_the_change_of_the_latent_state(agent):
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 4, FEATURES)).astype(np.float32)
    after[3] = before[3]
    vectors = jit(ppo_ad.represent)(agent, jnp.array(before), jnp.array(after))
    slow = exact(agent)
    for i in range(3):
        np.testing.assert_allclose(vectors[i], unit(encode(slow, after[i]) - encode(slow, before[i])), atol=1e-4)
    assert (np.asarray(vectors[3]) == 0).all(), "no change has no direction"


# ---- the normaliser ------------------------------------------------------------------------------------------------


@jit
def updated(normaliser, returns, valid):
    """The normaliser after a minibatch, its moments, the minibatch normalised, and that denormalised."""
    normaliser = normaliser.update(returns, valid)
    normalised = normaliser.normalise(returns)
    return normaliser, normaliser.moments(), normalised, normaliser.denormalise(normalised)


def test_normaliser_after_one_update_with_a_constant():
    """Known answer 3: weight 0.01, mean c, variance 0.01."""
    start = ppo_ad.Normaliser(*jnp.zeros(3))
    np.testing.assert_allclose(start.moments(), (0, 0.1), rtol=1e-6)
    np.testing.assert_allclose(start.denormalise(jnp.array([3.0])), [0.3], rtol=1e-6)
    after, (mean, deviation), *_ = updated(start, jnp.full(7, 2.5), jnp.ones(7, bool))
    np.testing.assert_allclose(after.weight, 0.01, rtol=1e-5)
    np.testing.assert_allclose(mean, 2.5, rtol=1e-5)
    np.testing.assert_allclose(deviation**2, 0.01, rtol=1e-4)


def test_normaliser_equals_numpy_and_ignores_what_is_masked():
    rng, fast, slow = np.random.default_rng(0), ppo_ad.Normaliser(*jnp.zeros(3)), SlowNormaliser()
    for _ in range(30):
        returns, valid = rng.normal(3, 2, 7), rng.random(7) < 0.6
        valid[rng.integers(7)] = True
        slow.update(returns[valid])
        returns = np.where(valid, returns, 1e3)
        fast, moments, normalised, back = updated(fast, jnp.array(returns, jnp.float32), jnp.array(valid))
        np.testing.assert_allclose(fast, slow.values(), rtol=1e-5)
        np.testing.assert_allclose(moments, slow.moments(), rtol=1e-4)
        np.testing.assert_allclose(normalised, slow(returns), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(back, returns, rtol=1e-3)
    assert slow.moments()[1] > 1, "the variance is above its floor"


# ---- PPO -----------------------------------------------------------------------------------------------------------


def test_advantages_equal_a_double_loop():
    """Sum over k of (discount lambda)^k delta_{t+k}, up to the first end of an episode."""
    rng = np.random.default_rng(0)
    reward, value, done = rng.normal(size=(25, 3)), rng.normal(size=(26, 3)), rng.random((25, 3)) < 0.2
    done[0, 0] = done[24, 1] = True
    done[24, 2] = False
    expected = np.zeros((25, 3))
    for e in range(3):
        for t in range(25):
            for k in range(25 - t):
                ends = done[t + k, e]
                delta = reward[t + k, e] + (0 if ends else 0.9 * value[t + k + 1, e]) - value[t + k, e]
                expected[t, e] += (0.9 * 0.7) ** k * delta
                if ends:
                    break
    arrays = jnp.array(reward, jnp.float32), jnp.array(value, jnp.float32), jnp.array(done)
    np.testing.assert_allclose(ppo_ad.advantages(*arrays, 0.9, 0.7), expected, rtol=1e-4, atol=1e-5)


def make_batch(agent, count=12, seed=0):
    """Log-probabilities that differ from the agent's, so that some ratios are clipped on either side."""
    rng, rows = np.random.default_rng(seed), make_rows(agent, count, seed)
    log_prob = np.asarray(rows.old_log_probs)[np.arange(count), rows.action] + rng.normal(0, 0.4, count)
    advantage, log_prob = rng.normal(size=count).astype(np.float32), log_prob.astype(np.float32)
    return ppo_ad.Batch(
        rows.observation, rows.action, jnp.array(log_prob), rows.memory, jnp.array(advantage), rows.returns
    )


def slow_ppo_loss(agent, normaliser, batch, config):
    batch, total = exact(batch), dict.fromkeys(("policy_loss", "value_loss", "entropy", "kl", "clipped"), 0)
    normaliser = SlowNormaliser(normaliser)
    normaliser.update(batch.returns)
    for o, a, log_prob, m, advantage, returns in zip(*batch):
        log_probs, value = act(agent, encode(agent, o), m)
        ratio = np.exp(log_probs[int(a)] - log_prob)
        low, high = 1 - config.clip, 1 + config.clip
        total["policy_loss"] -= min(ratio * advantage, min(max(ratio, low), high) * advantage) / len(batch.action)
        total["value_loss"] += (value - normaliser(returns)) ** 2 / len(batch.action)
        total["entropy"] -= np.exp(log_probs) @ log_probs / len(batch.action)
        total["kl"] += (ratio - 1 - np.log(ratio)) / len(batch.action)
        total["clipped"] += (not low <= ratio <= high) / len(batch.action)
    weights = 1, config.value_weight, -config.entropy_weight
    return sum(w * x for w, x in zip(weights, total.values())), total, normaliser


def test_ppo_loss_and_its_gradient_equal_numpy(agent):
    config = dataclasses.replace(CONFIG, clip=0.15, value_weight=0.7, entropy_weight=0.3)
    batch = make_batch(agent)
    (loss, (normaliser, info)), gradient = jit(
        jax.value_and_grad(partial(ppo_ad.ppo_loss, config=config), has_aux=True)
    )(agent, NORMALISER, batch)
    slow = exact(agent)
    expected, parts, slow_normaliser = slow_ppo_loss(slow, NORMALISER, batch, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(info["train/loss"], expected, rtol=1e-4)
    for name, value in parts.items():
        np.testing.assert_allclose(info[f"train/{name}"], value, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    assert 0.2 < parts["clipped"] < 0.9
    for network in (gradient.film, gradient.predictor):
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(network))
    along = lambda agent: slow_ppo_loss(agent, NORMALISER, batch, config)[0]
    check_gradient(along, slow, gradient, ("encoder", "policy", "value"))


def check_gradient(loss, agent, gradient, names, count=3):
    """Of each named part of the agent, the slope in random directions against central differences."""
    rng = np.random.default_rng(0)
    for name in names:
        leaves, tree = jax.tree.flatten(getattr(agent, name))
        slopes = jax.tree.leaves(getattr(gradient, name))
        for _ in range(count):
            direction = [rng.normal(size=x.shape) for x in leaves]

            def moved(by, name=name, leaves=leaves, direction=direction, tree=tree):
                part = tree.unflatten([x + by * d for x, d in zip(leaves, direction)])
                return dataclasses.replace(agent, **{name: part})

            expected = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
            got = sum(np.sum(np.asarray(g, float) * d) for g, d in zip(slopes, direction))
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=name)


# ---- the auxiliary losses ------------------------------------------------------------------------------------------


def slow_regularisers(agent, normaliser, rows, which, config):
    """Means over the listed rows (which may name a row more than once)."""
    rows, normaliser = exact(rows), SlowNormaliser(normaliser)
    normaliser.update(rows.returns[which])
    divergence = error = 0
    for i in which:
        log_probs, value = act(agent, encode(agent, rows.observation[i]), rows.memory[i])
        old = rows.old_log_probs[i]
        if config.variant == "code":
            divergence += np.exp(log_probs) @ (log_probs - old) / len(which)
            error += (value - normaliser(rows.returns[i])) ** 2 / len(which)
        else:
            divergence += np.exp(old) @ (old - log_probs) / len(which)
            error += (value - rows.old_value[i]) ** 2 / 2 / len(which)
    return divergence, error, normaliser


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_regularisers_equal_numpy(agent, other, variant):
    """Known answer 8, too: at the first auxiliary step, R_pi and its gradient are 0, and R_V is not, since returns are
    not the value. In the paper's variant it is 0 as well."""
    config = dataclasses.replace(CONFIG, variant=variant, policy_regulariser=0.6, value_regulariser=1.7)
    valid, slow = np.arange(10) % 3 > 0, exact(agent)
    which = np.flatnonzero(valid)

    @jit
    def fast(agent, rows):
        def losses(agent):
            latent = ppo_ad.encode(agent, rows.observation)
            total, (normaliser, info) = ppo_ad.regularisers(agent, NORMALISER, latent, rows, jnp.array(valid), config)
            return (total, info["policy_divergence"], info["value_error"]), normaliser

        return *losses(agent), jax.jacrev(losses, has_aux=True)(agent)[0]

    rows = make_rows(other, 10)
    values, normaliser, (gradient, _, _) = fast(agent, rows)
    divergence, error, slow_normaliser = slow_regularisers(slow, NORMALISER, rows, which, config)
    np.testing.assert_allclose(values, (0.6 * divergence + 1.7 * error, divergence, error), rtol=1e-3)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    assert divergence > 0.02

    def along(agent):
        divergence, error, _ = slow_regularisers(agent, NORMALISER, rows, which, config)
        return 0.6 * divergence + 1.7 * error

    check_gradient(along, slow, gradient, ("encoder", "policy", "value"))

    (_, divergence, error), _, (_, *gradients) = fast(agent, make_rows(agent, 10))
    slope, value_slope = (float(optax.global_norm(g)) for g in gradients)
    np.testing.assert_allclose((divergence, slope), 0, atol=1e-5)
    if variant == "code":
        assert min(error, value_slope) > 0.1
    else:
        np.testing.assert_allclose((error, value_slope), 0, atol=1e-5)


def test_contrast_equals_numpy_over_the_valid_rows():
    rng = np.random.default_rng(0)
    anchor, positive, negative = (unit_rows(rng, 9, 4) for _ in range(3))
    valid = np.arange(9) % 4 > 0
    fast = ppo_ad.contrast(*map(jnp.array, (anchor, positive, negative, valid)), 0.2)
    rows = [x[valid].astype(float) for x in (anchor, positive, negative)]
    np.testing.assert_allclose(fast[0], np.mean([contrast(*row, temperature=0.2) for row in zip(*rows)]), rtol=1e-5)
    np.testing.assert_allclose(fast[1], np.mean([a @ p > a @ n for a, p, n in zip(*rows)]), rtol=1e-6)


def test_contrast_of_equal_inner_products_is_log_two():
    """Known answer 7; and far from it nothing overflows."""
    rng, all_valid = np.random.default_rng(0), jnp.ones(5, bool)
    anchor, positive = jnp.array(unit_rows(rng, 5, 4)), jnp.array(unit_rows(rng, 5, 4))
    mirrored = 2 * jnp.sum(anchor * positive, axis=1, keepdims=True) * anchor - positive
    np.testing.assert_allclose(ppo_ad.contrast(anchor, positive, mirrored, all_valid, 0.1)[0], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(ppo_ad.contrast(anchor, -anchor, anchor, all_valid, 1e-3)[0], 2000, rtol=1e-4)
    np.testing.assert_allclose(ppo_ad.contrast(anchor, anchor, -anchor, all_valid, 1e-3)[0], 0, atol=1e-6)


def slow_prediction_loss(agent, rows, positive, negative, anchor, config):
    rows, count = exact(rows), len(positive)
    psi = lambda i: predict(agent, encode(agent, rows.observation[i]), int(rows.action[i]), rows.memory[i])
    margins = [(psi(p), psi(n)) for p, n in zip(positive, negative)]
    loss = sum(contrast(a, *m, temperature=config.temperature) for a, m in zip(anchor, margins)) / count
    accuracy = np.mean([a @ p > a @ n for a, (p, n) in zip(anchor, margins)])
    divergence, error, normaliser = slow_regularisers(agent, NORMALISER, rows, [*positive, *negative], config)
    return loss + divergence + error, {"loss": loss, "accuracy": accuracy}, normaliser


def test_prediction_loss_and_its_gradient_equal_numpy(agent, other):
    """Ten rows, of which two pairs are padding; no row occurs twice among the others."""
    rng, config = np.random.default_rng(0), dataclasses.replace(CONFIG, temperature=0.4)
    rows, anchor = make_rows(other, 10), unit_rows(rng, 5, LATENT)
    positive, negative, valid = np.array([0, 5, 2, 9, 9]), np.array([1, 7, 4, 0, 3]), np.array([1, 1, 1, 0, 0], bool)

    @jit
    @partial(jax.jacrev, argnums=(0, 1), has_aux=True)
    def fast(agent, anchor):
        args = rows, jnp.array(positive), jnp.array(negative), anchor, jnp.array(valid)
        total, (normaliser, info) = ppo_ad.prediction_loss(agent, NORMALISER, *args, config)
        return (total, info["loss"]), (total, normaliser, info)

    ((gradient, of_anchor), (bare, _)), (total, normaliser, info) = fast(agent, jnp.array(anchor))
    kept = positive[:3], negative[:3], anchor[:3].astype(float)
    slow = exact(agent)
    expected, parts, slow_normaliser = slow_prediction_loss(slow, rows, *kept, config)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(info["loss"], parts["loss"], rtol=1e-3)
    np.testing.assert_allclose(info["accuracy"], parts["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    assert (np.asarray(of_anchor) == 0).all(), "anchors are constants"
    along = lambda agent: slow_prediction_loss(agent, rows, *kept, config)[0]
    check_gradient(along, slow, gradient, ("encoder", "policy", "value", "film", "predictor"))
    sizes = {name: float(optax.global_norm(getattr(bare, name))) for name in vars(bare)}
    assert sizes["policy"] == sizes["value"] == 0 < min(sizes[x] for x in ("encoder", "film", "predictor")), sizes


def slow_matching_loss(agent, before, after, source, positive, negative, rows, config):
    total = accuracy = 0
    for u, p, n in zip(source, positive, negative):
        nu = unit(encode(agent, after[u]) - encode(agent, before[u]))
        total += contrast(nu, p, n, temperature=config.temperature) / len(source)
        accuracy += (nu @ p > nu @ n) / len(source)
    divergence, error, normaliser = slow_regularisers(agent, NORMALISER, rows, range(len(source)), config)
    return total + divergence + error, {"loss": total, "accuracy": accuracy}, normaliser


def test_matching_loss_and_its_gradient_equal_numpy(agent, other):
    """Six matches of four achievements; the last two are padding."""
    rng, config = np.random.default_rng(0), dataclasses.replace(CONFIG, temperature=0.4)
    before, after = rng.normal(size=(2, 4, FEATURES)).astype(np.float32)
    positive, negative, source = unit_rows(rng, 6, LATENT), unit_rows(rng, 6, LATENT), np.array([3, 0, 0, 1, 2, 2])
    rows, valid = make_rows(other, 6), np.arange(6) < 4

    @jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def fast(agent, positive, negative):
        args = *map(jnp.array, (before, after, source)), positive, negative, jnp.array(valid)
        return ppo_ad.matching_loss(agent, NORMALISER, *args, rows, config)

    (total, (normaliser, info)), (gradient, *of_targets) = fast(agent, jnp.array(positive), jnp.array(negative))
    kept = before, after, source[:4], positive[:4].astype(float), negative[:4].astype(float), rows
    slow = exact(agent)
    expected, parts, slow_normaliser = slow_matching_loss(slow, *kept, config)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(info["loss"], parts["loss"], rtol=1e-3)
    np.testing.assert_allclose(info["accuracy"], parts["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    for x in of_targets:
        assert (np.asarray(x) == 0).all(), "positives and negatives are constants"
    for network in (gradient.film, gradient.predictor):
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(network))
    along = lambda agent: slow_matching_loss(agent, *kept, config)[0]
    check_gradient(along, slow, gradient, ("encoder", "policy", "value"))


# ---- scores --------------------------------------------------------------------------------------------------------


def test_score_is_the_geometric_mean_of_percentages():
    rates = np.random.default_rng(0).random(22)
    rates[3] = 0
    expected = math.prod(1 + 100 * r for r in rates) ** (1 / 22) - 1
    np.testing.assert_allclose(ppo_ad.crafter_score(jnp.array(rates, jnp.float32)), expected, rtol=1e-4)
    assert ppo_ad.crafter_score(jnp.zeros(22)) == 0
    np.testing.assert_allclose(ppo_ad.crafter_score(jnp.ones(22)), 100, rtol=1e-4)
