"""The probe of ppo_ad.py's encoder against loops: what it records, its labels, and its fit."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probe_achievements
from algorithms import ppo_ad
from envs.minicraft import Minicraft


def test_it_records_latents_of_the_steps_and_what_they_unlock(monkeypatch):
    monkeypatch.setattr(probe_achievements, "STEPS", 25)
    config = ppo_ad.Config(episode_length=20, dense_size=8, latent_size=8)
    env, key = Minicraft(), jax.random.key(3)
    vector, agent = env.vectorise(64, 20), ppo_ad.make_agent(config, env, jax.random.key(0))
    latent, unlocked, done = jax.jit(partial(probe_achievements.record, config, vector))(agent, key)

    start_key, key = jax.random.split(key)
    acting = ppo_ad.start_acting(config, vector, agent, start_key)
    step = jax.jit(partial(ppo_ad.step, config, vector, agent, ppo_ad.Normaliser(*jnp.zeros(3))))
    bits = np.zeros((64, 6), bool)
    for t, step_key in enumerate(jax.random.split(key, 25)):
        acting, taken = step(acting, step_key)
        np.testing.assert_allclose(latent[t], ppo_ad.encode(agent, taken.observation), rtol=1e-4, atol=1e-5)
        new = np.asarray(taken.achievements) & ~bits
        for e in range(64):
            assert unlocked[t, e] == (np.flatnonzero(new[e])[0] if new[e].any() else -1)
        np.testing.assert_array_equal(done[t], taken.done)
        bits = np.asarray(taken.achievements) & ~np.asarray(taken.done)[:, None]
    assert (np.asarray(unlocked) >= 0).sum() > 5 and np.asarray(done).sum() == 64


def test_the_label_is_what_is_unlocked_next_in_the_episode():
    rng = np.random.default_rng(0)
    unlocked = np.where(rng.random((40, 5)) < 0.1, rng.integers(0, 4, (40, 5)), -1)
    done = rng.random((40, 5)) < 0.1
    labels = probe_achievements.label(unlocked, done)
    for t, e in itertools.product(range(40), range(5)):
        expected = -1
        for later in range(t, 40):
            if unlocked[later, e] >= 0:
                expected = unlocked[later, e]
                break
            if done[later, e]:
                break
        assert labels[t, e] == expected
    assert set(labels.ravel()) == {-1, 0, 1, 2, 3}


def test_the_classifier_is_logistic_regression_by_adam(monkeypatch):
    monkeypatch.setattr(probe_achievements, "UPDATES", 30)
    rng = np.random.default_rng(0)
    x, test_x = (rng.normal(2, 3, (n, 5)).astype(np.float32) for n in (80, 20))
    y = (x @ rng.normal(size=(5, 3))).argmax(1)
    inputs = lambda z: np.c_[(z - x.mean(0)) / (x.std(0) + 1e-6), np.ones(len(z))]
    weights, mu, nu = np.zeros((3, 6, 3))

    def probabilities(z):
        p = np.exp(inputs(z) @ weights)
        return p / p.sum(axis=1, keepdims=True)

    for i in range(1, 31):
        gradient = inputs(x).T @ (probabilities(x) - np.eye(3)[y]) / len(y)
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.999 * nu + 0.001 * gradient**2
        weights -= 0.01 * (mu / (1 - 0.9**i)) / (np.sqrt(nu / (1 - 0.999**i)) + 1e-8)
    ours = probe_achievements.classify(jnp.array(x), jnp.array(y), jnp.array(test_x), 3)
    np.testing.assert_allclose(ours, probabilities(test_x), atol=1e-4)
    assert np.ptp(ours) > 0.2


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    for folders, message in (([], "name run folders"), ([tmp_path], f"{tmp_path} is not a run folder")):
        with pytest.raises(SystemExit, match="2"):
            probe_achievements.main(["probe_achievements.py", *map(str, folders)])
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
