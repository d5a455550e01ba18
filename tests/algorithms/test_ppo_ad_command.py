"""ppo_ad.py as a user runs it: killed, resumed, stopped, gone wrong. Tiny settings, real processes."""

import csv
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Script, metrics, train
from PIL import Image

from algorithms import ppo_ad
from shared import run

SCRIPT = Script(ppo_ad)
TINY = [
    *("--num_envs=4", "--episode_length=20", "--unroll_length=20", "--num_minibatches=2", "--update_epochs=2"),
    *("--auxiliary_every=2", "--auxiliary_epochs=1", "--num_targets=3", "--dense_size=16", "--latent_size=16"),
    *("--num_eval_envs=4", "--eval_every=480", "--checkpoint_every=240"),
]
REFERENCE = [*TINY, "--num_seeds=2", "--total_env_steps=4000"]
# num_envs x unroll_length x auxiliary_every is a multiple of 512, else the encoder is compiled once more for the rest
SMALL_ENCODER = [
    *("--channels=1", "--dense_size=16", "--latent_size=16", "--num_minibatches=2", "--update_epochs=1"),
    *("--auxiliary_every=2", "--auxiliary_epochs=1", "--num_targets=1", "--episode_length=40", "--eval_every=500"),
    *("--checkpoint_every=200", "--total_env_steps=512"),
]
FIGURES = {"curve.png", "achievements.png", "rollout.gif"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """An uninterrupted run of 2 seeds: its parent folder, its flags and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = SCRIPT.run(*REFERENCE, f"--run_dir={folder / 'whole'}", cwd=folder, env=cache)
    return folder, REFERENCE, done


def test_prints_what_it_is_and_last_the_run_folder(reference):
    folder, _, done = reference
    assert done.stdout.splitlines()[-1] == str(folder / "whole")
    for words in (
        "recipe for minicraft",
        "PPO with matching, prediction, memory",
        r"agent\s+[0-9,]+ parameters\nencoder\s+[0-9,]+ parameters",
        "compiled matching, 128 rows",
    ):
        assert re.search(words, done.stdout), words
    assert "steps/s" in done.stderr and re.search(r"left  evaluation \d", done.stderr)
    assert re.search(r"env steps +4,000  Crafter score, %: evaluation \d.*; all training episodes so", done.stdout)
    assert {path.name for path in (folder / "whole").iterdir()} >= FIGURES
    with Image.open(folder / "whole" / "rollout.gif") as film:
        assert 1 < film.n_frames <= 20  # frames without a change are merged


def test_metrics_are_those_of_two_different_seeds_and_the_score_is_that_of_the_rates(reference):
    folder, *_ = reference
    rows = metrics(folder / "whole")
    assert [int(row["env_steps"]) for row in rows[::2]] == list(range(80, 4001, 80))
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert rows[0]["train/loss"] != rows[1]["train/loss"]
    last = rows[-2]
    rates = np.array([float(value) for name, value in last.items() if name.startswith("eval/success/")])
    assert len(rates) == 6 and np.isin(rates, np.arange(5) / 4).all()
    assert float(last["eval/score"]) == pytest.approx(np.exp(np.log1p(100 * rates).mean()) - 1, rel=1e-5)
    assert float(last["eval/episode_length"]) == 20
    assert int(last["train/episodes"]) == 4000 / 20


def test_seeds_on_two_devices_train_the_same(reference, cache):
    SCRIPT.check_seeds_on_devices(reference, cache, "learn")


def test_killed_stopped_and_resumed_it_ends_with_the_same_metrics(reference, cache):
    SCRIPT.check_interruptions(reference, cache, signal.SIGINT)


def test_killed_in_the_middle_of_an_auxiliary_phase_it_ends_with_the_same_metrics(tmp_path, cache):
    """A long phase begins after the second rollout."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*TINY, "--auxiliary_epochs=150", "--total_env_steps=240", "--checkpoint_every=80"]
    train(ppo_ad, *flags, f"--run_dir={whole}")
    first, second, *_ = (float(row["seconds"]) for row in csv.DictReader((whole / "metrics.csv").open()))
    phase = second - first
    assert phase > 0.6

    def kill(process):  # up to 0.2 seconds after the row of the first rollout
        time.sleep(0.3 * phase)
        process.kill()

    *_, code = SCRIPT.interfered(kill, killed, [*flags, f"--run_dir={killed}"], tmp_path, 1, cache)
    assert code == -signal.SIGKILL and len(metrics(killed)) == 1
    train(ppo_ad, f"--resume={killed}")
    assert metrics(killed) == metrics(whole)


def test_a_loss_that_explodes_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train(ppo_ad, *TINY, "--total_env_steps=8000", "--learning_rate=1e38", f"--run_dir={tmp_path / 'r'}")
    assert end.value.code == 2
    loss = r"train/\w*loss is \S+ at env step \d+ of seed 0"
    parameter = r"a parameter is not finite after gradient step \d+"
    assert re.search(f"^error: ({loss}|{parameter})", capsys.readouterr().err, re.MULTILINE)
    assert list((tmp_path / "r" / "checkpoints").glob("*.eqx"))


# the encoder: 189 x 16 + 16; LayerNorm and product, twice. The heads of 8 actions and a value. FiLM: LayerNorm, 8 x 16,
# 16 x 32 + 32. The predictor: LayerNorm, 32 x 16, 16 x 16 + 16. The memory is 16 more inputs of heads and predictor.
PPO = 189 * 16 + 16 + 2 * (32 + 256) + 17 * 9
ALL = PPO + 16 * 9 + (16 + 128 + 17 * 32) + (64 + 512 + 17 * 16)


@pytest.mark.parametrize(
    ("flag", "what", "parameters", "present", "absent"),
    [
        ("--distill=false", "plain PPO", PPO, "train/loss", "auxiliary/"),
        ("--matching=false", "PPO with prediction, memory", ALL, "auxiliary/prediction_loss", "auxiliary/matching"),
        (
            "--prediction=false",
            "PPO with matching, memory",
            PPO + 144,
            "auxiliary/matching_loss",
            "auxiliary/prediction",
        ),
        ("--memory=false", "PPO with matching, prediction", ALL - 432, "auxiliary/matching_loss", "nothing"),
    ],
)
def test_each_switch_takes_its_part_out(flag, what, parameters, present, absent, tmp_path, capsys):
    with jax.debug_nans(True):
        train(ppo_ad, *TINY, flag, "--total_env_steps=480", f"--run_dir={tmp_path}")
    out, rows = capsys.readouterr().out, metrics(tmp_path)
    assert f"\n{what}\n" in out and re.search(f"agent +{parameters:,} parameters", out)
    assert len(rows) == 6
    assert present in rows[-1] and not any(name.startswith(absent) for name in rows[-1])


def test_a_loaded_agent_is_the_runs(reference):
    """Scored under the keys of the last evaluation, the loaded agents have its scores; loading changes nothing."""
    folder = reference[0] / "whole"
    contents = lambda: {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    before, rows = contents(), metrics(folder)[-2:]
    loaded = [ppo_ad.load(str(folder), seed=int(row["seed"])) for row in rows]
    config, env, _ = loaded[0]
    agents = jax.tree.map(lambda *x: jnp.stack(x), *(agent for *_, agent in loaded))
    key = lambda row: jax.random.fold_in(run.evaluation_key(jax.random.key(int(row["seed"]))), int(row["ppo_steps"]))
    score = partial(ppo_ad.evaluate, config, env.vectorise(config.num_eval_envs, config.episode_length))
    scores = jax.jit(jax.vmap(score))(agents, jnp.stack([key(row) for row in rows]))
    for name, values in scores.items():
        np.testing.assert_allclose(values, [float(row[name]) for row in rows], rtol=1e-5, err_msg=name)
    assert contents() == before
    with pytest.raises(run.UserError, match="seed is 2"):
        ppo_ad.load(str(folder), seed=2)


@pytest.mark.slow
def test_craftax_pixels_with_a_small_encoder_trains_and_draws(tmp_path, cache):
    folder = tmp_path / "run"
    flags = [*SMALL_ENCODER, "--env=craftax_classic_pixels", "--num_envs=4", "--unroll_length=64", "--num_eval_envs=4"]
    SCRIPT.run(*flags, f"--run_dir={folder}", cwd=tmp_path, env=cache)
    rows = metrics(folder)
    assert [int(row["env_steps"]) for row in rows] == [256, 512]
    assert 0 <= float(rows[-1]["eval/score"]) < 100 and "eval/success/collect_wood" in rows[-1]
    assert any(float(row["auxiliary/prediction_steps"] or 0) > 0 for row in rows)
    assert {path.name for path in folder.iterdir()} >= FIGURES


@pytest.mark.slow
def test_crafter_with_three_workers_resumes_and_says_which_worker_died(tmp_path, cache):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    flags = [*SMALL_ENCODER, "--env=crafter", "--num_envs=8", "--unroll_length=32", "--num_eval_envs=2"]
    flags += ["--matching=false", "--env_options=workers=3"]
    SCRIPT.run(*flags, f"--run_dir={whole}", cwd=tmp_path, env=cache)
    assert {path.name for path in whole.iterdir()} >= FIGURES

    def kill_a_worker(process):
        threads = Path(f"/proc/{process.pid}/task").glob("*/children")  # any of them may have started the workers
        workers = [int(pid) for thread in threads for pid in thread.read_text().split()]
        assert len(workers) == 3
        os.kill(workers[1], signal.SIGKILL)

    _, err, code = SCRIPT.interfered(kill_a_worker, folder, [*flags, f"--run_dir={folder}"], tmp_path, 1, cache)
    assert code == 2
    assert re.search(r"^error: Crafter worker \d died \(signal SIGKILL.*--resume", err, re.MULTILINE)
    assert err.count("Traceback") == 0
    saved = max(int(path.stem) for path in (folder / "checkpoints").glob("*.eqx"))
    assert saved == int(metrics(folder)[-1]["env_steps"]), "nothing that was trained is lost"
    SCRIPT.check_ends_as(whole, folder, tmp_path, cache)
