"""What holds for every script: its flags, its page, and what it says to bad input. Nothing here compiles."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from algorithms import c_learning, cocoa, crl, crl_offline, gcsl, maml, ppo_ad, rl2, sac, td3
from envs.ogbench_point import PointMaze
from shared import evaluation, offline, replay, run
from shared.networks import NetworkOptions

BAD_INPUT = {
    crl: [
        (["--env=point_umaze"], r"unknown environment 'point_umaze'; did you mean .*point_u_maze"),
        (["--dept=8"], r"dept.*depth"),
        (["--depth=6"], r"depth is 6; it is a positive multiple of 4, e.g. 8"),
        (["--depth=0"], r"depth is 0; it is a positive multiple of 4, e.g. 4"),
        (["--actor_depth=2"], r"actor_depth is 2; it is a positive multiple of 4"),
        (["--critic_depth=5"], r"critic_depth is 5"),
        (["--batch_size=0"], r"batch_size is 0; it is at least 1"),
        (["--num_envs=0"], r"num_envs is 0; it is at least 1"),
        (["--num_seeds=-1"], r"num_seeds is -1; it is at least 1"),
        (["--devices=3"], r"devices is 3; point_u_maze can have 1 here"),
        (["--devices=-1"], r"devices is -1; it is at least 0"),
        (["--discount=1"], r"discount is 1.0; it lies strictly between 0 and 1"),
        (["--discount=0"], r"discount is 0.0; it lies strictly between 0 and 1"),
        (["--max_replay_size=50"], r"max_replay_size is 50; it holds at least an episode \(100 steps\)"),
        (["--min_replay_size=5000"], r"min_replay_size is 5000; it lies in 2 to max_replay_size"),
        (["--random_goals=1.5"], r"random_goals is 1.5; it lies in \[0, 1\]"),
        (["--total_env_steps=10"], r"total_env_steps is 10; it must exceed the prefill of 25600"),
        (["--energy=mrn", "--representation_size=63"], r"representation_size is 63; --energy=mrn halves it"),
        (["--loss=nce"], r"fwd_infonce\|bwd_infonce\|sym_infonce\|binary_nce"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
        (["--run_dir=" + "x" * 300], r"cannot write run folder x+: File name too long"),
        (["--run_dir=/proc/nowhere"], r"cannot write run folder /proc/nowhere: .*; choose a --run_dir"),
        (
            ["--eval_env=point_u4_maze_eval"],
            r"eval_env point_u4_maze_eval has another robot, other walls or another time step than point_u_maze",
        ),
        (["--env=humanoid_u4_mase"], r"unknown environment 'humanoid_u4_mase'; did you mean humanoid_u4_maze"),
        (["--env=ant_big_maze_gen_1f"], r"maze 'big_maze_gen_1f' is not one corridor"),
        (["--env=ant_u_maze_gen_9f"], r"maze 'u_maze_gen_9f': '9f' is no list of distances"),
        (
            ["--env=arm_push_easy", "--eval_env=arm_binpick_hard"],
            r"eval_env arm_binpick_hard has another robot, other walls",
        ),
        (
            ["--env=humanoid", "--eval_env=humanoid_jaxgcrl"],
            r"eval_env humanoid_jaxgcrl has another robot, other walls",
        ),
        (
            ["--env=humanoid", "--env_options=control_step=0"],
            r"control_step is 0.0; it is a number of seconds, above 0",
        ),
        (["--env=humanoid", "--env_options=control_step=NaN"], r"control_step is nan; it is a number of seconds"),
        (["--env_options=walls"], r"env_options has 'walls'; write name=value"),
        (["--env_options=merged_walls=true"], r"point_u_maze has no option 'merged_walls'; it has none"),
        (["--env=ant", "--env_options=merged_walls=7"], r"option merged_walls of ant is 7; it is true or false"),
        (["--env=minicraft"], r"minicraft has no goals to reach; it is for ppo_ad.py"),
        (["--env=point_goal"], r"point_goal has no goals to reach; it is for cocoa.py"),
    ],
    sac: [
        (["--env=point_umaze"], r"unknown environment 'point_umaze'; did you mean .*point_u_maze"),
        (["--env=minicraft"], r"minicraft has no goals to reach; it is for ppo_ad.py"),
        (
            ["--env=antmaze_large"],
            r"antmaze_large is stepped by other processes|ogbench is not installed",
        ),
        (["--env=point_u_maze_pixels"], r"point_u_maze_pixels has images to look at; only crl.py takes those"),
        (["--env=point_u_maze_pixel"], r"did you mean point_u_maze_pixels"),
        (["--her=past"], r"none\|final\|future\|geometric"),
        (["--her_share=1.1"], r"her_share is 1.1; it lies in \[0, 1\]"),
        (["--target_rate=0"], r"target_rate is 0.0; it lies in \(0, 1\]"),
        (["--depth=6"], r"depth is 6; it is a positive multiple of 4, e.g. 8"),
        (["--min_replay_size=1"], r"min_replay_size is 1; it lies in 2 to max_replay_size"),
        (["--total_env_steps=10"], r"total_env_steps is 10; it must exceed the prefill of 25600"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
    td3: [
        (["--policy_delay=3"], r"updates_per_chunk is 128; it is a multiple of policy_delay, e.g. 126"),
        (["--policy_delay=0"], r"policy_delay is 0; it is at least 1"),
        (["--exploration_noise=-1"], r"exploration_noise is -1.0; it is at least 0"),
        (["--alpha_lr=1"], r"alpha_lr"),
        (["--max_replay_size=50"], r"max_replay_size is 50; it holds at least an episode \(100 steps\)"),
    ],
    gcsl: [
        (["--future=past"], r"uniform\|geometric"),
        (["--likelihood=laplace"], r"gaussian\|mse"),
        (["--critic_depth=4"], r"critic_depth"),
        (["--total_env_steps=10"], r"total_env_steps is 10; it must exceed the prefill of 25600"),
    ],
    c_learning: [
        (["--loss=nce"], r"c_learning\|nce_c_learning"),
        (["--weight_clip=0"], r"weight_clip is 0.0; it is above 0"),
        (["--random_goals=2"], r"random_goals is 2.0; it lies in \[0, 1\]"),
        (["--min_replay_size=5000"], r"min_replay_size is 5000; it lies in 2 to max_replay_size"),
    ],
    ppo_ad: [
        (["--env=craftax_pixels"], r"unknown environment 'craftax_pixels'; did you mean .*craftax_classic_pixels"),
        (["--env=ant_u_maze"], r"ant_u_maze has no achievements to unlock; take one of .*minicraft"),
        (["--env=point_goal"], r"point_goal has no achievements to unlock; .* or run cocoa.py"),
        (["--env=crafter", "--num_seeds=2"], r"num_seeds is 2; crafter runs outside of JAX, so it is 1"),
        (["--env_options=size=3"], r"minicraft has no option 'size'; it has none"),
        (["--num_minibatches=3"], r"num_minibatches is 3; it divides num_envs x unroll_length \(2048\), as [24] does"),
        (["--num_envs=0"], r"num_envs is 0; it is at least 1"),
        (["--latent_size=0"], r"latent_size is 0; it is at least 1"),
        (["--temperature=0"], r"temperature is 0.0; it is above 0"),
        (["--learning_rate=-1"], r"learning_rate is -1.0; it is above 0"),
        (["--entropy_weight=-1"], r"entropy_weight is -1.0; it is at least 0"),
        (["--discount=1"], r"discount is 1.0; it lies strictly between 0 and 1"),
        (["--gae_lambda=2"], r"gae_lambda is 2.0; it lies in \[0, 1\]"),
        (["--match_threshold=0.4"], r"match_threshold is 0.4; it lies in \[0.5, 1\), so that matches are one to one"),
        (["--auxiliary_every=1", "--unroll_length=2"], r"auxiliary_every x unroll_length is below 3 steps"),
        (["--transport_iterations=0"], r"transport_iterations is 0; it is at least 1"),
        (["--variant=text"], r"code\|paper"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
    rl2: [
        (["--env=half_cheeta_dir"], r"unknown environment 'half_cheeta_dir'; did you mean .*half_cheetah_dir"),
        (["--env=half_cheetah"], r"half_cheetah is not a task family; take one of .*half_cheetah_dir"),
        (["--num_minibatches=3"], r"num_minibatches is 3; it divides num_trials, which is 256"),
        (["--num_episodes=1"], r"num_episodes is 1; it is at least 2"),
        (["--discount=1.5"], r"discount is 1.5; it lies in \[0, 1\]"),
        (["--reward_scale=0"], r"reward_scale is 0.0; it is above 0"),
        (["--env=half_cheetah_dir", "--num_train_tasks=3"], r"3 train and 2 test tasks; there are 2 tasks"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
    maml: [
        (["--env=half_cheeta_dir"], r"unknown environment 'half_cheeta_dir'; did you mean .*half_cheetah_dir"),
        (["--env=point_u_maze"], r"point_u_maze is not a task family"),
        (["--num_episodes=1"], r"num_episodes is 1; it is at least 2"),
        (["--inner_lr=0"], r"inner_lr is 0.0; it is above 0"),
        (["--inner_loss=dice"], r"ratio\|log_likelihood"),
        (["--max_kl=0"], r"max_kl is 0.0; it is above 0"),
        (["--env=half_cheetah_dir", "--num_train_tasks=3"], r"3 train and 2 test tasks; there are 2 tasks"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
    crl_offline: [
        (["--env=point_u_maze"], r"env is point_u_maze; data are there for pointmaze_medium, .*pointmaze_teleport"),
        (["--env=pointmaze_mediun"], r"unknown environment 'pointmaze_mediun'; did you mean pointmaze_medium"),
        (["--data=antmaze.npz"], r"data is 'antmaze.npz', which is neither navigate, stitch nor a file"),
        (
            ["--env=antmaze_large"],
            r"data is 'navigate', which is no file, .*'antmaze-large-|ogbench is not installed",
        ),
        (["--agent=hiql"], r"crl\|gcbc\|qrl"),
        (["--depth=6"], r"depth is 6; it is 0 or a positive multiple of 4"),
        (["--latent_size=12"], r"latent_size is 12; it is a positive multiple of 8"),
        (["--latent_size=0"], r"latent_size is 0; it is a positive multiple of 8"),
        (["--agent=gcbc", "--mixed_loss"], r"mixed_loss mixes crl or qrl .*; these are gcbc and"),
        (["--mixed_loss", "--bc_weight=2"], r"mixed_loss mixes .* a bc_weight of at most 1; these are crl and 2.0"),
        (["--total_gradient_steps=0"], r"total_gradient_steps is 0; it lies in \[1, "),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
    cocoa: [
        (["--env=half_cheeta_vel"], r"unknown environment 'half_cheeta_vel'; did you mean .*half_cheetah_vel"),
        (["--env=half_cheetah"], r"half_cheetah is not a task family; take one of .*half_cheetah_vel"),
        (["--windw=3"], r"windw.*window"),
        (["--window=21"], r"window is 21; it lies in 1 to episode_length \(20\), the longest trajectory"),
        (["--window=0"], r"window is 0; it lies in 1 to episode_length"),
        (["--num_trajectories=1"], r"num_trajectories is 1; a trajectory is told from others, so it is at least 2"),
        (
            ["--num_train_tasks=5000"],
            r"replay_size is 80000, 16 rows for each of 5000 train tasks; each needs 200: make it 1000000 or more, "
            r"or take fewer tasks",
        ),
        (["--num_train_tasks=0"], r"num_train_tasks is 0; it is at least 1"),
        (["--env=half_cheetah_dir", "--num_train_tasks=3"], r"3 train and 2 test tasks; there are 2 tasks"),
        (["--num_train_tasks=1", "--negatives=other_tasks"], r"num_train_tasks is 1; --negatives=other_tasks needs"),
        (["--meta_batch=1", "--negatives=other_tasks"], r"meta_batch is 1; --negatives=other_tasks needs at least 2"),
        (["--env_options=forward_backward=true"], r"point_goal has no option 'forward_backward'; it has none"),
        (["--total_env_steps=16000"], r"total_env_steps is 16000; it must exceed the first 16000"),
        (["--exploration_episodes=8"], r"exploration_episodes is 8; it lies in 1 to eval_episodes - 1 \(7\)"),
        (["--meta_batch=0"], r"meta_batch is 0; it is at least 1"),
        (["--num_seeds=0"], r"num_seeds is 0; it is at least 1"),
        (["--extra_steps=-1"], r"extra_steps is -1; it is at least 0"),
        (["--temperature=0"], r"temperature is 0.0; it is above 0"),
        (["--momentum=1"], r"momentum is 1.0; it lies in \[0, 1\)"),
        (["--discount=1"], r"discount is 1.0; it lies in \[0, 1\)"),
        (["--target_rate=0"], r"target_rate is 0.0; it lies in \(0, 1\]"),
        (["--final_lr_fraction=2"], r"final_lr_fraction is 2.0; it lies in \[0, 1\]"),
        (["--similarity=cosine"], r"mahalanobis\|bhattacharyya\|bilinear\|wasserstein"),
        (["--context=task"], r"encoder\|oracle"),
        (["--resume=/tmp"], r"/tmp is not a run folder"),
    ],
}


@pytest.mark.parametrize(("script", "flags", "message"), [(s, *case) for s in BAD_INPUT for case in BAD_INPUT[s]])
def test_bad_input_is_one_line_before_any_compilation(script, flags, message, capsys, monkeypatch, tmp_path):
    def compiled(*_):
        raise AssertionError("went on to compile")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.Run, "compile", compiled)
    with pytest.raises(SystemExit) as exit_:
        script.main(["script.py", *flags])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.match("error: .*" + message, err)
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def configured(script, *flags):
    return run.configure(script.Config, script.RECIPES, script.__doc__, [script.__name__, *flags])


def goal_metrics(script) -> list[str]:
    config = configured(script)
    env, far_env = evaluation.make_envs(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: script.init(config, env, key), key)
    settings = (config,) if script is gcsl else (config, env)
    train = jax.eval_shape(lambda state: script.learn(*settings, state), state)[1]
    scores = jax.eval_shape(lambda a, k: script.evaluate(config, env, far_env, a, k), state.agent, key)
    return [*train, *scores, *step_counts(state)]


def step_counts(state) -> list[str]:
    return [name for name in state._fields if name.endswith("_steps")]


def ppo_ad_metrics() -> list[str]:
    config = configured(ppo_ad)
    env = run.make_env(config.env, ppo_ad.AchievementEnv, config.env_options)
    vector = env.vectorise(config.num_envs, config.episode_length)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: ppo_ad.init(config, vector, key), key)

    def chunk(state, key):
        state, info = ppo_ad.learn(config, state, *ppo_ad.collect(config, vector, state))
        return info | ppo_ad.evaluate(config, vector, state.agent, key)

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.window)  # in which there is no episode
    programs = {"remember": lambda agent, window: window}
    phase = ppo_ad.distil(config, programs, print, state._replace(window=blank, key=jax.random.key(0)))[1]
    names = [*jax.eval_shape(chunk, state, key), *phase, *step_counts(state)]
    return [re.sub("success/.*", "success/<achievement>", name) for name in names]


def cocoa_metrics() -> list[str]:
    def shapes(*flags):
        config = configured(cocoa, *flags)
        family = run.make_env(config.env, cocoa.TaskFamily, config.env_options)
        config = cocoa.settle(config, family)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(lambda key: cocoa.init(config, family, key), key)
        train = jax.eval_shape(lambda state: cocoa.learn(config, family, state), state)[1]
        score = lambda s, k: cocoa.evaluate(config, family, s.agent, s.test_tasks, k)
        return [*train, *jax.eval_shape(score, state, key), *step_counts(state)]

    return [*shapes(), *shapes("--context=oracle")]


def meta_metrics(script) -> list[str]:
    config = configured(script)
    family = run.make_env(config.env, script.TaskFamily, config.env_options)
    config = run.settle_tasks(config, family)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: script.init(config, family, key), key)
    train = jax.eval_shape(lambda state: script.learn(config, family, state), state)[1]
    scores = jax.eval_shape(lambda s, k: script.evaluate(config, family, s.agent, s.test_tasks, k), state, key)
    return [*train, *scores, *step_counts(state)]


def offline_metrics() -> list[str]:
    def shapes(*flags):
        config, env = crl_offline.settle(configured(crl_offline, *flags)), PointMaze("medium")
        key = jax.eval_shape(lambda: jax.random.key(0))
        data = jax.eval_shape(lambda key: offline.demonstrate(env, "stitch", 200, key), key)
        state = jax.eval_shape(partial(crl_offline.init, config, env), data, key)
        train = jax.eval_shape(partial(crl_offline.learn, config), state)[1]
        scores = jax.eval_shape(partial(crl_offline.evaluate, config, env), state.agent, state.recent, key)[1]
        names = [*train, *scores, *step_counts(state)]
        return [re.sub("task[1-5]", "task<i>", name) for name in names]

    return [*shapes(), *shapes("--agent=qrl"), *shapes("--agent=gcbc")]


METRICS = {
    **{script: partial(goal_metrics, script) for script in (crl, sac, td3, gcsl, c_learning)},
    ppo_ad: ppo_ad_metrics,
    **{script: partial(meta_metrics, script) for script in (rl2, maml)},
    cocoa: cocoa_metrics,
    crl_offline: offline_metrics,
}
SCRIPTS = list(METRICS)
FIELDS = [(script, field.name) for script in SCRIPTS for field in dataclasses.fields(script.Config)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_has_a_docstring(script):
    assert set(run.field_docs(script.Config)) == {field.name for field in dataclasses.fields(script.Config)}


@pytest.mark.parametrize(("script", "field"), FIELDS)
def test_every_field_is_read_by_the_program(script, field):
    """Not counting the function that only checks the settings."""
    source = "".join(Path(module.__file__).read_text() for module in (script, run, evaluation, replay))
    source = re.sub(r"^def check\(.*?(?=^\S)", "", source, flags=re.DOTALL | re.MULTILINE)
    assert re.search(rf"config\.{field}\b", source) or field in BY_NAME


BY_NAME = (
    *NetworkOptions._fields,
    *(f"{phase}_steps" for phase in ("initial", "prior", "posterior", "extra")),
    *ppo_ad.AUXILIARY,
    "published",
    *("total_env_steps", "total_gradient_steps"),
)
"""Fields that NetworkOptions.of, cocoa.py, ppo_ad.py, the recipes and the run's clock read by their names."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_recipe_is_flags_and_its_values_lie_in_their_ranges(script):
    for pattern, recipe in script.RECIPES.items():
        settings = run.recipe_for(script.Config, pattern.replace("*", "x"), script.RECIPES)
        assert settings and len(settings) <= len({field.name for field in dataclasses.fields(script.Config)})
        configured(script, *recipe.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_and_flag_is_explained_on_the_page(script):
    page = Path(script.__file__).with_suffix(".md").read_text()
    times = {*run.TIMING_COLUMNS} - {"env_steps_per_second", "gradient_steps_per_second"}
    for name in [*METRICS[script](), "seed", *times, f"{run.clock(script.Config)}_per_second"]:
        assert f"`{name}`" in page, f"{name} is not on the page"
    for field in dataclasses.fields(script.Config):
        assert f"`--{field.name}`" in page, f"--{field.name} is not on the page"
