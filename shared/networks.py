"""Networks of the algorithms. Each takes one example; batch it with `jax.vmap` at the call."""

import math
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from annotated_types import Ge, MultipleOf
from jaxtyping import Array, Float, Key, Num, PyTree, UInt8

Depth = Annotated[int, Ge(4), MultipleOf(4)]
"""Layers inside the residual blocks, of four layers each."""
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}
"""What the backward pass keeps of a block: its matrix products only, nothing, or everything."""


class NetworkOptions(NamedTuple):
    """Of a residual network: what its layers are, and how it is computed. A script has flags of these names."""

    remat: str = "dots"
    """A key of `REMAT_POLICIES`."""
    scan_unroll: int = 1
    """Blocks per iteration of the scan over depth."""
    dtype: str = "float32"
    """Operands of the matrix products in the blocks; their sums, LayerNorm and the residual stream are float32."""
    norm: str = "layer"
    """What follows each Dense: 'layer' (LayerNorm, epsilon 1e-6, as in Flax), 'hyperspherical' (a root mean square of
    1, and weights that `project` keeps on the sphere) or 'none'."""
    activation: str = "swish"
    """A function of jax.nn, after the norm."""
    residual: bool = True
    """Whether the input of a block is added to its output."""

    @classmethod
    def of(cls, config) -> "NetworkOptions":
        """The options that a script's Config has."""
        return cls(*(getattr(config, name) for name in cls._fields))


DEFAULT_OPTIONS = NetworkOptions()


class Dense(eqx.Module):
    """y = W x + b with W uniform in +-1/sqrt(in_size) (variance 1/3 over fan-in) and b = 0."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]
    dtype: str = eqx.field(static=True)

    def __init__(self, in_size: int, out_size: int, key: Key[Array, ""], dtype: str = "float32"):
        limit = 1 / math.sqrt(in_size)
        self.weight = jax.random.uniform(key, (out_size, in_size), minval=-limit, maxval=limit)
        self.bias = jnp.zeros(out_size)
        self.dtype = dtype

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        weight, x = self.weight.astype(self.dtype), x.astype(self.dtype)
        return jnp.matmul(x, weight.T, preferred_element_type=jnp.float32) + self.bias


class Layer(eqx.Module):
    """Dense, norm, activation."""

    dense: Dense
    norm: eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.Identity
    activation: str = eqx.field(static=True)

    def __init__(self, in_size: int, width: int, key: Key[Array, ""], options: NetworkOptions):
        self.dense = Dense(in_size, width, key, options.dtype)
        self.activation = options.activation
        if options.norm == "hyperspherical":
            self.norm = eqx.nn.RMSNorm(width, eps=1e-12, use_bias=False)
            self.dense = on_sphere(self.dense)
        else:
            self.norm = eqx.nn.LayerNorm(width, eps=1e-6) if options.norm == "layer" else eqx.nn.Identity()

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " width"]:
        return getattr(jax.nn, self.activation)(self.norm(self.dense(x)))


def on_sphere(dense: Dense) -> Dense:
    """The layer whose units have weights of L2 norm 1 and no bias (Lee et al. 2025, SimbaV2)."""
    norm = jnp.linalg.norm(dense.weight, axis=-1, keepdims=True)
    return eqx.tree_at(lambda x: (x.weight, x.bias), dense, (dense.weight / norm, jnp.zeros_like(dense.bias)))


def project(networks: PyTree) -> PyTree:
    """Networks after an update: the weights of hyperspherical layers are back on the sphere, all others as they are."""

    def back(x):
        is_hyperspherical = isinstance(x, Layer) and isinstance(x.norm, eqx.nn.RMSNorm)
        return eqx.tree_at(lambda layer: layer.dense, x, on_sphere(x.dense)) if is_hyperspherical else x

    return jax.tree.map(back, networks, is_leaf=lambda x: isinstance(x, Layer))


class Block(eqx.Module):
    """Four layers, and the block's input added after the fourth."""

    layers: Layer  # every leaf has a leading axis of 4, so that a loop over blocks fetches 4 arrays and not 16
    residual: bool = eqx.field(static=True)

    def __init__(self, width: int, key: Key[Array, ""], options: NetworkOptions):
        self.layers = eqx.filter_vmap(lambda k: Layer(width, width, k, options))(jax.random.split(key, 4))
        self.residual = options.residual

    def __call__(self, x: Float[Array, " width"]) -> Float[Array, " width"]:
        y = x
        for i in range(4):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], self.layers)
            y = layer(y)
        return x + y if self.residual else y


