"""Networks against NumPy, SciPy and an unrolled loop; the compile time that makes depth 1024 usable."""

import functools
import time
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from stubs import Sizes

import envs
from algorithms import crl
from shared import run
from shared.networks import (
    AtariTorso,
    ImpalaCNN,
    Layer,
    NetworkOptions,
    NormedDense,
    ResidualMLP,
    SquashedGaussian,
    count_parameters,
    over_batch,
    project,
    unit_weights,
)


def unrolled(network, x):
    """The same network with a Python loop over its blocks."""
    x = network.stem(x)
    for i in range(len(network.blocks.layers.dense.bias)):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], network.blocks)(x)
    return network.head(x)


def numpy_forward(network, x, norm="layer", activation="swish", residual=True):
    """The network as the paper describes it, in float64 and without any of its code."""

    def array(leaf):
        return np.asarray(leaf, np.float64)

    def layer(p, x, i=()):
        y = array(p.dense.weight)[i] @ x + array(p.dense.bias)[i]
        if norm == "layer":
            y = (y - y.mean()) / np.sqrt(y.var() + 1e-6) * array(p.norm.weight)[i] + array(p.norm.bias)[i]
        return y / (1 + np.exp(-y)) if activation == "swish" else np.maximum(y, 0)

    x = layer(network.stem, np.asarray(x, np.float64))
    for i in range(len(network.blocks.layers.dense.bias)):
        y = x
        for j in range(4):
            y = layer(network.blocks.layers, y, (i, j))
        x = x + y if residual else y
    return array(network.head.weight) @ x + array(network.head.bias)


def make(depth, width=16, **options):
    """A network whose parameters are all random, so that none is silently unused; drawn by NumPy, which compiles
    nothing."""
    shapes = jax.eval_shape(lambda: ResidualMLP(5, width, depth, 3, jax.random.key(0), NetworkOptions(**options)))
    rng = np.random.default_rng(0)

    def draw(path, x):
        centre = 1.0 if "norm.weight" in jax.tree_util.keystr(path) else 0.0
        return jnp.array(rng.normal(centre, 0.2, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("depth", [4, 8, 32])
def test_forward_equals_numpy(depth):
    network, x = make(depth), jnp.array([0.5, -1.2, 0.1, 2.0, -0.4])
    np.testing.assert_allclose(jax.jit(lambda x: network(x))(x), numpy_forward(network, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", ["--norm=none", "--activation=relu", "--residual=false"])
def test_the_ablations_of_the_paper_are_flags_of_the_block(flag):
    def build(*flags):
        config = run.configure(crl.Config, crl.RECIPES, None, ["crl.py", "--depth=8", "--width=16", *flags])
        return config, crl.make_agent(config, Sizes(3, 1, 2), jax.random.key(0)).actor

    config, network = build(flag)
    x = jnp.array(np.random.default_rng(0).normal(size=5), jnp.float32)
    ablated = {name: getattr(config, name) for name in ("norm", "activation", "residual")}
    np.testing.assert_allclose(network(x), numpy_forward(network, x, **ablated), rtol=1e-4, atol=1e-5)
    assert np.abs(network(x) - build()[1](x)).max() > 1e-2


def test_hyperspherical_layers_are_those_of_the_sheet():
    """Golden numbers of baselines_gcrl, 9.6: the minimal form, two layers and a skip."""

    def kernel(k):  # (in, out)
        a, b = np.indices((4, 4))
        return ((7 * a + 3 * b + k) % 11 - 5) / 5

    def layer(k):
        made = Layer(4, 4, jax.random.key(0), NetworkOptions(norm="hyperspherical"))
        dense = eqx.tree_at(lambda dense: dense.weight, made.dense, jnp.array(kernel(k).T, jnp.float32))
        return project(eqx.tree_at(lambda layer: layer.dense, made, dense))

    np.testing.assert_allclose(layer(0).dense.weight[:, 0], [-0.656532, -0.320256, 0.196116, 0.624695], atol=1e-6)
    h = jnp.array([0.265067, -0.646498, 0.700434, 0.145507])
    golden = [-0.013198, -0.798577, 0.967037, 1.333652]
    np.testing.assert_allclose(h + layer(5)(layer(3)(h)), golden, atol=2e-6)


@pytest.mark.parametrize("norm", ["layer", "hyperspherical", "none"])
def test_an_input_is_told_from_twice_that_input(norm):
    """As soon as those biases are learned that can be."""
    network = project(make(8, norm=norm))
    x = jnp.array([0.3, -0.2, 0.1, 0.4, -0.5])
    assert np.abs(network(x) - network(2 * x)).max() > 1e-3


def test_hyperspherical_weights_stay_on_the_sphere_through_updates():
    config = crl.Config(
        num_envs=4, episode_length=9, unroll_length=40, min_replay_size=40, max_replay_size=40, batch_size=16, width=8,
        updates_per_chunk=3, total_env_steps=1000, norm="hyperspherical",
    )  # fmt: skip
    env = envs.make("point_u_maze")
    state = crl.init(config, env, jax.random.key(0))
    for agent in (state.agent, jax.jit(lambda s: crl.learn(config, env, crl.collect(config, env, s))[0])(state).agent):
        for network in (agent.actor, agent.critic.phi, agent.critic.psi):
            dense = network.blocks.layers.dense
            np.testing.assert_allclose(np.linalg.norm(dense.weight, axis=-1), 1, atol=1e-6)
            assert not np.any(dense.bias)
            for other in (network.stem.dense, network.head):
                assert np.abs(np.linalg.norm(other.weight, axis=-1) - 1).min() > 1e-3
    plain = crl.make_agent(crl.Config(width=8), env, jax.random.key(0))
    for ours, same in zip(jax.tree.leaves(project(plain)), jax.tree.leaves(plain)):
        assert ours is same


def squares(forward, network, x):
    return jnp.sum(jax.vmap(lambda x: forward(network, x))(x) ** 2)


BATCH = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)


@functools.cache
def unrolled_gradient(depth):
    return jax.value_and_grad(partial(squares, unrolled), (0, 1))(make(depth), jnp.array(BATCH))


@pytest.mark.parametrize("depth", [4, 12, 40])
@pytest.mark.parametrize("options", [{}, {"remat": "full", "scan_unroll": 3}, {"remat": "none", "scan_unroll": 2}])
def test_scan_equals_unrolled_loop(depth, options):
    scanned = jax.jit(jax.value_and_grad(partial(squares, lambda network, x: network(x)), (0, 1)))
    value, gradient = scanned(make(depth, **options), jnp.array(BATCH))
    value2, gradient2 = unrolled_gradient(depth)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient2))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient2)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("depth", "expected"), [(4, (344_098, 355_392, 283_200)), (64, (4_322_338, 4_333_632, 4_261_440))]
)
def test_parameter_counts_are_the_papers(depth, expected):
    """Humanoid: 268 state entries, 17 actions, 3 goal entries (fact sheet 1.1)."""
    config = crl.Config(depth=depth)
    actor, critic, _ = jax.eval_shape(lambda: crl.make_agent(config, Sizes(268, 17, 3), jax.random.key(0)))
    assert (count_parameters(actor), count_parameters(critic.phi), count_parameters(critic.psi)) == expected


