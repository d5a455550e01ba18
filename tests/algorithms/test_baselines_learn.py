"""What sac.py, td3.py, gcsl.py and c_learning.py learn, against known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stubs import Fixed, Line, Sizes

from algorithms import c_learning, gcsl, sac, td3
from shared import replay as buffer

OPTIMISED = True


def trained(script, chunks, **settings):
    """On the line, where a step is at most 0.25 and the goal at -1 or 1 is reached within 0.2."""
    config = script.Config(
        num_envs=32, episode_length=12, unroll_length=12, min_replay_size=24, max_replay_size=240, batch_size=128,
        width=32, discount=0.8, actor_lr=1e-3, num_eval_envs=64, total_env_steps=100_000, **settings,
    )  # fmt: skip
    env = Line()
    more = lambda s: script.collect(config, env, s)
    state = jax.jit(lambda key: more(more(script.init(config, env, key))))(jax.random.key(0))
    arguments = (config,) if script is gcsl else (config, env)
    chunk = jax.jit(lambda s: script.learn(*arguments, script.collect(config, env, s))[0])
    for _ in range(chunks):
        state = chunk(state)
    scores = jax.jit(lambda s: script.evaluate(config, env, None, s.agent, jax.random.key(1)))(state)
    return state.agent, scores


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        (sac, {"her": "future", "target_entropy_scale": 3.0, "alpha_lr": 1e-2}),
        (sac, {"her": "none", "target_entropy_scale": 3.0, "alpha_lr": 1e-2}),
        (td3, {"her": "future"}),
    ],
)
def test_q_is_the_discounted_return_of_the_best_policy(script, settings):
    """From the start the fourth step arrives at the earliest (0.25, 0.5, 0.75, 1). Then every step is rewarded, also
    beyond the time limit: Q = discount^3 / (1 - discount). Inside the radius it is 1 / (1 - discount)."""
    agent, scores = trained(script, 25, updates_per_chunk=60, critic_lr=1e-3, target_rate=0.05, **settings)
    assert scores["eval/success_any"] == 1
    observation, goal = jnp.array([[0.0], [0.0], [1.0], [-1.0]]), jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
    value = script.value(agent, observation, goal)
    best = np.array([0.8**3, 0.8**3, 1, 1]) / (1 - 0.8)
    np.testing.assert_allclose(value, best, rtol=0.15)


@pytest.mark.parametrize("loss", ["c_learning", "nce_c_learning"])
def test_c_learning_reaches_the_ends_of_the_line(loss):
    _, scores = trained(c_learning, 25, updates_per_chunk=60, critic_lr=1e-3, target_rate=0.05, loss=loss)
    assert scores["eval/success_any"] == 1


@pytest.mark.parametrize("settings", [{}, {"future": "geometric"}, {"likelihood": "mse"}])
def test_gcsl_and_gcbc_reach_the_ends_of_the_line(settings):
    _, scores = trained(gcsl, 20, updates_per_chunk=60, **settings)
    assert scores["eval/success_any"] == 1


def test_the_classifiers_recover_the_discounted_occupancy_of_a_chain(monkeypatch):
    """exp f(s, a, g) = p(g | s, a) / p(g), here under a policy that does not learn: the occupancy that
    test_crl_learns.py computes in closed form for the same chain."""
    rng, size, discount = np.random.default_rng(0), 5, 0.8
    move = np.zeros((size, 2, size))
    for s in range(size):
        for a in range(2):
            move[s, a, min(max(s + (1 if a else -1), 0), size - 1)] += 0.9
            move[s, a, s] += 0.1
    behaviour = np.array([0.35, 0.65])
    under_policy = np.einsum("a,sat->st", behaviour, move)
    occupancy = (1 - discount) * np.einsum("sat,tg->sag", move, np.linalg.inv(np.eye(size) - discount * under_policy))

    num_envs, time = 64, 400
    states, actions = np.zeros((time + 1, num_envs), int), rng.choice(2, p=behaviour, size=(time, num_envs))
    states[0] = rng.integers(size, size=num_envs)
    for t in range(time):
        cumulative = move[states[t], actions[t]].cumsum(-1)
        states[t + 1] = (rng.random((num_envs, 1)) > cumulative).sum(-1)
    marginal = np.bincount(states[1:].ravel(), minlength=size) / time / num_envs
    one_hot, one_hot_action = np.eye(size, dtype=np.float32), np.eye(2, dtype=np.float32)
    rows = c_learning.Transition(one_hot[states[:-1]], one_hot_action[actions], one_hot[states[1:]])
    replay = buffer.init(jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), rows), time, num_envs)
    replay = buffer.add(replay, jax.tree.map(jnp.array, rows), jnp.zeros((time, num_envs), bool))

    class Behaviour(Fixed):
        def sample(self, key):
            return jax.nn.one_hot(jax.random.bernoulli(key, behaviour[1], (config.batch_size,)).astype(int), 2)

    monkeypatch.setattr(c_learning, "policy", lambda *_: Behaviour(None))
    config = c_learning.Config(width=32, batch_size=256, discount=discount)
    agent = c_learning.make_agent(config, Sizes(size, 2, size), jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 3000, 0.01))

    def step(carry, key):
        critics, target, optimizer_state = carry
        batch_key, next_key = jax.random.split(key)
        batch = c_learning.sample(config, Sizes(size, 2, size), replay, batch_key)
        gradient, _ = jax.grad(c_learning.critic_loss, has_aux=True)(critics, agent, target, batch, next_key, config)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        critics = optax.apply_updates(critics, updates)
        return (critics, optax.incremental_update(critics, target, 0.05), optimizer_state), None

    carry = agent.critics, agent.critics, optimizer.init(agent.critics)
    keys = jax.random.split(jax.random.key(1), 3000)
    (critics, *_), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    s, a, g = (x.ravel() for x in np.meshgrid(np.arange(size), np.arange(2), np.arange(size), indexing="ij"))
    f = c_learning.logits(critics, jnp.array(one_hot[s]), jnp.array(one_hot_action[a]), jnp.array(one_hot[g]))
    learned = np.exp(np.asarray(f.mean(axis=0), np.float64)).reshape(size, 2, size) * marginal
    error = np.abs(learned / learned.sum(-1, keepdims=True) - occupancy).sum(-1) / 2
    assert error.max() < 0.1, error
    assert np.abs(marginal - occupancy).sum(-1).max() / 2 > 0.3, "a classifier that learned nothing is far away"