class ResidualMLP(eqx.Module):
    """Stem, `depth // 4` residual blocks, linear head ('1000 Layer Networks', section 3 and appendix A).

    `depth` counts the Dense layers inside the blocks, as the paper does; stem and head come on top. The blocks are one
    stacked PyTree and the depth a `lax.scan` over it, so that tracing and compiling take as long for 4 layers as for
    1024.

    Raises:
      ValueError: if depth is not a positive multiple of 4.
    """

    stem: Layer
    blocks: Block  # every leaf has a leading axis of depth // 4
    head: Dense
    options: NetworkOptions = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        width: int,
        depth: int,
        out_size: int,
        key: Key[Array, ""],
        options: NetworkOptions = DEFAULT_OPTIONS,
    ):
        if depth < 4 or depth % 4:
            raise ValueError(f"depth is {depth}; it is a positive multiple of 4, because a block has four layers")
        stem_key, block_key, head_key = jax.random.split(key, 3)
        # on the sphere nothing would tell an input from twice that input
        norm = "layer" if options.norm == "hyperspherical" else options.norm
        self.stem = Layer(in_size, width, stem_key, options._replace(dtype="float32", norm=norm))
        self.blocks = eqx.filter_vmap(lambda k: Block(width, k, options))(jax.random.split(block_key, depth // 4))
        self.head = Dense(width, out_size, head_key)
        self.options = options

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        def run_block(x, block):
            return block(x), None

        run_block = jax.checkpoint(run_block, policy=REMAT_POLICIES[self.options.remat], prevent_cse=False)
        x, _ = jax.lax.scan(run_block, self.stem(x), self.blocks, unroll=self.options.scan_unroll)
        return self.head(x)


class MLP(eqx.Module):
    """Three hidden layers with ReLU, with rlkit's initial weights.

    Hidden weights are uniform in +-1/sqrt(width), width being the layer's own rather than its input's, and biases 0.1;
    the last layer's are all uniform in +-final.
    """

    layers: tuple[Dense, ...]

    def __init__(self, in_size: int, width: int, out_size: int, final: float, key: Key[Array, ""]):
        *keys, bias_key = jax.random.split(key, 5)
        sizes = [in_size, width, width, width, out_size]
        limits = [1 / math.sqrt(width)] * 3 + [final]
        biases = [jnp.full(width, 0.1)] * 3 + [jax.random.uniform(bias_key, (out_size,), minval=-final, maxval=final)]
        layers = []
        for i, (layer_key, limit, bias) in enumerate(zip(keys, limits, biases)):
            layer = Dense(sizes[i], sizes[i + 1], layer_key)
            weight = layer.weight * limit * math.sqrt(sizes[i])  # from +-1/sqrt(in_size)
            layers.append(eqx.tree_at(lambda x: (x.weight, x.bias), layer, (weight, bias)))
        self.layers = tuple(layers)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def over_batch(network, x: Num[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """A network of one example, on a batch of any shape."""
    for _ in x.shape[:-1]:
        network = jax.vmap(network)
    return network(x)


def unit_weights(key: Key[Array, ""], shape: tuple[int, ...], norm: float) -> Float[Array, "..."]:
    """Weights of random direction; those of each output unit (the first axis) have this L2 norm."""
    weight = jax.random.uniform(key, shape, minval=-1, maxval=1)
    return norm * weight / jnp.sqrt(jnp.sum(weight**2, axis=tuple(range(1, len(shape))), keepdims=True))


class NormedDense(eqx.Module):
    """LayerNorm of the input, a linear map without bias, ReLU; `norm` is the L2 norm of each unit's first weights."""

    layer_norm: eqx.nn.LayerNorm
    weight: Float[Array, "out in"]
    dtype: str = eqx.field(static=True)

    def __init__(self, in_size: int, out_size: int, norm: float, key: Key[Array, ""], dtype: str = "float32"):
        self.layer_norm = eqx.nn.LayerNorm(in_size, eps=1e-5)
        self.weight = unit_weights(key, (out_size, in_size), norm)
        self.dtype = dtype

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        x, weight = self.layer_norm(x).astype(self.dtype), self.weight.astype(self.dtype)
        return jax.nn.relu(jnp.matmul(x, weight.T, preferred_element_type=jnp.float32))


class NormedMLP(eqx.Module):
    """LayerNorm, linear, ReLU, linear, with the initial weights of Moon et al. 2023."""

    hidden: NormedDense
    out: Dense

    def __init__(self, in_size: int, hidden_size: int, out_size: int, key: Key[Array, ""]):
        hidden_key, out_key, weight_key = jax.random.split(key, 3)
        self.hidden = NormedDense(in_size, hidden_size, 1.4, hidden_key)
        out = Dense(hidden_size, out_size, out_key)
        self.out = eqx.tree_at(lambda layer: layer.weight, out, unit_weights(weight_key, out.weight.shape, 1.0))

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        return self.out(self.hidden(x))


class ImageNorm(eqx.Module):
    """GroupNorm with one group: mean and variance over the whole image, scale and shift for each channel."""

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]

    def __init__(self, channels: int):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)

    def __call__(self, x: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
        centred = x - x.mean()
        return centred * jax.lax.rsqrt(jnp.mean(centred**2) + 1e-5) * self.weight + self.bias


def convolve(
    x: Float[Array, "height width in"], weight: Float[Array, "size size in out"], stride: int = 1
) -> Float[Array, "rows columns out"]:
    """A convolution of an image padded with zeros, at every `stride`-th row and column.

    On a CPU it is one matrix product: inside a loop, XLA's own convolution there is 20 times slower than outside.
    """
    if jax.default_backend() != "cpu":
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x[None], weight, (stride, stride), "SAME", dimension_numbers=layout)[0]
    padding = jax.lax.padtype_to_pads(x.shape[:2], weight.shape[:2], (stride, stride), "SAME")
    x = jnp.pad(x, (*padding, (0, 0)))
    size = len(weight)
    rows, columns = (length - size + 1 for length in x.shape[:2])
    parts = [x[i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
    patches = jnp.concatenate(parts, axis=-1)
    return jnp.matmul(patches, weight.reshape(-1, weight.shape[-1]), preferred_element_type=jnp.float32)


def max_pool(x: Float[Array, "height width channels"]) -> Float[Array, "half_height half_width channels"]:
    """The largest of 3 x 3 pixels, at every other row and column."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3, 3, 1), (2, 2, 1), ((1, 1), (1, 1), (0, 0)))


class Conv(eqx.Module):
    """Norm of the input, 3 x 3 convolution, ReLU; a bias only if there is no norm. `norm`: of each filter, L2."""

    image_norm: ImageNorm | None
    weight: Float[Array, "3 3 in out"]
    bias: Float[Array, " out"] | None
    dtype: str = eqx.field(static=True)

    def __init__(self, in_size: int, out_size: int, norm: float, key: Key[Array, ""], dtype: str, normed: bool = True):
        self.image_norm = ImageNorm(in_size) if normed else None
        self.weight = jnp.moveaxis(unit_weights(key, (out_size, 3, 3, in_size), norm), 0, -1)
        self.bias = None if normed else jnp.zeros(out_size)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "height width in"]) -> Float[Array, "height width out"]:
        x = x if self.image_norm is None else self.image_norm(x)
        y = convolve(x.astype(self.dtype), self.weight.astype(self.dtype)).astype(jnp.float32)
        return jax.nn.relu(y if self.bias is None else y + self.bias)


class ConvStack(eqx.Module):
    """Convolution, max-pooling that halves height and width, norm, residual blocks of two convolutions."""

    first: Conv
    image_norm: ImageNorm
    blocks: list[tuple[Conv, Conv]]

    def __init__(
        self, in_size: int, size: int, blocks: int, norm: float, key: Key[Array, ""], dtype: str, normed: bool
    ):
        first_key, key = jax.random.split(key)
        self.first = Conv(in_size, size, 1.0, first_key, dtype, normed)
        self.image_norm = ImageNorm(size)
        keys = jax.random.split(key, (blocks, 2))
        self.blocks = [tuple(Conv(size, size, norm, k, dtype) for k in pair) for pair in keys]

    def __call__(self, x: Float[Array, "height width in"]) -> Float[Array, "half_height half_width size"]:
        x = self.image_norm(max_pool(self.first(x)))
        for first, second in self.blocks:
            x = x + second(first(x))
        return x


class ImpalaCNN(eqx.Module):
    """Residual convolutional encoder (Espeholt et al. 2018) with the norms and initial weights of Moon et al. 2023.

    Stacks of convolutions, then two dense layers. Every norm comes before its linear map. The output is non-negative.
    """

    stacks: list[ConvStack]
    dense: NormedDense
    latent: NormedDense

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: tuple[int, ...],
        dense_size: int,
        latent_size: int,
        key: Key[Array, ""],
        dtype: str = "float32",
        blocks: int = 2,
    ):
        height, width, in_size = shape
        dense_key, latent_key, *keys = jax.random.split(key, 2 + len(channels))
        norm = math.sqrt(1 / math.sqrt(len(channels)) / math.sqrt(blocks))
        self.stacks = []
        for i, (size, stack_key) in enumerate(zip(channels, keys)):
            self.stacks.append(ConvStack(in_size, size, blocks, norm, stack_key, dtype, normed=i > 0))
            in_size, height, width = size, (height + 1) // 2, (width + 1) // 2
        self.dense = NormedDense(in_size * height * width, dense_size, 1.4, dense_key, dtype)
        self.latent = NormedDense(dense_size, latent_size, 1.0, latent_key, dtype)

    def __call__(self, image: Float[Array, "height width channels"]) -> Float[Array, " latent"]:
        for stack in self.stacks:
            image = stack(image)
        return self.latent(self.dense(image.reshape(-1)))


class AtariTorso(eqx.Module):
    """Three convolutions with ReLU (Mnih et al. 2015) of an image, or of several whose channels are stacked.

    8 x 8 with stride 4, 4 x 4 with 2, 3 x 3, of `channels`, twice and twice as many features; 64 x 64 pixels leave
    8 x 8. Weights have variance 2 over fan-in.
    """

    weights: list[Float[Array, "size size in out"]]
    biases: list[Float[Array, " out"]]
    shape: tuple[int, int, int] = eqx.field(static=True)
    size: int = eqx.field(static=True)
    """Of the output."""

    def __init__(self, shape: tuple[int, int, int], images: int, channels: int, key: Key[Array, ""]):
        sizes = (8, 8, images * shape[2], channels), (4, 4, channels, 2 * channels), (3, 3, 2 * channels, 2 * channels)
        initial = jax.nn.initializers.he_normal(in_axis=(0, 1, 2))
        self.weights = [initial(k, size) for k, size in zip(jax.random.split(key, 3), sizes)]
        self.biases = [jnp.zeros(size[-1]) for size in sizes]
        self.shape = shape
        self.size = -(-shape[0] // 8) * -(-shape[1] // 8) * 2 * channels

    def __call__(self, images: UInt8[Array, " bytes"]) -> Float[Array, " features"]:
        height, width, _ = self.shape
        x = jnp.moveaxis(images.reshape(-1, *self.shape), 0, 2).reshape(height, width, -1) / 255.0
        for weight, bias, stride in zip(self.weights, self.biases, (4, 2, 1)):
            x = jax.nn.relu(convolve(x, weight, stride) + bias)
        return x.reshape(-1)


class OnImages(eqx.Module):
    """A network behind a torso."""

    torso: AtariTorso
    network: ResidualMLP

    def __call__(self, images: UInt8[Array, " bytes"]) -> Float[Array, " out"]:
        return self.network(self.torso(images))


class VectorEncoder(eqx.Module):
    """The encoder of observations that are not images: ImpalaCNN's dense layers on another one."""

    first: Dense
    dense: NormedDense
    latent: NormedDense

    def __init__(self, size: int, dense_size: int, latent_size: int, key: Key[Array, ""], dtype: str):
        keys = jax.random.split(key, 3)
        self.first = Dense(size, dense_size, keys[0], dtype)
        self.dense = NormedDense(dense_size, dense_size, 1.4, keys[1], dtype)
        self.latent = NormedDense(dense_size, latent_size, 1.0, keys[2], dtype)

    def __call__(self, x: Float[Array, " features"]) -> Float[Array, " latent"]:
        return self.latent(self.dense(jax.nn.relu(self.first(x))))


class SquashedGaussian(NamedTuple):
    """The distribution of tanh(x) with x ~ N(mean, exp(log_std)^2), independent in each dimension."""

    mean: Float[Array, "*batch action"]
    log_std: Float[Array, "*batch action"]

    @classmethod
    def from_output(cls, output: Float[Array, "*batch two_actions"], low: float = -5.0, high: float = 2.0):
        """Splits a network's output into the mean and a raw log-std, which tanh squashes into [low, high]."""
        mean, raw = jnp.split(output, 2, axis=-1)
        return cls(mean, low + 0.5 * (high - low) * (jnp.tanh(raw) + 1))

    def mode(self) -> Float[Array, "*batch action"]:
        """tanh(mean): the action of the deterministic policy."""
        return jnp.tanh(self.mean)

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*batch action"]:
        return self.sample_and_log_prob(key)[0]

    def log_prob(self, action: Float[Array, "*batch action"]) -> Float[Array, "*batch"]:
        """The log density of an action; where |action| is 1, that of 1 - 1e-6."""
        x = jnp.arctanh(jnp.clip(action, -1 + 1e-6, 1 - 1e-6))
        return self._log_density((x - self.mean) * jnp.exp(-self.log_std), x)

    def sample_and_log_prob(
        self, key: Key[Array, ""], epsilon: float = 0.0
    ) -> tuple[Float[Array, "*batch action"], Float[Array, "*batch"]]:
        """A reparameterised sample and its log density.

        log |d tanh/dx| = log(1 - tanh(x)^2) is written as 2 (log 2 - x - softplus(-2x)), which stays finite and exact
        where tanh(x) rounds to 1. Published codes have log(1 - tanh(x)^2 + `epsilon`) with 1e-6.
        """
        noise = jax.random.normal(key, self.mean.shape)
        x = self.mean + jnp.exp(self.log_std) * noise
        return jnp.tanh(x), self._log_density(noise, x, epsilon)

    def _log_density(self, noise, x, epsilon=0.0):
        log_normal = -0.5 * noise**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))
        if epsilon:
            log_slope = jnp.log(1 - jnp.tanh(x) ** 2 + epsilon)
        return (log_normal - log_slope).sum(-1)


def count_parameters(tree) -> int:
    """Number of scalars in a PyTree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