def test_initial_weights_are_uniform_within_one_over_root_fan_in():
    network = ResidualMLP(100, 64, 8, 7, jax.random.key(0))
    for dense, fan_in in ((network.stem.dense, 100), (network.blocks.layers.dense, 64), (network.head, 64)):
        weight = np.asarray(dense.weight).ravel() * np.sqrt(fan_in)
        assert stats.kstest(weight, stats.uniform(-1, 2).cdf).pvalue > 1e-3
        assert not np.asarray(dense.bias).any()
    layers = np.asarray(network.blocks.layers.dense.weight).reshape(8, -1)
    assert len(np.unique(layers, axis=0)) == 8, "layers share their initial weights"


def test_bfloat16_touches_only_the_matrix_products():
    x = jnp.array([0.5, -1.2, 0.1, 2.0, -0.4])
    exact, rounded = make(8)(x), make(8, dtype="bfloat16")(x)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.1


@pytest.mark.parametrize("depth", [0, 2, 3, 6, -4])
def test_depth_is_a_positive_multiple_of_four(depth):
    with pytest.raises(ValueError, match="positive multiple of 4"):
        ResidualMLP(2, 8, depth, 2, jax.random.key(0))


@pytest.mark.parametrize("mean", [0.0, -0.7, 3.0])
@pytest.mark.parametrize("log_std", [-5.0, -1.5, 2.0])
def test_log_prob_equals_scipy(mean, log_std):
    """The density of tanh(x) is the normal one divided by the slope 1 - tanh(x)^2, here in float64."""
    distribution = SquashedGaussian(jnp.full((1000, 2), mean), jnp.full((1000, 2), log_std))
    action, log_prob = distribution.sample_and_log_prob(jax.random.key(0))
    x = np.asarray(mean + np.exp(log_std) * jax.random.normal(jax.random.key(0), (1000, 2)), np.float64)
    np.testing.assert_allclose(action, np.tanh(x), atol=1e-6)
    expected = stats.norm.logpdf(x, mean, np.exp(log_std)) + 2 * np.log(np.cosh(x))
    np.testing.assert_allclose(log_prob, expected.sum(-1), rtol=1e-4, atol=1e-3)


