"""The probe of cocoa.py's embedding against least squares, and which tasks it is fitted to and scored on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probe_embedding
from algorithms import cocoa
from envs.point import PointGoal


class Listed(PointGoal):
    """Six train tasks, (7, 7) to (12, 12), and the test tasks (13, 13) to (16, 16)."""

    def tasks(self, key, num_train, num_test):
        tasks = jnp.repeat(jnp.arange(num_train + num_test)[:, None] + 7.0, 2, axis=1)
        return tasks[:num_train], tasks[num_train:]


@pytest.mark.parametrize(("shift", "lowest", "highest"), [(0, 0.99, 1.0), (1, -1e3, 0.5)])
def test_the_probe_is_fitted_on_train_tasks_and_scored_on_test_tasks(monkeypatch, shift, lowest, highest):
    """With embeddings that are the task, in another place for test tasks if shifted."""
    met = []

    def adapt(config, family, agent, tasks, key):
        met.append((tasks[:, 0].tolist(), jax.random.key_data(key).tolist()))
        known = (tasks + shift * 10.0 * (tasks >= 13))[:, :1]
        posterior = cocoa.Gaussian(known @ jnp.array([[1.0, -2.0]]), jnp.ones((len(tasks), 2)))
        return jnp.zeros((3, len(tasks))), posterior, None

    monkeypatch.setattr(cocoa, "adapt", adapt)
    family = Listed()
    given = cocoa.Config(num_train_tasks=6, num_test_tasks=4, eval_repeats=3, width=8, encoder_width=8)
    config = cocoa.settle(given, family)
    agent = cocoa.make_agent(config, family, jax.random.key(0))
    assert lowest <= float(probe_embedding.r2(config, family, agent, jax.random.key(0), jnp.array(5))) <= highest

    cocoa.evaluate(config, family, agent, family.tasks(None, 6, 4)[1], evaluation_key(0, 5))
    train, test, evaluated = met
    assert train[0] == 3 * [7, 8, 9, 10, 11, 12]
    assert test == evaluated, "the test tasks are met as in the evaluation"
    assert train[1] != test[1]


def evaluation_key(seed, gradient_steps):
    return jax.random.fold_in(cocoa.run.evaluation_key(jax.random.key(seed)), gradient_steps)


def test_the_probe_is_least_squares_and_its_r2():
    rng = np.random.default_rng(0)
    train_x, test_x = rng.normal(size=(200, 3)), rng.normal(size=(50, 3))
    law = lambda x: x @ [[1.0, 2.0], [0.0, -1.0], [0.5, 0.0]] + 3 + 0.3 * rng.normal(size=(len(x), 2))
    train_y, test_y = law(train_x), law(test_x)
    design = lambda x: np.c_[x, np.ones(len(x))]
    weights = np.linalg.lstsq(design(train_x), train_y, rcond=None)[0]
    residual = np.sum((design(test_x) @ weights - test_y) ** 2)
    exact = 1 - residual / np.sum((test_y - test_y.mean(0)) ** 2)
    ours = probe_embedding.probe(*(jnp.asarray(x, jnp.float32) for x in (train_x, train_y, test_x, test_y)))
    assert float(ours) == pytest.approx(exact, abs=0.005)
    assert 0.8 < exact < 0.99


def test_what_has_no_embedding_is_refused_in_one_line(tmp_path, capsys):
    told = tmp_path / "told"
    told.mkdir()
    (told / "config.json").write_text(json.dumps({"config": dataclasses.asdict(cocoa.Config(context="oracle"))}))
    for folders, message in (
        ([], "name run folders"),
        ([tmp_path], f"{tmp_path} is not a run folder"),
        ([told], f"the run in {told} has no embedding"),
    ):
        with pytest.raises(SystemExit, match="2"):
            probe_embedding.main(["probe_embedding.py", *map(str, folders)])
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
