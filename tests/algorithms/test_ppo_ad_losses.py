"""The losses of ppo_ad.py against NumPy written from the fact sheet's formulas, and what each of them trains."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transport import pot

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
    learning_rate=1e-2,
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


def make_steps(agent, count, seed=0, config=CONFIG):
    """Steps whose stored policy and value are those of `agent`; what no loss reads is NaN, or true."""
    rng, slow = np.random.default_rng(seed), exact(agent)
    observation = rng.normal(size=(count, FEATURES)).astype(np.float32)
    memory = unit_rows(rng, count, LATENT) * (rng.random((count, 1)) < 0.7)
    action, returns = rng.integers(0, ACTIONS, count), rng.normal(1, 1, count)
    log_probs, value = map(np.array, zip(*(act(slow, encode(slow, o), m) for o, m in zip(observation, memory))))
    floats = {"observation": observation, "memory": memory, "log_probs": log_probs, "value": value, "returns": returns}
    nothing = dict.fromkeys(("reward", "episode_return", "advantage"), np.full(count, np.nan))
    flags = dict.fromkeys(("done", "unlocked", "achievements"), jnp.ones(count, bool))
    floats = {name: jnp.array(x, jnp.float32) for name, x in (floats | nothing).items()}
    return ppo_ad.Step(action=jnp.array(action, jnp.int32), episode_steps=jnp.zeros(count, int), **floats, **flags)


# ---- networks ------------------------------------------------------------------------------------------------------


def test_encoder_heads_and_predictor_equal_numpy(agent):
    rows, slow = make_steps(agent, 9), exact(agent)

    @jit
    def fast(observation):
        latent = ppo_ad.encode(agent, observation)
        return latent, *ppo_ad.act(agent, latent, rows.memory), ppo_ad.predict(agent, latent, rows.action, rows.memory)

    latent, log_probs, value, predicted = fast(rows.observation)
    for i, (o, a, m) in enumerate(zip(*map(np.asarray, (rows.observation, rows.action, rows.memory)))):
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


# ---- the normaliser ------------------------------------------------------------------------------------------------


@jit
def updated(normaliser, returns, weight):
    """The normaliser after a minibatch, its moments, the minibatch normalised, and that denormalised."""
    normaliser = normaliser.update(returns, weight)
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


def test_normaliser_equals_numpy_with_returns_as_often_as_they_weigh():
    rng, fast, slow = np.random.default_rng(0), ppo_ad.Normaliser(*jnp.zeros(3)), SlowNormaliser()
    for _ in range(30):
        returns, weight = rng.normal(3, 2, 7), rng.integers(0, 4, 7)
        weight[rng.integers(7)] = 1
        slow.update(np.repeat(returns, weight))
        returns = np.where(weight > 0, returns, 1e3)
        fast, moments, normalised, back = updated(fast, jnp.array(returns, jnp.float32), jnp.array(weight))
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
    config = dataclasses.replace(CONFIG, discount=0.9, gae_lambda=0.7)
    np.testing.assert_allclose(ppo_ad.advantages(*arrays, config), expected, rtol=1e-4, atol=1e-5)


def make_batch(agent, count=12, seed=0):
    """Log-probabilities that differ from the agent's, so that some ratios are clipped on either side."""
    rng, steps = np.random.default_rng(seed), make_steps(agent, count, seed)
    log_probs = steps.log_probs + rng.normal(0, 0.4, steps.log_probs.shape)
    return steps._replace(log_probs=log_probs, advantage=jnp.array(rng.normal(size=count), jnp.float32))


