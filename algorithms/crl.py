"""draft"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

import envs
from envs import VectorEnv
from shared import replay as buffer
from shared.networks import NetworkOptions, ResidualMLP, SquashedGaussian


@dataclasses.dataclass(frozen=True)
class Config:
    env: str = "point_u_maze"
    seed: int = 0
    num_seeds: int = 1
    total_env_steps: int = 100_000_000
    num_envs: int = 512
    episode_length: int = 1000
    goals: str = "resampled"
    goal_switch_probability: float = 0.0
    unroll_length: int = 62
    updates_per_chunk: int = 800
    min_replay_size: int = 1000
    max_replay_size: int = 10_000
    relabel: str = "episode"
    batch_size: int = 512
    discount: float = 0.99
    depth: int = 4
    actor_depth: int = 0
    critic_depth: int = 0
    width: int = 256
    representation_size: int = 64
    energy: str = "norm"
    loss: str = "fwd_infonce"
    logsumexp_penalty: float = 0.1
    random_goals: float = 0.0
    entropy_tuning: bool = True
    target_entropy_scale: float = 0.5
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha_lr: float = 3e-4
    final_lr_fraction: float = 1.0
    num_eval_envs: int = 128


class Critic(NamedTuple):
    phi: ResidualMLP
    psi: ResidualMLP

    def encode_state_action(self, observation, action):
        return jax.vmap(self.phi)(jnp.concatenate([observation, action], axis=-1))

    def encode_goal(self, goal):
        return jax.vmap(self.psi)(goal)


def policy(actor, observation, goal):
    return SquashedGaussian.from_output(jax.vmap(actor)(jnp.concatenate([observation, goal], axis=-1)))


class Row(NamedTuple):
    observation: Array
    action: Array
    next_goal: Array


class Batch(NamedTuple):
    observation: Array
    action: Array
    goal: Array


def energy(phi, psi, kind):
    if kind == "norm":
        return -jnp.sqrt(jnp.sum((phi - psi) ** 2, axis=-1) + 1e-6)
    if kind == "l2":
        return -jnp.sum((phi - psi) ** 2, axis=-1)
    if kind == "dot":
        return jnp.sum(phi * psi, axis=-1)


def pairwise_energy(phi, psi, kind):
    if kind == "dot":
        return jnp.matmul(phi, psi.T, precision="highest")
    centre = jax.lax.stop_gradient(psi.mean(axis=0))
    phi, psi = phi - centre, psi - centre
    product = jnp.matmul(phi, psi.T, precision="highest")
    squared = jnp.maximum(jnp.sum(phi**2, -1)[:, None] + jnp.sum(psi**2, -1) - 2 * product, 0)
    return -squared if kind == "l2" else -jnp.sqrt(squared + 1e-6)


def contrastive_loss(logits, kind, penalty):
    positive = jnp.diag(logits)
    lse = jax.nn.logsumexp(logits, axis=1)
    if kind == "fwd_infonce":
        loss = jnp.mean(lse - positive)
    elif kind == "bwd_infonce":
        loss = jnp.mean(jax.nn.logsumexp(logits, axis=0) - positive)
    elif kind == "sym_infonce":
        loss = jnp.mean(lse + jax.nn.logsumexp(logits, axis=0) - 2 * positive)
    return loss + penalty * jnp.mean(lse**2), dict(acc=jnp.mean(jnp.argmax(logits, 1) == jnp.arange(len(logits))))


def critic_loss(critic, batch, config):
    phi = critic.encode_state_action(batch.observation, batch.action)
    psi = critic.encode_goal(batch.goal)
    return contrastive_loss(pairwise_energy(phi, psi, config.energy), config.loss, config.logsumexp_penalty)


def actor_loss(actor, critic, alpha, batch, key, config):
    n = batch.goal.shape[0]
    other = jnp.arange(n) < config.random_goals * n
    goal = jnp.where(other[:, None], jnp.roll(batch.goal, 1, axis=0), batch.goal)
    action, log_prob = policy(actor, batch.observation, goal).sample_and_log_prob(key)
    value = energy(critic.encode_state_action(batch.observation, action), critic.encode_goal(goal), config.energy)
    return jnp.mean(alpha * log_prob - value), log_prob


class TrainState(NamedTuple):
    actor: ResidualMLP
    critic: Critic
    log_alpha: Array
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    replay: buffer.Replay
    envs: envs.VectorState
    steps: Array
    key: Array


def build(config, total_updates):
    env = envs.make(config.env)
    venv = VectorEnv(env, config.num_envs, config.episode_length, config.goals)

    def adam(lr):
        return optax.adam(optax.cosine_decay_schedule(lr, total_updates, config.final_lr_fraction))

    opts = adam(config.actor_lr), adam(config.critic_lr), adam(config.alpha_lr)
    g = len(env.goal_indices)

    def init(key):
        ak, pk, sk, ek, key = jax.random.split(key, 5)
        actor = ResidualMLP(env.observation_size + g, config.width, config.actor_depth or config.depth, 2 * env.action_size, ak)
        critic = Critic(
            ResidualMLP(env.observation_size + env.action_size, config.width, config.critic_depth or config.depth, config.representation_size, pk),
            ResidualMLP(g, config.width, config.critic_depth or config.depth, config.representation_size, sk),
        )
        la = jnp.zeros(())
        row = Row(jnp.zeros(env.observation_size), jnp.zeros(env.action_size), jnp.zeros(g))
        return TrainState(
            actor, critic, la, opts[0].init(actor), opts[1].init(critic), opts[2].init(la),
            buffer.init(row, config.max_replay_size, config.num_envs), venv.reset(ek), jnp.zeros((), jnp.int32), key)

    def collect(state):
        key, sk = jax.random.split(state.key)

        def step(e, key):
            ak, wk, gk = jax.random.split(key, 3)
            action, _ = policy(state.actor, e.env.observation, e.env.goal).sample_and_log_prob(ak)
            e, t = venv.step(e, action)
            if config.goal_switch_probability:
                goal = jax.vmap(env.sample_goal)(jax.random.split(gk, config.num_envs))
                switch = jax.random.bernoulli(wk, config.goal_switch_probability, (config.num_envs, 1))
                e = e._replace(env=e.env._replace(goal=jnp.where(switch, goal, e.env.goal)))
            return e, (Row(t.observation, t.action, env.achieved_goal(t.next_observation)), t.terminated | t.truncated)

        e, (rows, last) = jax.lax.scan(step, state.envs, jax.random.split(sk, config.unroll_length))
        return state._replace(replay=buffer.add(state.replay, rows, last), envs=e, key=key, steps=state.steps + config.unroll_length)

    def sample(replay, key):
        if config.relabel == "published":
            pairs = buffer.sample_future_in_window(replay, key, config.batch_size, config.discount, config.episode_length)
            row, fut = (buffer.gather(replay, i, pairs.env) for i in (pairs.row, pairs.future))
            return Batch(row.observation, row.action, env.achieved_goal(fut.observation))
        pairs = buffer.sample_future(replay, key, config.batch_size, config.discount)
        row, fut = (buffer.gather(replay, i, pairs.env) for i in (pairs.row, pairs.future))
        return Batch(row.observation, row.action, fut.next_goal)

    def update(state, key):
        sk, ak = jax.random.split(key)
        batch = sample(state.replay, sk)
        alpha = jnp.exp(state.log_alpha) * config.entropy_tuning
        (al, lp), ga = jax.value_and_grad(actor_loss, has_aux=True)(state.actor, state.critic, alpha, batch, ak, config)
        (cl, info), gc = jax.value_and_grad(critic_loss, has_aux=True)(state.critic, batch, config)
        target = -config.target_entropy_scale * env.action_size
        gl = jnp.exp(state.log_alpha) * jnp.mean(-lp - target)
        u, ao = opts[0].update(ga, state.actor_opt); actor = optax.apply_updates(state.actor, u)
        u, co = opts[1].update(gc, state.critic_opt); critic = optax.apply_updates(state.critic, u)
        u, lo = opts[2].update(gl, state.alpha_opt); la = optax.apply_updates(state.log_alpha, u)
        return state._replace(actor=actor, critic=critic, log_alpha=la, actor_opt=ao, critic_opt=co, alpha_opt=lo), dict(
            cl=cl, al=al, ent=-lp.mean(), alpha=alpha, **info)

    def train_chunk(state):
        state = collect(state)
        key, uk = jax.random.split(state.key)
        state, info = jax.lax.scan(update, state._replace(key=key), jax.random.split(uk, config.updates_per_chunk))
        return state, jax.tree.map(jnp.mean, info)

    far = envs.make(config.env + "_eval") if config.env + "_eval" in envs.names() else None
    single = envs.make("point_u_maze_single_eval") if config.env == "point_u_maze" else None

    def evaluate(state, key):
        out = {}
        for name, e in dict(uni=env, far=far, single=single).items():
            if e is None: continue
            for det in (True, False):
                rk, k = jax.random.split(key)
                s = jax.vmap(e.reset)(jax.random.split(rk, config.num_eval_envs))

                def step(s, k):
                    d = policy(state.actor, s.observation, s.goal)
                    a = d.mode() if det else d.sample_and_log_prob(k)[0]
                    s = jax.vmap(e.step)(s, a)
                    return s, e.distance(s) < e.success_radius

                s, hit = jax.lax.scan(step, s, jax.random.split(k, config.episode_length))
                out[f"{name}{'' if det else '_s'}"] = hit.any(0).mean()
                if name == "uni" and det: out["tag"] = hit.sum(0).mean()
        return out

    return init, collect, train_chunk, evaluate
