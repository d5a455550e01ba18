"""Figure 8 of '1000 Layer Networks': does depth help because deep agents learn better, or because they collect better?

    python experiments/collectors.py --depth 16 --shallow_depth 4     a deep agent collects
    python experiments/collectors.py --depth 4 --deep_depth 16        a shallow one does

Three agents of crl.py, each with an actor, a critic and an alpha of its own: the collector (--depth), a deep learner
and a shallow one. Only the collector acts. All three take gradient steps on the same rows, and each is evaluated.
Flags, recipes, run folder and --resume are those of crl.py.
"""

import dataclasses
from functools import partial

import jax
from jaxtyping import Array, Key

from algorithms import crl
from envs import GoalEnv
from shared import evaluation, pictures, replay, run
from shared.networks import Depth

AGENTS = "collector", "deep", "shallow"
SCORES = run.Scores(
    "steps at the goal", {f"eval/{name}/time_at_goal": f"{name}, uniform goals, mean action" for name in AGENTS}
)


@dataclasses.dataclass(frozen=True)
class Config(crl.Config):
    """That of crl.py; depth is the collector's."""

    deep_depth: Depth = 16
    """Depth of the deep learner. Paper: 32."""
    shallow_depth: Depth = 4
    """Depth of the shallow learner, as in the paper."""


def configs(config: Config) -> list[Config]:
    """The settings of each agent."""
    return [dataclasses.replace(config, depth=d) for d in (config.depth, config.deep_depth, config.shallow_depth)]


def together(states: list[crl.TrainState]) -> crl.TrainState:
    """The first agent's state, with tuples of all agents and optimisers."""
    return states[0]._replace(agent=tuple(s.agent for s in states), optimizer=tuple(s.optimizer for s in states))


def apart(state: crl.TrainState) -> list[crl.TrainState]:
    """The state of each agent; replay, environments and key are the same for all."""
    return [state._replace(agent=a, optimizer=o) for a, o in zip(state.agent, state.optimizer)]


def init(config: Config, env: GoalEnv, key: Key[Array, ""]) -> crl.TrainState:
    return together([crl.init(each, env, key) for each in configs(config)])


def collect(config: Config, env: GoalEnv, state: crl.TrainState) -> crl.TrainState:
    """A chunk of data, by the collector alone."""
    return crl.collect(config, env, apart(state)[0])._replace(agent=state.agent, optimizer=state.optimizer)


def learn(config: Config, env: GoalEnv, state: crl.TrainState) -> tuple[crl.TrainState, dict]:
    """A chunk of gradient steps of all three, with the same key and so on the same rows."""
    learned = [crl.learn(each, env, one) for each, one in zip(configs(config), apart(state))]
    states, metrics = zip(*learned)
    return together(list(states)), _named("train", metrics)


def evaluate(config: Config, env: GoalEnv, far_env: GoalEnv | None, agents: tuple, key: Key[Array, ""]) -> dict:
    return _named("eval", [crl.evaluate(config, env, far_env, agent, key) for agent in agents])


def _named(kind, metrics):
    """The metrics of each agent, under its name."""
    each = zip(AGENTS, metrics)
    return {name.replace(kind, f"{kind}/{agent}", 1): value for agent, found in each for name, value in found.items()}


@run.command
def main(argv: list[str] | None = None) -> None:
    config = run.configure(Config, crl.RECIPES, __doc__, argv)
    replay.check(config)
    depths = "the depths are --depth, --deep_depth and --shallow_depth, each of both actor and critic"
    run.need(not (config.actor_depth or config.critic_depth), depths)
    run.need(config.checkpoint_replay, "checkpoints hold the replay here: no --checkpoint_replay=false")
    env, far_env = evaluation.make_envs(config)
    with run.Run(config, "collectors", crl.RECIPES, SCORES) as log:
        train(config, env, far_env, log)
        log.draw("learning curve", pictures.draw_curve, log.folder, SCORES)


def train(config: Config, env: GoalEnv, far_env: GoalEnv | None, log: run.Run) -> None:
    """As in crl.py."""
    begin = log.over_seeds(partial(init, config, env))
    shapes = jax.eval_shape(begin, log.seeds)
    log.describe(f"only the collector acts; depths {[each.depth for each in configs(config)]}: {', '.join(AGENTS)}")
    state = log.restore(shapes)
    collect_chunk = log.compile("collect", partial(collect, config, env), shapes, donate=True)
    learn_chunk = log.compile("learn", partial(learn, config, env), shapes, donate=True)
    score = log.compile("evaluate", partial(evaluate, config, env, far_env), shapes.agent, log.seeds)
    if state is None:
        prefill = replay.prefill_chunks(config)
        state = log.repeat("filling the replay", prefill, collect_chunk, begin(log.seeds))
    while log.going(state):
        state, metrics = learn_chunk(collect_chunk(state))
        if log.evaluates(state):
            metrics |= score(state.agent, log.evaluation_keys(state))
        log.end_chunk(state, metrics)


if __name__ == "__main__":
    main()