def slow_ppo_loss(agent, normaliser, batch, config):
    batch, total = exact(batch), dict.fromkeys(("policy_loss", "value_loss", "entropy", "kl", "clipped"), 0)
    normaliser = SlowNormaliser(normaliser)
    normaliser.update(batch.returns)
    fields = batch.observation, batch.action, batch.log_probs, batch.memory, batch.advantage, batch.returns
    for o, a, old, m, advantage, returns in zip(*fields):
        log_probs, value = act(agent, encode(agent, o), m)
        ratio = np.exp(log_probs[int(a)] - old[int(a)])
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
        old = rows.log_probs[i]
        if config.variant == "code":
            divergence += np.exp(log_probs) @ (log_probs - old) / len(which)
            error += (value - normaliser(rows.returns[i])) ** 2 / len(which)
        else:
            divergence += np.exp(old) @ (old - log_probs) / len(which)
            error += (value - rows.value[i]) ** 2 / 2 / len(which)
    return divergence, error, normaliser


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_regularisers_equal_numpy(agent, other, variant):
    """Known answer 8, too: at the first auxiliary step, R_pi and its gradient are 0, and R_V is not, since returns are
    not the value. In the paper's variant it is 0 as well."""
    config = dataclasses.replace(CONFIG, variant=variant, policy_regulariser=0.6, value_regulariser=1.7)
    weight, slow = np.arange(10) % 3, exact(agent)
    which = np.repeat(np.arange(10), weight)

    @jit
    def fast(agent, rows):
        def losses(agent):
            latent = ppo_ad.encode(agent, rows.observation)
            total, (normaliser, info) = ppo_ad.regularisers(agent, NORMALISER, latent, rows, jnp.array(weight), config)
            return (total, info["policy_divergence"], info["value_error"]), normaliser

        return *losses(agent), jax.jacrev(losses, has_aux=True)(agent)[0]

    rows = make_steps(other, 10)
    values, normaliser, (gradient, _, _) = fast(agent, rows)
    divergence, error, slow_normaliser = slow_regularisers(slow, NORMALISER, rows, which, config)
    np.testing.assert_allclose(values, (0.6 * divergence + 1.7 * error, divergence, error), rtol=1e-3)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    assert divergence > 0.02

    def along(agent):
        divergence, error, _ = slow_regularisers(agent, NORMALISER, rows, which, config)
        return 0.6 * divergence + 1.7 * error

    check_gradient(along, slow, gradient, ("encoder", "policy", "value"))

    (_, divergence, error), _, (_, *gradients) = fast(agent, make_steps(agent, 10))
    slope, value_slope = (float(optax.global_norm(g)) for g in gradients)
    np.testing.assert_allclose((divergence, slope), 0, atol=1e-5)
    if variant == "code":
        assert min(error, value_slope) > 0.1
    else:
        np.testing.assert_allclose((error, value_slope), 0, atol=1e-5)


def test_contrast_equals_numpy_over_the_valid_rows():
    rng, config = np.random.default_rng(0), dataclasses.replace(CONFIG, temperature=0.2)
    anchor, positive, negative = (unit_rows(rng, 9, 4) for _ in range(3))
    valid = np.arange(9) % 4 > 0
    loss, info = ppo_ad.contrast(*map(jnp.array, (anchor, positive, negative, valid)), config)
    rows = [x[valid].astype(float) for x in (anchor, positive, negative)]
    np.testing.assert_allclose(loss, np.mean([contrast(*row, temperature=0.2) for row in zip(*rows)]), rtol=1e-5)
    np.testing.assert_allclose(info["accuracy"], np.mean([a @ p > a @ n for a, p, n in zip(*rows)]), rtol=1e-6)
    assert info["loss"] == loss and info["steps"] == 1
    loss, info = ppo_ad.contrast(*map(jnp.array, (anchor, positive, negative, np.zeros(9, bool))), config)
    assert loss == info["accuracy"] == info["steps"] == 0


