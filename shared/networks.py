"""Networks of the three algorithms. Each takes one example; batch it with `jax.vmap` at the call."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "none": jax.checkpoint_policies.everything_saveable,
}
"""What the backward pass keeps of a block: its matrix products only, nothing, or everything."""


class NetworkOptions(NamedTuple):
    """How a network is computed; none of these changes what it computes, beyond rounding."""

    remat: str = "dots"
    """A key of `REMAT_POLICIES`."""
    unroll: int = 1
    """Blocks per iteration of the scan over depth."""
    dtype: str = "float32"
    """Operands of the matrix products in the blocks; their sums, LayerNorm and the residual stream are float32."""


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
    """Dense, LayerNorm (epsilon 1e-6, as in Flax), swish."""

    dense: Dense
    norm: eqx.nn.LayerNorm

    def __init__(self, in_size: int, width: int, key: Key[Array, ""], dtype: str = "float32"):
        self.dense = Dense(in_size, width, key, dtype)
        self.norm = eqx.nn.LayerNorm(width, eps=1e-6)

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " width"]:
        return jax.nn.swish(self.norm(self.dense(x)))


class Block(eqx.Module):
    """Four layers, and the block's input added after the fourth."""

    layers: tuple[Layer, Layer, Layer, Layer]

    def __init__(self, width: int, key: Key[Array, ""], dtype: str = "float32"):
        self.layers = tuple(Layer(width, width, k, dtype) for k in jax.random.split(key, 4))

    def __call__(self, x: Float[Array, " width"]) -> Float[Array, " width"]:
        y = x
        for layer in self.layers:
            y = layer(y)
        return x + y


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
        self.stem = Layer(in_size, width, stem_key)
        self.blocks = eqx.filter_vmap(lambda k: Block(width, k, options.dtype))(jax.random.split(block_key, depth // 4))
        self.head = Dense(width, out_size, head_key)
        self.options = options

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        def apply(x, block):
            return block(x), None

        apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.options.remat], prevent_cse=False)
        x, _ = jax.lax.scan(apply, self.stem(x), self.blocks, unroll=self.options.unroll)
        return self.head(x)


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

    def sample_and_log_prob(self, key: Key[Array, ""]) -> tuple[Float[Array, "*batch action"], Float[Array, "*batch"]]:
        """A reparameterised sample and its log density.

        log |d tanh/dx| = log(1 - tanh(x)^2) is written as 2 (log 2 - x - softplus(-2x)), which stays finite and exact
        where tanh(x) rounds to 1.
        """
        noise = jax.random.normal(key, self.mean.shape)
        x = self.mean + jnp.exp(self.log_std) * noise
        log_normal = -0.5 * noise**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - x - jax.nn.softplus(-2 * x))
        return jnp.tanh(x), (log_normal - log_slope).sum(-1)


def count_parameters(tree) -> int:
    """Number of scalars in a PyTree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
