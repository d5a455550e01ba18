"""play.py on runs that have not learned anything yet; README's test plays one of crl.py."""

from functools import partial

import jax
import pytest

import play
from algorithms import cocoa, ppo_ad
from shared import run


def save_ppo_ad(folder):
    flags = ["--num_envs=2", "--unroll_length=8", "--dense_size=16", "--latent_size=16", "--episode_length=12"]
    config = run.configure(ppo_ad.Config, ppo_ad.RECIPES, None, ["ppo_ad.py", *flags, f"--run_dir={folder}"])
    env = run.make_env(config.env, ppo_ad.AchievementEnv, "")
    return ppo_ad, config, partial(ppo_ad.init, config, env.vectorise(config.num_envs, config.episode_length))


def save_cocoa(folder):
    flags = ["--width=8", "--encoder_width=8", "--latent_size=4", "--num_train_tasks=4", "--num_test_tasks=6"]
    config = run.configure(cocoa.Config, cocoa.RECIPES, None, ["cocoa.py", *flags, f"--run_dir={folder}"])
    family = run.make_env(config.env, cocoa.TaskFamily, "")
    return cocoa, config, partial(cocoa.init, cocoa.settle(config, family), family)


@pytest.mark.parametrize(
    ("make", "flags", "score", "refused"),
    [
        (save_ppo_ad, [], "score", "ant"),
        (save_cocoa, ["--env", "sparse_point_goal"], "return_adapted", "half_cheetah_vel"),
    ],
)
def test_an_agent_is_scored_and_filmed(tmp_path, capsys, make, flags, score, refused):
    script, config, init = make(tmp_path / "run")
    with run.Run(config, script.__name__, script.RECIPES, script.SCORES) as log:
        log.save(jax.jit(log.over_seeds(init))(log.seeds))
    command = ["play.py", str(tmp_path / "run"), "--episodes", "5", "--film", str(tmp_path / "films/first")]
    play.main([*command, *flags])
    *scores, film = capsys.readouterr().out.splitlines()
    assert film == str(tmp_path / "films/first.gif") and (tmp_path / "films/first.gif").exists()
    assert score in {line.split()[0] for line in scores if line}
    with pytest.raises(SystemExit):
        play.main([*command, "--env", refused])
    assert capsys.readouterr().err.count("\n") == 1
