"""A PPO gradient step of ppo_ad.py on images, against the same network, loss and optimiser in torch; about 2 minutes.

    pip install torch
    python experiments/bench_images.py

Writes results/bench_images_cpu.csv: seconds of a gradient step on 64 images of 63 x 63 pixels with the paper's network.
Both run in this process, in turns; each row is a median. Torch gets as many threads as the machine has cores.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import measure
from algorithms import ppo_ad
from envs import AchievementEnv
from shared import run

BATCH, ROUNDS, ACTIONS = 64, 7, 17


class Images(AchievementEnv):
    """Craftax-Classic's sizes; a gradient step asks for nothing else."""

    observation_shape, num_actions, achievement_names = (63, 63, 3), ACTIONS, tuple("abc")
    reset = step = render = None


def minibatch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    log_probs = rng.normal(size=(BATCH, ACTIONS)) - 3
    return {
        "observation": rng.random((BATCH, 63, 63, 3), np.float32),
        "action": rng.integers(0, ACTIONS, BATCH),
        "log_probs": log_probs.astype(np.float32),
        "advantage": rng.normal(size=BATCH).astype(np.float32),
        "returns": rng.normal(size=BATCH).astype(np.float32),
    }


def ours(config: ppo_ad.Config, data: dict):
    """A function that takes a gradient step."""
    agent = ppo_ad.make_agent(config, Images(), jax.random.key(0))
    steps = ppo_ad.no_steps(config, Images(), BATCH)._replace(**{name: jnp.array(x) for name, x in data.items()})
    carry = agent, ppo_ad.Normaliser(*jnp.zeros(3)), ppo_ad.make_optimizer(config).init(agent)
    step = jax.jit(partial(ppo_ad.update, config, ppo_ad.ppo_loss)).lower(carry, steps).compile()
    return lambda: step(carry, steps)


def torch_step(config: ppo_ad.Config, data: dict):
    """The same in torch."""
    try:
        import torch
    except ImportError:
        raise run.UserError("this benchmark compares with torch, which is missing: pip install torch") from None
    from torch import nn

    torch.set_num_threads(os.cpu_count())

    class Residual(nn.Module):
        def __init__(self, size):
            super().__init__()
            layers = [[nn.GroupNorm(1, size), nn.Conv2d(size, size, 3, padding=1, bias=False), nn.ReLU()] for _ in "12"]
            self.branch = nn.Sequential(*layers[0], *layers[1])

        def forward(self, x):
            return x + self.branch(x)

    layers, size = [], 3
    for i, channels in enumerate((config.channels, 2 * config.channels, 2 * config.channels)):
        layers += [nn.GroupNorm(1, size)] if i else []
        layers += [nn.Conv2d(size, channels, 3, padding=1, bias=not i), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        layers += [nn.GroupNorm(1, channels), Residual(channels), Residual(channels)]
        size = channels
    layers += [nn.Flatten()]
    for in_size, out_size in ((64 * size, config.dense_size), (config.dense_size, config.latent_size)):
        layers += [nn.LayerNorm(in_size), nn.Linear(in_size, out_size, bias=False), nn.ReLU()]
    encoder = nn.Sequential(*layers)
    policy, value = nn.Linear(config.latent_size, ACTIONS), nn.Linear(config.latent_size, 1)
    parameters = [*encoder.parameters(), *policy.parameters(), *value.parameters()]
    assert sum(p.numel() for p in parameters) == 3_948_306, "another network than ours"
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    images = torch.tensor(data["observation"].transpose(0, 3, 1, 2).copy())
    action, old, advantage, returns = (torch.tensor(data[x]) for x in ("action", "log_probs", "advantage", "returns"))

    def step():
        latent = encoder(images)
        log_probs, values = torch.log_softmax(policy(latent), 1), value(latent)[:, 0]
        ratio = torch.exp((log_probs - old).gather(1, action[:, None])[:, 0])
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        loss = loss + config.value_weight * ((values - returns) ** 2).mean() - config.entropy_weight * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
        optimizer.step()

    return step


@run.command
def main(argv: list[str] | None = None) -> None:
    config, data = ppo_ad.Config(distill=False), minibatch()
    steps = {"torch": torch_step(config, data), "ours": ours(config, data)}
    seconds = {name: float(np.median(x)) for name, x in measure.interleaved(steps, ROUNDS).items()}
    rows = [
        {"what": name, "seconds": f"{x:.3f}", "ratio": f"{x / seconds['torch']:.2f}"} for name, x in seconds.items()
    ]
    how = f"python experiments/bench_images.py; {measure.facts()}; {BATCH} images, medians of {ROUNDS} rounds in turns"
    measure.write("bench_images_cpu", how, rows)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