def test_log_prob_of_a_given_action():
    """Golden number of the fact sheet (baselines_gcrl, 9.7), and the density of the distribution's own samples."""
    given = SquashedGaussian(jnp.array([0.2, -0.5]), jnp.array([-1, 0.3]))
    np.testing.assert_allclose(given.log_prob(jnp.array([0.6, -0.9])), -0.188718, atol=1e-5)
    np.testing.assert_allclose(jnp.mean((given.mode() - jnp.array([0.6, -0.9])) ** 2), 0.176924, atol=1e-6)
    action, log_prob = SquashedGaussian(jnp.zeros((500, 2)), jnp.full((500, 2), -0.5)).sample_and_log_prob(
        jax.random.key(0)
    )
    assert np.abs(action).max() < 1 - 1e-4
    again = SquashedGaussian(jnp.zeros((500, 2)), jnp.full((500, 2), -0.5)).log_prob(action)
    np.testing.assert_allclose(again, log_prob, atol=2e-3)
    gradient = jax.grad(lambda mean: SquashedGaussian(mean, jnp.zeros(1)).log_prob(jnp.ones(1)))(jnp.zeros(1))
    np.testing.assert_allclose(gradient, np.arctanh(1 - 1e-6), rtol=1e-2)


def test_the_published_epsilon_is_inside_the_logarithm():
    distribution = SquashedGaussian(jnp.array([4.0, 0.5]), jnp.array([-1.0, 0.3]))
    _, exact = distribution.sample_and_log_prob(jax.random.key(0))
    _, published = distribution.sample_and_log_prob(jax.random.key(0), 1e-6)
    x = np.asarray(distribution.mean + jnp.exp(distribution.log_std) * jax.random.normal(jax.random.key(0), (2,)))
    slope = 1 - np.tanh(x.astype(float)) ** 2
    np.testing.assert_allclose(exact - published, np.sum(np.log(slope + 1e-6) - np.log(slope)), atol=1e-3)


def test_log_prob_and_its_gradient_stay_finite_far_out():
    def log_prob(mean):
        return SquashedGaussian(mean, jnp.full(2, 2.0)).sample_and_log_prob(jax.random.key(0))[1]

    value, gradient = jax.value_and_grad(log_prob)(jnp.array([500.0, -500.0]))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_raw_output_becomes_mean_and_bounded_log_std():
    distribution = SquashedGaussian.from_output(jnp.array([0.3, -9.0, 0.0, -100.0]))
    np.testing.assert_allclose(distribution.mode(), np.tanh([0.3, -9.0]), rtol=1e-6)
    np.testing.assert_allclose(distribution.log_std, [-1.5, -5.0])


def test_compile_time_does_not_grow_with_depth():
    """Issue: a gradient step at depth 1024 compiles within 30 s, and within 3 times the time of depth 16."""

    def seconds(depth):
        config = crl.Config(depth=depth, batch_size=256)

        def gradients(agent, batch, key):
            critic_gradient, (psi, _) = jax.grad(crl.critic_loss, has_aux=True)(agent.critic, batch, config)
            return critic_gradient, jax.grad(crl.actor_loss, has_aux=True)(agent.actor, agent, psi, batch, key, config)

        agent = jax.eval_shape(lambda: crl.make_agent(config, Sizes(29, 8, 2), jax.random.key(0)))
        batch = crl.Batch(*(jax.ShapeDtypeStruct((256, n), jnp.float32) for n in (29, 8, 2)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        start = time.perf_counter()
        jax.jit(gradients).lower(agent, batch, key).compile()
        return time.perf_counter() - start

    seconds(4)  # warms up tracing
    shallow, deep = seconds(16), seconds(1024)
    assert deep < 30
    assert deep < 3 * shallow


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_a_network_of_one_example_takes_a_batch_of_any_shape(shape):
    network = make(4)
    x = jax.random.normal(jax.random.key(2), shape)
    y = over_batch(network, x)
    chex.assert_shape(y, (*shape[:-1], 3))
    for index in np.ndindex(shape[:-1]):
        np.testing.assert_allclose(y[index], network(x[index]), rtol=1e-4, atol=1e-6)


def test_count_parameters_counts_scalars():
    assert count_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(4)]}) == 10


def test_networks_hold_arrays_only():
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(make(4)))


def numpy_norm(norm, x):
    """Over all entries, scaled and shifted along the last axis."""
    weight, bias = (np.asarray(p, np.float64) for p in (norm.weight, norm.bias))
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def numpy_conv(layer, x):
    x = x if layer.image_norm is None else numpy_norm(layer.image_norm, x)
    patches = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((1, 1), (1, 1), (0, 0))), (3, 3), axis=(0, 1))
    y = np.einsum("hwcij,ijco->hwo", patches, np.asarray(layer.weight, np.float64))
    return np.maximum(y if layer.bias is None else y + np.asarray(layer.bias, np.float64), 0)