def test_contrast_of_equal_inner_products_is_log_two():
    """Known answer 7; and far from it nothing overflows."""
    rng, all_valid = np.random.default_rng(0), jnp.ones(5, bool)
    cold = dataclasses.replace(CONFIG, temperature=1e-3)
    anchor, positive = jnp.array(unit_rows(rng, 5, 4)), jnp.array(unit_rows(rng, 5, 4))
    mirrored = 2 * jnp.sum(anchor * positive, axis=1, keepdims=True) * anchor - positive
    np.testing.assert_allclose(ppo_ad.contrast(anchor, positive, mirrored, all_valid, CONFIG)[0], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(ppo_ad.contrast(anchor, -anchor, anchor, all_valid, cold)[0], 2000, rtol=1e-4)
    np.testing.assert_allclose(ppo_ad.contrast(anchor, anchor, -anchor, all_valid, cold)[0], 0, atol=1e-6)


def slow_prediction_loss(agent, rows, positive, negative, anchor, config):
    rows, count = exact(rows), len(positive)
    psi = lambda i: predict(agent, encode(agent, rows.observation[i]), int(rows.action[i]), rows.memory[i])
    margins = [(psi(p), psi(n)) for p, n in zip(positive, negative)]
    loss = sum(contrast(a, *m, temperature=config.temperature) for a, m in zip(anchor, margins)) / count
    accuracy = np.mean([a @ p > a @ n for a, (p, n) in zip(anchor, margins)])
    divergence, error, normaliser = slow_regularisers(agent, NORMALISER, rows, [*positive, *negative], config)
    return loss + divergence + error, {"loss": loss, "accuracy": accuracy}, normaliser


def change(agent, observation, before, after):
    """nu: the direction in which an achievement changed the latent state; 0 where it changed nothing."""
    latent = lambda t: encode(agent, observation[t])
    return unit((0 if after is None else latent(after)) - latent(before))


def test_prediction_loss_and_its_gradient_equal_numpy(agent, other):
    """Ten steps of a window, of which a minibatch names seven, one of them never as positive or negative; three pairs
    of which the second repeats a step of the first, the third is followed by no achievement; and padding."""
    config, window = dataclasses.replace(CONFIG, temperature=0.4), make_steps(other, 10)
    rows = np.array([1, 2, 3, 5, 6, 7, 9, 0])
    pairs = [(1, 7), (7, 9), (3, 5)]
    achievements = [(1, 2), (5, 6), (9, None)]
    at = lambda step: list(rows).index(step)
    index = [[at(p) for p, _ in pairs], [at(n) for _, n in pairs]]
    index += [[at(b) for b, _ in achievements], [at(b if a is None else a) for b, a in achievements]]
    padded = lambda x, value=0: jnp.pad(jnp.array(x), [(0, 0)] * (np.ndim(x) - 1) + [(0, 5)], constant_values=value)
    batch = ppo_ad.Prediction(
        rows=jnp.array(rows),
        weight=jnp.array([sum(pair.count(row) for pair in pairs) for row in rows[:7]] + [0]),
        index=padded(index),
        follows=padded([True, True, False], True),
        valid=padded([True] * 3, False),
    )

    @jit
    @partial(jax.jacrev, has_aux=True)
    def fast(agent):
        total, (normaliser, info) = ppo_ad.prediction_loss(agent, NORMALISER, window, batch, config)
        return (total, info["loss"]), (total, normaliser, info)

    (gradient, bare), (total, normaliser, info) = fast(agent)
    slow, observation = exact(agent), np.asarray(window.observation, float)
    anchor = [change(slow, observation, *pair) for pair in achievements]
    kept = *zip(*pairs), anchor
    expected, parts, slow_normaliser = slow_prediction_loss(slow, window, *kept, config)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(info["loss"], parts["loss"], rtol=1e-3)
    np.testing.assert_allclose(info["accuracy"], parts["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    along = lambda agent: slow_prediction_loss(agent, window, *kept, config)[0]  # anchors are constants
    check_gradient(along, slow, gradient, ("encoder", "policy", "value", "film", "predictor"))
    sizes = {name: float(optax.global_norm(getattr(bare, name))) for name in vars(bare)}
    assert sizes["policy"] == sizes["value"] == 0 < min(sizes[x] for x in ("encoder", "film", "predictor")), sizes


def slow_matching_loss(agent, window, own, triples, steps, config):
    """Of (achievement, positive, negative), the last two given as vectors."""
    observation, total, accuracy = exact(window).observation, 0, 0
    for u, p, n in triples:
        nu = change(agent, observation, *own[u])
        total += contrast(nu, p, n, temperature=config.temperature) / len(triples)
        accuracy += (nu @ p > nu @ n) / len(triples)
    divergence, error, normaliser = slow_regularisers(agent, NORMALISER, window, steps, config)
    return total + divergence + error, {"loss": total, "accuracy": accuracy}, normaliser


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_matching_loss_and_its_gradient_equal_numpy(agent, other, variant):
    """Three achievements of an episode against four, two and no achievements of others: POT says which match."""
    rng, config = np.random.default_rng(0), dataclasses.replace(CONFIG, temperature=0.4, variant=variant)
    window, most = make_steps(other, 30), 4
    own, theirs = [(0, 1), (2, 3), (5, 6)], [[(10, 11), (12, 13), (14, 15), (20, 21)], [(16, 17), (18, 19)], []]
    drawn = rng.integers(0, 8, (3, most))
    noise = rng.random((3, most, most)).astype(np.float32)

    fill = lambda pairs, blank: np.array(list(pairs) + [(blank, blank)] * (most - len(pairs))).T
    rows, index = np.unique(np.concatenate([fill(own, 0), drawn]), return_inverse=True)
    their_rows, their_index = np.unique(np.stack([fill(pairs, 10) for pairs in theirs], axis=1), return_inverse=True)
    counts = [3, 4, 2, 0]
    arrays = rows, their_rows, index[:2], their_index, counts, index[2:], noise
    batch = ppo_ad.Matching(*map(jnp.array, arrays))

    slow, observation = exact(agent), np.asarray(window.observation, float)
    vectors = lambda pairs: np.array([change(slow, observation, *pair) for pair in pairs])
    triples, steps, unmatched = [], [], 0
    for j, pairs in enumerate(theirs[:2]):
        matched = pot(1 - vectors(own) @ vectors(pairs).T, 1000) > 0.5
        for u, v in np.argwhere(matched):
            free = [k for k in range(len(pairs)) if variant == "code" or not matched[:, k].any()]
            unmatched += not free
            if free:
                negative = max(free, key=lambda k, j=j, u=u: noise[j, u, k])
                triples.append((u, vectors(pairs)[v], vectors(pairs)[negative]))
                steps.append(drawn[j, u])
    assert len(triples) >= 1 and (variant == "code" or unmatched), "another seed for the weights"

    fast = jit(
        jax.value_and_grad(lambda agent: ppo_ad.matching_loss(agent, NORMALISER, window, batch, config), has_aux=True)
    )
    (total, (normaliser, info)), gradient = fast(agent)
    kept = window, own, triples, steps, config
    expected, parts, slow_normaliser = slow_matching_loss(slow, *kept)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(info["loss"], parts["loss"], rtol=1e-3)
    np.testing.assert_allclose(info["accuracy"], parts["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(normaliser, slow_normaliser.values(), rtol=1e-5)
    for network in (gradient.film, gradient.predictor):
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(network))
    along = lambda agent: slow_matching_loss(agent, *kept)[0]  # positives and negatives are constants
    check_gradient(along, slow, gradient, ("encoder", "policy", "value"))


# ---- scores --------------------------------------------------------------------------------------------------------


def test_score_is_the_geometric_mean_of_percentages():
    rates = np.random.default_rng(0).random(22)
    rates[3] = 0
    expected = math.prod(1 + 100 * r for r in rates) ** (1 / 22) - 1
    np.testing.assert_allclose(AchievementEnv.score(jnp.array(rates, jnp.float32)), expected, rtol=1e-4)
    assert AchievementEnv.score(jnp.zeros(22)) == 0
    np.testing.assert_allclose(AchievementEnv.score(jnp.ones(22)), 100, rtol=1e-4)