def numpy_encoder(encoder, image):
    """The encoder as the paper's appendix describes it, in float64 and without any of its code."""
    x = np.asarray(image, np.float64)
    for i, stack in enumerate(encoder.stacks):
        assert (stack.first.image_norm is None) == (i == 0) and (stack.first.bias is None) == (i > 0)
        x = np.pad(numpy_conv(stack.first, x), ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))[::2, ::2].max((3, 4))
        x = numpy_norm(stack.image_norm, x)
        for first, second in stack.blocks:
            assert first.bias is None and second.bias is None
            x = x + numpy_conv(second, numpy_conv(first, x))
    x = x.ravel()
    for layer in (encoder.dense, encoder.latent):
        x = np.maximum(np.asarray(layer.weight, np.float64) @ numpy_norm(layer.layer_norm, x), 0)
    return x


def random_encoder(shape, dtype="float32"):
    """A small encoder with other weights than at first, biases and norms included."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: ImpalaCNN(shape, (2, 3, 4), 16, 20, jax.random.key(0), dtype))
    spread = {1: 0.3, 2: 0.2, 4: 0.25}  # norms and biases, dense layers, convolutions
    draw = lambda x: jnp.array(rng.normal(x.ndim == 1, spread[x.ndim], x.shape), jnp.float32)
    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(("shape", "backend"), [((8, 12, 3), "cpu"), ((7, 10, 3), "cpu"), ((13, 9, 1), "gpu")])
def test_encoder_equals_numpy(shape, backend, monkeypatch):
    """Even and odd sizes; with the convolutions as they are on a CPU, and as they are elsewhere."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    image = np.random.default_rng(2).random((3, *shape)).astype(np.float32)
    encoder = random_encoder(shape)
    output = jax.jit(jax.vmap(encoder))(jnp.array(image))
    expected = np.array([numpy_encoder(encoder, x) for x in image])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
    assert (expected > 0).any(0).sum() > 2 and (expected >= 0).all()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_torso_equals_numpy(backend, monkeypatch):
    """On two images whose channels are stacked: bytes in, and convolutions with strides 4, 2, 1 as loops."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: AtariTorso((16, 24, 3), 2, 4, jax.random.key(0)))
    torso = jax.tree.map(lambda x: jnp.array(rng.normal(0, 0.2, x.shape), jnp.float32), shapes)
    images = rng.integers(0, 256, (2, 16, 24, 3), np.uint8)
    x = np.concatenate(images, axis=-1) / 255
    for weight, bias, stride in zip(torso.weights, torso.biases, (4, 2, 1)):
        size = len(weight)
        out = np.zeros((x.shape[0] // stride, x.shape[1] // stride, len(bias)))
        before = (size - stride) // 2  # zeros around the image, as much on both sides as can be
        padded = np.pad(x, ((before, size), (before, size), (0, 0)))
        for i, j in np.ndindex(*out.shape[:2]):
            patch = padded[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = np.einsum("ijc,ijco->o", patch, np.asarray(weight, np.float64)) + bias
        x = np.maximum(out, 0)
    assert torso.size == x.size == 2 * 3 * 8 and (x > 0).sum() > 10
    np.testing.assert_allclose(jax.jit(lambda x: torso(x))(jnp.array(images.ravel())), x.ravel(), rtol=1e-4, atol=1e-5)


def test_encoder_in_bfloat16_rounds_the_products_only():
    image = jnp.array(np.random.default_rng(2).random((8, 8, 3)), jnp.float32)
    encoder = random_encoder((8, 8, 3), "bfloat16")
    exact, rounded = numpy_encoder(encoder, image), jax.jit(lambda image: encoder(image))(image)
    assert rounded.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in jax.tree.leaves(encoder))
    assert 1e-5 < np.abs(rounded - exact).max() < 0.1


def test_unit_weights_are_uniform_draws_of_given_norm():
    weight = np.asarray(unit_weights(jax.random.key(0), (40, 16, 3, 3), 0.7), float)
    np.testing.assert_allclose(np.linalg.norm(weight.reshape(40, -1), axis=1), 0.7, rtol=1e-5)
    spread = 0.7 / np.sqrt(16 * 9 / 3)  # of uniform draws, before they are scaled, the root mean square is 1 / sqrt(3)
    assert stats.kstest(weight.ravel(), stats.uniform(-spread, 2 * spread).cdf).pvalue > 1e-3
    layer = NormedDense(5, 3, 1.4, jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(layer.weight, axis=1), 1.4, rtol=1e-5)
