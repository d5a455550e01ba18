"""Everything of a run that is not the algorithm: flags, run folder, progress, checkpoints, the bookkeeping of the loop.

This is the only file that knows about disks and terminals. A script calls it, and it never calls a script:

    config = run.configure(Config, RECIPES, __doc__, argv)
    with run.Run(config, "crl", RECIPES, SCORES) as log:
        begin = log.over_seeds(partial(init, config, env))
        shapes = jax.eval_shape(begin, log.seeds)
        chunk = log.compile("chunk", partial(collect_and_learn, config, env), shapes, donate=True)
        state = log.restore(shapes) or begin(log.seeds)
        while log.going(state):
            state, metrics = chunk(state)
            log.end_chunk(state, metrics)

The state is a NamedTuple whose leaves have a leading axis of seeds. A run looks at these of its fields: `agent`, the
first one, holds the networks, which stay finite; those named `..._steps` count the steps of one seed so far, first
`env_steps`, then gradient steps. The first is the run's clock: its budget is `total_env_steps`, or of a script that has
no environment steps `total_gradient_steps`.
"""

import ast
import contextlib
import csv
import dataclasses
import datetime
import fcntl
import fnmatch
import functools
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from annotated_types import Ge, Gt, Interval
from jax.experimental import multihost_utils
from jaxtyping import Key

import envs
from envs.pool import PoolError
from shared.networks import count_parameters

PACKAGES = (
    *("jax", "jaxlib", "equinox", "optax", "ott-jax", "brax", "mujoco", "mujoco-mjx", "craftax", "crafter"),
    *("metaworld", "numpy"),
)
CHECKPOINTS_KEPT = 2
TIMING_COLUMNS = ("seconds", "compile_seconds", "env_steps_per_second", "gradient_steps_per_second")
"""The columns of metrics.csv that differ between two runs of one command on one machine."""
UNTOLD = ("seed", "run_dir", "devices", "processes", "tensorboard", "wandb")
"""Settings that do not tell what a run is."""


class UserError(Exception):
    """Something the user can mend; the message is one line that says what is wrong and what would be right."""


def need(fine: bool, message: str) -> None:
    """UserError with this message unless all is fine."""
    if not fine:
        raise UserError(message)


def command(main):
    """Makes `main(argv=None)` a command: a UserError is one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        # those that the caller closed: else the next file that is opened takes their place
        streams = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, sys.stdout, sys.stderr = (x or open(os.devnull, "r+") for x in streams)  # noqa: SIM115
        try:
            return main(argv)
        except UserError as error:
            say(sys.stderr, f"error: {error}\n")
            sys.exit(2)
        except KeyboardInterrupt:
            say(sys.stderr, "error: interrupted\n")
            sys.exit(130)

    return wrapped


def say(stream, text: str) -> None:
    """Writes to a terminal or a pipe at once. If nobody listens any more, this and what follows is dropped."""
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # also what Python itself flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---- settings and flags ---------------------------------------------------------------------------------------------

Count = Annotated[int, Ge(1)]
Steps = Annotated[int, Interval(ge=1, le=2_000_000_000)]
"""Counted in 32 bits."""
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Fraction = Annotated[float, Interval(gt=0, lt=1)]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings that concern no algorithm. A script's Config inherits them and adds its own, among them `env`,
    `total_env_steps` (or `total_gradient_steps`), `eval_every` and `checkpoint_every`."""

    seed: Annotated[int, Interval(ge=0, le=2_000_000_000)] = 0
    """First seed."""
    num_seeds: Count = 1
    """Number of seeds (seed, seed + 1, ...), trained side by side in one program."""
    env_options: str = ""
    """Options of the environment (envs/README.md): 'name=value,name=value'."""
    devices: Annotated[int, Ge(0)] = 0
    """Devices that the seeds are spread over, or the environments of one seed (crl.py); 0: as many as divide them."""
    processes: Count = 1
    """Processes that are this run together, on one or more machines; all are started with the same flags (README)."""
    matmul_precision: Literal["default", "float32", "tensorfloat32", "bfloat16"] | None = None
    """Precision of float32 matrix products in networks and losses. Without it JAX_DEFAULT_MATMUL_PRECISION holds, else
    JAX's default: float32 on a CPU, tensorfloat32 on most GPUs. Physics always has float32."""
    run_dir: str = ""
    """Run folder; by default runs/ALGORITHM/ENV/NAME, with the settings that differ from the defaults in its name."""
    resume: str = ""
    """Run folder to go on with; its settings are in force. A larger budget of steps goes on with a finished run."""
    tensorboard: bool = False
    """Also write TensorBoard events to the run folder (pip install -e '.[tensorboard]')."""
    wandb: bool = False
    """Also log to Weights & Biases (pip install -e '.[wandb]')."""


def field_docs(config_class) -> dict[str, str]:
    """The docstring under each field of a dataclass and of its bases, which Python itself throws away."""
    docs = {}
    for each in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        for field, doc in itertools.pairwise([*tree.body, None]):
            if isinstance(field, ast.AnnAssign):
                text = doc.value.value if isinstance(doc, ast.Expr) else ""
                docs[field.target.id] = inspect.cleandoc(text).replace("\n", " ")
    return docs


def configure(config_class, recipes: dict[str, str], description: str | None, argv: list[str] | None = None):
    """Builds a Config from the command line.

    Defaults are the dataclass's; on them come the recipes whose pattern matches `--env`, then the flags given. With
    `--resume`, everything comes from that run's config.json; a flag may only repeat it, raise the budget of steps, or
    ask for other devices.
    `--help` prints and exits.

    Args:
      config_class: a subclass of RunConfig with a docstring under each field.
      recipes: pattern of environment names, or a flag that is on -> flags, as one would type them.
      description: what `--help` says first.
      argv: the command line, program first; by default the process's.

    Raises:
      UserError: an unknown flag, a bad value, a leftover argument, or a run folder that does not fit.
    """
    argv = sys.argv if argv is None else argv
    if {"-h", "--help", "-help"} & set(argv[1:]):
        print(_help(config_class, recipes, description))
        sys.exit(0)
    given = _parse(config_class, argv[1:])
    if given.get("resume"):
        settings = _resumed(config_class, given)
    else:
        settings = recipe_for(config_class, given.get("env", config_class.env), recipes, given) | given
    for name, annotation in _annotations(config_class).items():
        if name in settings:
            _check_range(name, annotation, settings[name])
    if settings.get("processes", 1) > 1:
        _join(settings["processes"])
    _check_jax()
    return config_class(**settings)


def _join(processes):
    """Makes this process one of several; UserError if nothing says which."""
    address, index = (os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "PROCESS_ID"))
    known = {"coordinator_address": address, "num_processes": processes, "process_id": int(index)} if index else {}
    try:
        jax.distributed.initialize(**known)  # SLURM, MPI and Kubernetes say it themselves
    except (ValueError, RuntimeError) as error:
        said = "set JAX_COORDINATOR_ADDRESS=host:port and JAX_PROCESS_ID, or start it by srun or mpirun"
        raise UserError(f"processes is {processes}, and nothing says which this is; {said} ({error})") from None
    need(jax.process_count() == processes, f"processes is {processes}; {jax.process_count()} were started")


def _check_jax():
    """UserError if JAX cannot run the scripts here as it is set up."""
    need(not jax.config.jax_enable_x64, "JAX_ENABLE_X64 is on; the scripts compute in float32, so unset it")
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        wanted = jax.config.jax_platforms
        raise UserError(f"JAX finds no device for JAX_PLATFORMS={wanted}; unset it, or mend the driver") from None


def recipe_for(config_class, env: str, recipes: dict[str, str], settings: dict | None = None) -> dict:
    """The settings of all patterns that match an environment's name, or a flag that is on, later ones over earlier."""
    on = [f"--{name}" for name, value in (settings or {}).items() if value is True]
    matching = [recipe for pattern, recipe in recipes.items() if fnmatch.fnmatch(env, pattern) or pattern in on]
    return _parse(config_class, " ".join(matching).split())


def parse_options(text: str) -> dict:
    """'a=true,b=0.5' as a dict; ValueError if it is not written so."""
    options = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"env_options has {part!r}; write name=value, name=value, ...")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value.strip()
    return options


def make_env(name: str, kind: type[envs.Env], options: str) -> envs.Env:
    """An environment of this kind, with options as the flag has them; UserError if there is none."""
    try:
        return envs.make_kind(name, kind, **parse_options(options))
    except ValueError as error:
        raise UserError(str(error)) from None


def settle_tasks(config, family: envs.TaskFamily):
    """The settings, with the family's numbers of tasks where none are given; UserError if it cannot have so many, or
    episodes so long."""
    train, test = config.num_train_tasks or family.num_train_tasks, config.num_test_tasks or family.num_test_tasks
    try:
        jax.eval_shape(lambda key: family.tasks(key, train, test), jax.random.key(0))
    except (ValueError, PoolError) as error:
        raise UserError(str(error)) from None
    limit = family.longest_episode or config.episode_length
    message = f"episode_length is {config.episode_length}; an episode of {config.env} has at most {limit} steps"
    need(config.episode_length <= limit, message)
    return dataclasses.replace(config, num_train_tasks=train, num_test_tasks=test)


def clock(config) -> str:
    """What a run's budget counts, evaluations and checkpoints are due by, and its metrics are plotted against."""
    return "env_steps" if hasattr(config, "total_env_steps") else "gradient_steps"


def load_config(config_class, folder):
    """The settings of the run in a folder; UserError if there is none, or another version of the script made it."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not a run folder: it has no readable config.json") from None
    odd = ", ".join(sorted(set(saved) ^ {field.name for field in dataclasses.fields(config_class)}))
    need(not odd, f"{folder} was made by another version of this script (fields {odd}); resume it with that one")
    return config_class(**saved)


def _parse(config_class, arguments: list[str]) -> dict:
    """The flags given, by name."""
    values = flags.FlagValues()
    define = {
        bool: flags.DEFINE_boolean,
        int: functools.partial(flags.DEFINE, _Whole()),
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    annotations = _annotations(config_class)
    for field in dataclasses.fields(config_class):
        kind, _ = _kind(annotations[field.name])
        if typing.get_origin(kind) is Literal:
            flags.DEFINE_enum(field.name, field.default, list(typing.get_args(kind)), "", flag_values=values)
        else:
            need(kind in define, f"Config.{field.name} is a {kind}; a flag is a bool, int, float, str or Literal")
            define[kind](field.name, field.default, "", flag_values=values)
    try:
        leftover = values(["", *arguments])[1:]
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ") + " (--help lists all flags)") from None
    if leftover:
        raise UserError(f"{leftover[0]!r} is not a flag; write --name=value (--help lists all flags)")
    given = {name: values[name].value for name in annotations if values[name].present}
    return given | {name: os.path.expanduser(given[name]) for name in ("run_dir", "resume") if name in given}


class _Whole(flags.IntegerParser):
    """Takes 1e6 too."""

    def convert(self, argument):
        whole = re.fullmatch(r"[\d.]+e\d+", str(argument)) and float(argument).is_integer()
        return super().convert(int(float(argument)) if whole else argument)


def _annotations(config_class) -> dict[str, typing.Any]:
    """What the field of each name holds, and its limits."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _resumed(config_class, given: dict) -> dict:
    """The settings of the run to resume; a flag may repeat them, or ask for more steps or other devices."""
    folder, name = given["resume"], f"total_{clock(config_class)}"
    saved = dataclasses.asdict(load_config(config_class, folder)) | {"resume": folder}
    more = given.get(name, 0) > saved[name]
    faded = more and saved.get("final_lr_fraction", 1) != 1
    rates = f"the learning rates of the run in {folder} fall until step {saved[name]} (final_lr_fraction)"
    need(not faded, f"{rates}, so it cannot go on to {given.get(name)}; start a new run")
    for flag, value in given.items():
        may_differ = flag in ("devices", "processes") or (more and flag == name)
        said = f"--{flag}={value} disagrees with the run in {folder}, which has {saved[flag]}"
        need(value == saved[flag] or may_differ, f"{said}; drop the flag, or start a new run")
    return saved | {"processes": 1} | given


def _kind(annotation) -> tuple[typing.Any, dict]:
    """What a field holds when it is not None, and its limits: 'ge' -> 1 and so on, and 'why' -> their reason."""
    if type(None) in typing.get_args(annotation):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is not Annotated:
        return annotation, {}
    kind, *metadata = typing.get_args(annotation)
    limits = {}
    for limit in metadata:
        limits |= {"why": limit} if isinstance(limit, str) else dataclasses.asdict(limit)
    return kind, {name: limit for name, limit in limits.items() if limit is not None}


def _range(limits: dict) -> str:
    """Limits in words."""
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    why = f", {limits['why']}" if "why" in limits else ""
    if "multiple_of" in limits:
        return f"is {'0 or ' * (low == 0)}a positive multiple of {limits['multiple_of']}"
    if high is None:
        return f"is {'at least' if 'ge' in limits else 'above'} {low}{why}"
    if {"gt", "lt"} <= set(limits):
        return f"lies strictly between {low} and {high}{why}"
    return f"lies in {'[' if 'ge' in limits else '('}{low}, {high}{']' if 'le' in limits else ')'}{why}"


def _check_range(name, annotation, value) -> None:
    _, limits = _kind(annotation)
    hold = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}
    hold["multiple_of"] = lambda value, step: value % step == 0
    if value is None or all(hold[kind](value, limit) for kind, limit in limits.items() if kind in hold):
        need(not isinstance(value, float) or math.isfinite(value), f"{name} is {value}; it is a finite number")
        return
    step = limits.get("multiple_of")
    example = f", e.g. {max(step, round(value / step) * step)}" if step else ""
    raise UserError(f"{name} is {value}; it {_range(limits)}{example}")


def _help(config_class, recipes, description):
    docs, annotations = field_docs(config_class), _annotations(config_class)
    parsed = {pattern: _parse(config_class, recipe.split()) for pattern, recipe in recipes.items()}
    common = [field.name for field in dataclasses.fields(RunConfig)]
    lines = [inspect.cleandoc(description or ""), "", "flags:"]  # none under python -OO
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name in common):
        kind, limits = _kind(annotations[field.name])
        choices = f"One of {', '.join(typing.get_args(kind))}. " if typing.get_origin(kind) is Literal else ""
        limits = f"It {_range(limits)}. " if limits else ""
        default = f"default: {'none' if field.default in (None, '') else field.default}"
        for pattern, recipe in parsed.items():
            if field.name in recipe:
                default += f"; {recipe[field.name]} for {pattern}"
        text = f"{docs[field.name]} {choices}{limits}({default})"
        lines.append(f"  --{field.name}")
        lines.append(textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


# ---- progress -----------------------------------------------------------------------------------------------------


CLEAR = "\r\033[K"
"""What empties the line of a terminal."""


class Progress:
    """One live line: redrawn in place on a terminal, and every few seconds in a log file.

    A thread adds the time that the present activity has taken, so that a long compilation or chunk is seen to be alive.
    """

    def __init__(self):
        self._live = sys.stderr.isatty()
        self._text, self._since, self._printed = "", time.monotonic(), -math.inf
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def show(self, text: str) -> None:
        """Says what is going on now."""
        with self._lock:
            self._text, self._since = text, time.monotonic()
            if self._live or self._since - self._printed > 5:
                self._draw(text)

    def print(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            if self._live:
                say(sys.stderr, CLEAR)
            say(sys.stdout, text + "\n")
            self._text, self._printed = "", -math.inf  # what was going on is done; show at once what comes next

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._live:
                say(sys.stderr, CLEAR)

    def _heartbeat(self):
        while not self._closed.wait(1 if self._live else 30):
            with self._lock:
                seconds = time.monotonic() - self._since
                if self._text and seconds > 1.5:
                    self._draw(f"{self._text} [{seconds:.0f} s]")

    def _draw(self, text):
        self._printed = time.monotonic()
        width = shutil.get_terminal_size().columns
        say(sys.stderr, CLEAR + text[: width - 1] if self._live else text + "\n")


class Silence:
    """The progress of a process for which another one speaks."""

    show = print = close = lambda self, *_: None


# ---- the run folder -----------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """What a run shows of its evaluations: in the terminal, and as its learning curve."""

    what: str
    """What is measured, with its unit."""
    curves: dict[str, str]
    """Metric -> label, first the one that the progress line shows; a run may lack some of them."""


class Program(NamedTuple):
    """A compiled function of all seeds."""

    compiled: jax.stages.Compiled
    output: typing.Any
    """Shapes of what it returns."""
    places: typing.Any = None
    """How its arguments lie on several devices."""

    def __call__(self, *args):
        return self.compiled(*(jax.tree.map(_put, args, self.places) if self.places else args))


class Run:
    """A run folder and the bookkeeping of the loop that fills it.

    Attributes:
      folder: `config.json`, `metrics.csv`, `checkpoints/` and figures lie here.
      seeds: a random key for each seed, shape (num_seeds,).
      steps: step counts of the state that `going` or `end_chunk` saw last, first the clock's.
      stopping: the signal by which Ctrl-C, SIGTERM or SIGHUP asked the loop to end after its chunk; else None.
      compile_seconds: spent compiling so far, over all sessions of the run.
      columns: metrics that have a column in metrics.csv.

    Args:
      config: the script's Config.
      algorithm: its name, a part of the default folder.
      recipes: the script's, as for `configure`.
      scores: what to show of evaluations.
      unsaved: fields of the state that checkpoints leave out; a restored state has None there.
      worlds: vectorised environments or task families, closed at the end. An error that is their failure (of which JAX
        has several kinds) becomes a UserError, and the state before the chunk is saved.
      environments: fields of the state that can be spread over devices by environments -> the axis of those; where
        there is one seed, and the script calls `spread` on its batches.

    Raises:
      UserError: the folder cannot be written, already holds a run, or another process is at work on it.
    """

    def __init__(
        self, config, algorithm: str, recipes: dict[str, str], scores: Scores, unsaved=(), worlds=(), environments=None
    ):
        use_precision(config)
        self._leads = jax.process_index() == 0  # of several processes one writes and speaks
        self._environments, self._clock = environments or {}, clock(config)
        self._mesh = _mesh(config, environments, all(getattr(world, "in_jax", True) for world in worlds))
        self._split = self._mesh and self._mesh.axis_names[0]
        self._step, self._total = self._clock.replace("_steps", " step"), getattr(config, f"total_{self._clock}")
        self.config, self.recipes, self.scores, self._worlds = config, recipes, scores, worlds
        self.stopping, self.compile_seconds, self.steps = None, 0.0, {}
        self.seeds = _seed_keys(config)
        if self._mesh:
            self.seeds = jax.jit(lambda: _seed_keys(config), out_shardings=self._places(self.seeds))()
        self._unsaved, self.columns, self._score, self._sinks = dict.fromkeys(unsaved), [], "", []
        self._unwritten, self._broken, self._latest = "", 0, None
        try:
            if self._leads:
                self.folder = _open_folder(config, algorithm, recipes)
                self._lock = _lock(self.folder)
                try:
                    self._since_last_start = _write_facts(self.folder / "config.json", config, recipes)
                    self._sinks += _sinks(config, self.folder)
                except BaseException:
                    self._end(failed=True)
                    raise
            else:
                self.folder, self._since_last_start = Path(config.resume or config.run_dir), []
        except OSError as error:
            folder = config.resume or config.run_dir or "runs"
            raise UserError(f"cannot write run folder {folder}: {error.strerror}; choose a --run_dir") from None
        self._earlier_seconds, self._started = 0.0, time.monotonic()
        self._first_step = self._last_step = None
        self._saved_at, self._told = None, datetime.timedelta()
        self.progress = Progress() if self._leads else Silence()

    def __enter__(self):
        hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # nohup ignores it
        signals = signal.SIGINT, signal.SIGTERM, *hangup
        self._handlers = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, _, error, traceback):
        if not error:
            self.print(str(self.folder))
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        failures = [world.failure for world in self._worlds if world.failure and isinstance(error, Exception)]
        if failures and self._latest and not any(x.is_deleted() for x in jax.tree.leaves(self._latest)):
            with contextlib.suppress(UserError):  # of a full disk: the failure is the news
                self.save(self._latest)
        self._end(failed=error is not None)
        for world in self._worlds:
            world.close()
        if failures:
            saved = _checkpoints(self.folder)
            go_on = f"; to go on from the last checkpoint: --resume {self.folder}" if saved else ""
            raise UserError(failures[0] + go_on) from None
        full = re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
        if full and isinstance(error, jax.errors.JaxRuntimeError):
            less = "fewer --num_seeds or --num_envs, a smaller batch or replay need less"
            raise UserError(f"out of memory on {device_name()}; {less}") from None
        if self._unwritten and (not error or isinstance(error, SystemExit)):
            raise UserError(f"{self.folder / 'metrics.csv'} lacks its last rows, which could not be written")

    def _end(self, failed):
        """Gives the folder up; a run that failed before its first checkpoint leaves its name free."""
        if not self._leads:
            return
        for sink in self._sinks:
            with contextlib.suppress(Exception):  # of any kind that these packages have
                sink.close()
        if failed and not self.config.resume and not _checkpoints(self.folder):
            for name in ("config.json", "lock"):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                (self.folder / "checkpoints").rmdir()
                self.folder.rmdir()
        self._lock.close()

    def _on_signal(self, number, _):
        if self.stopping and number != signal.SIGHUP:  # which both a shell and the kernel send
            raise KeyboardInterrupt  # asked twice: at once; the last checkpoint stays
        self.stopping = self.stopping or signal.Signals(number)
        with contextlib.suppress(OSError):  # not through self.progress, whose lock the main thread may hold
            os.write(2, b"\nstopping after this compilation or chunk; once more to stop at once\n")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def print(self, text: str) -> None:
        """A line that stays."""
        self.progress.print(text)

    def draw(self, what: str, function, *args, **kwargs) -> None:
        """Calls a function that draws a picture and returns its path. One that cannot be written does not end a run."""
        if not self._leads:
            return
        self.progress.show(f"drawing the {what}")
        try:
            path = function(*args, **kwargs)
        except OSError as error:
            path = f"warning: not drawn: {error}"
        self.print(f"{what:15} {path}")

    # -- before the loop

    def over_seeds(self, function, donate: bool = False):
        """A function of one seed, jitted and batched over a leading axis of seeds.

        One seed skips `vmap`, under which `lax.cond` would compute both of its branches. With `donate`, the first
        argument's memory is reused for the result: a replay is never copied. Of several devices each computes its
        share of the seeds, and nothing passes between them.
        """
        function = over_seeds(self.config.num_seeds // (self._mesh.size if self._split == "seeds" else 1), function)
        if self._split == "seeds":
            split = jax.P("seeds")
            function = jax.shard_map(function, mesh=self._mesh, in_specs=split, out_specs=split, check_vma=False)
        return jax.jit(function, donate_argnums=(0,) if donate else ())

    def _places(self, tree, name: str = ""):
        """How arrays with a leading axis of seeds lie on several devices: by seeds; of one seed, by environments those
        that have such an axis, and the rest on each device."""
        if hasattr(tree, "_asdict") and not name:
            return tree._replace(**{field: self._places(value, field) for field, value in tree._asdict().items()})
        if type(tree) is tuple and not name:
            return tuple(map(self._places, tree))
        axis = 0 if self._split == "seeds" else 1 + self._environments.get(name, math.inf)
        spec = lambda x: jax.P(*[None] * axis, self._split) if axis < x.ndim else jax.P()
        return jax.tree.map(lambda x: jax.NamedSharding(self._mesh, spec(x)), tree)

    def compile(self, name: str, function, *shapes, donate: bool = False) -> Program:
        """Compiles a function of one seed for arguments of all seeds.

        A dict among its results holds metrics; their names become columns of metrics.csv.
        """
        jitted, places = self.over_seeds(function, donate), None
        if self._mesh:
            places = self._places(shapes)
            with jax.set_mesh(self._mesh):
                out = self._places(jax.eval_shape(jitted, *shapes))
                options = {"in_shardings": places, "out_shardings": out, "donate_argnums": (0,) if donate else ()}
                program = self.compile_jitted(name, jax.jit(jitted, **options), *shapes)
        else:
            program = self.compile_jitted(name, jitted, *shapes)
        program = program._replace(places=places)
        for result in program.output if type(program.output) is tuple else [program.output]:
            self.columns += result if isinstance(result, dict) else []
        return program

    def compile_jitted(self, name: str, jitted, *shapes) -> Program:
        """Compiles a jitted function as it is; prints how long that took and its memory."""
        self.exit_if_stopping()
        self.progress.show(f"compiling {name}")
        start = time.monotonic()
        lowered = jitted.lower(*shapes)
        compiled = lowered.compile()
        seconds = time.monotonic() - start
        self.compile_seconds += seconds
        memory = compiled.memory_analysis()
        held, temporary = (getattr(memory, f"{kind}_size_in_bytes", 0) / 1e6 for kind in ("argument", "temp"))
        self.print(f"compiled {name} in {seconds:.1f} s; memory {held:.0f} MB held, {temporary:.0f} MB temporary")
        return Program(compiled, lowered.out_info)

    def describe(self, *lines: str, **networks) -> None:
        """The start-up report: folder, recipe, these lines, parameters of the networks of one seed, device."""
        config = self.config
        self.print(f"run folder {self.folder}")
        for line in self._since_last_start:
            self.print(line)
        house, script = (Path(path).resolve().parent.parent for path in (__file__, _script(config)))
        if house != script:
            self.print(f"envs/ and shared/ are those of {house}, not of {script}: run 'pip install -e .' there")
        recipe = recipe_for(type(config), config.env, self.recipes, dataclasses.asdict(config))
        if recipe:
            self.print(f"recipe for {config.env}: " + " ".join(f"--{k}={getattr(config, k)}" for k in recipe))
        for line in lines:
            self.print(line)
        for name, network in networks.items():
            if parameters := count_parameters(network) // config.num_seeds:
                self.print(f"{name:12s} {parameters:,} parameters")
        precision = jax.config.jax_default_matmul_precision or "default"
        over = f"; {self._split} over {self._mesh.size} devices" if self._mesh else ""
        self.print(f"device {device_name()}; matmul precision {precision}; {config.num_seeds} seed(s){over}")

    def restore(self, like):
        """Loads the newest checkpoint that is intact, and cuts metrics.csv back to it.

        Args:
          like: a state, or the shapes of one.

        Returns:
          The state; None if the run is new, or had not saved any yet.

        Raises:
          UserError: every checkpoint is damaged, or an intact one holds other arrays; nothing was changed then.
        """
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like._replace(**self._unsaved)))
        self.print(f"a checkpoint takes {size / 1e6:,.0f} MB; the last {CHECKPOINTS_KEPT} are kept")
        if not self.config.resume:
            return None
        paths = _checkpoints(self.folder)
        for path in paths:
            with path.open("rb") as file:
                header = _intact_header(file)
                if header is None:
                    self.print(f"checkpoint {path} is damaged; falling back to the one before it")
                    continue
                state = _read_state(file, like._replace(**self._unsaved))
            for damaged in paths[: paths.index(path)] if self._leads else ():
                damaged.replace(damaged.with_suffix(".damaged"))
            self._earlier_seconds = header["seconds"]
            self.compile_seconds += header["compile_seconds"]
            self.steps, self._saved_at = header["steps"], header["steps"][self._clock]
            self._cut_metrics(self._saved_at)
            self.print(f"resumed from {path}")
            return state
        need(not paths, f"no checkpoint in {self.folder / 'checkpoints'} is intact; start a new run")
        self.print("the run had not saved a checkpoint yet: starting from the beginning")
        self._cut_metrics(-1)
        return None

    # -- the loop

    def repeat(self, what: str, times: int, program, state):
        """Runs a program on the state so many times, and says what that is for."""
        for _ in range(times):
            self.progress.show(what)
            self.exit_if_stopping()
            state = program(state)
        return state

    def going(self, state) -> bool:
        """Whether there is another chunk to do. After Ctrl-C, SIGTERM or SIGHUP: saves, says how to go on, exits."""
        self._latest, self.steps = state, _count(state)
        if self._first_step is None:  # after all compilation: speed is counted from here
            self._first_step = self._last_step = (self.steps[self._clock], self.seconds)
            if self._saved_at is None:
                self.save(state)
        if jax.process_count() > 1:  # asked one, asked all
            asked = multihost_utils.process_allgather(np.array(self.stopping or 0)).max()
            self.stopping = signal.Signals(asked) if asked else None
        if self.stopping:
            self.save(state)
            self.exit_if_stopping()
        return self.steps[self._clock] < self._total

    def exit_if_stopping(self) -> None:
        """After Ctrl-C, SIGTERM or SIGHUP: says how to go on, and exits. What was not saved before is lost."""
        if self.stopping:
            number = self.stopping
            if _checkpoints(self.folder):
                command = _typed(self.config, "--resume", str(self.folder))
                self.print(f"{number.name}: stopped at {self._step} {self.steps[self._clock]:,}. To go on: {command}")
                self.print(str(self.folder))
            else:
                self.print(f"{number.name}: stopped before the first gradient step; nothing was kept")
            sys.exit(128 + number)

    def evaluates(self, state) -> bool:
        """Whether an evaluation is due after the chunk that led to this state."""
        return self._due(self.config.eval_every, self.steps, _count(state))

    def evaluation_keys(self, state) -> Key[jax.Array, " num_seeds"]:
        """Keys for an evaluation. Nothing else draws from them, so that more or fewer evaluations change nothing else.

        They stem from the last of four parts of the seed's key; `init` must leave that alone.
        """
        *_, gradient_steps = _count(state).values()
        return jax.vmap(lambda key: jax.random.fold_in(evaluation_key(key), gradient_steps))(self.seeds)

    def end_chunk(self, state, metrics: dict) -> None:
        """Checks that all is finite, writes metrics.csv, shows the progress, and saves a checkpoint where one is due.

        Args:
          state: after the chunk.
          metrics: name -> values of shape (num_seeds,), or (num_seeds, gradient steps), of which the mean is kept; or
            two such values, a sum and a count, whose quotient is the metric.

        Raises:
          UserError: a metric `train/...loss` or a parameter of `state.agent` is NaN or infinite.
        """
        before, self.steps, metrics = self.steps, _count(state), whole(metrics)
        with np.errstate(invalid="ignore"):  # 0 / 0 is unknown: NaN
            metrics = {name: np.divide(*x) if type(x) is tuple else np.asarray(x) for name, x in metrics.items()}
        self._check_finite(before, state, metrics)
        metrics = {name: x.mean(axis=1) if x.ndim > 1 else x for name, x in metrics.items()}
        broken = metrics.get("train/broken_steps", np.zeros(1)).sum()
        if broken > self._broken:
            where = f"{broken:.0f} steps until env step {self.steps[self._clock]:,} (not finite)"
            self.print(f"the simulator of {self.config.env} failed in {where}; nothing is learned from them")
            self._broken = broken
        self._write_row(metrics)
        shown = [f"{label} {metrics[name].mean():.4g}" for name, label in self.scores.curves.items() if name in metrics]
        if any(name.startswith("eval/") for name in metrics):
            self._score = shown[0]
            self.print(f"{self._step}s {self.steps[self._clock]:>11,}  {self.scores.what}: {'; '.join(shown)}")
        self._show_progress()
        if self._due(self.config.checkpoint_every, before, self.steps):
            try:
                self.save(state)
            except UserError as error:
                need(self.steps[self._clock] < self._total, str(error))
                self.print(f"warning: {error}")

    def _due(self, every, before, after):
        """Whether a chunk reached or crossed a multiple of `every` environment steps, or ended the run."""
        before, after = before[self._clock], after[self._clock]
        return after >= self._total or after // every > before // every

    def _check_finite(self, before, state, metrics):
        losses = {name: x.reshape(len(x), -1) for name, x in metrics.items() if re.fullmatch("train/.*loss", name)}
        gradient_step = list(before.values())[-1]
        bad = [(*np.argwhere(~np.isfinite(x.T))[0], name) for name, x in losses.items() if not np.isfinite(x).all()]
        if bad:
            step, seed, name = min(bad)
            many = losses[name].shape[1]
            last = gradient_step + (step + 1) * (list(self.steps.values())[-1] - gradient_step) // many
            where = f"gradient step {last}" if many > 1 else f"{self._step} {self.steps[self._clock]}"
            what = f"{name} is {losses[name][seed, step]} at {where} of seed {self.config.seed + seed}"
        elif not all_finite(state.agent):
            what = f"a parameter is not finite after gradient step {list(self.steps.values())[-1]}"
        else:
            return
        raise UserError(f"{what}; training stopped, the last good checkpoint is kept. Try lower learning rates anew")

    def _write_row(self, metrics):
        if not self._leads:
            self._last_step = self.steps[self._clock], self.seconds
            return
        now, last = (self.steps[self._clock], self.seconds), self._last_step
        self._last_step = now
        times = (self.seconds, self.compile_seconds, (now[0] - last[0]) / (now[1] - last[1]))
        names = "seconds", "compile_seconds", f"{self._clock}_per_second"
        head = self.steps | {name: f"{time:.3f}" for name, time in zip(names, times)}
        path, text = self.folder / "metrics.csv", io.StringIO()
        size = path.stat().st_size if path.exists() else 0
        writer = csv.DictWriter(text, ["seed", *head, *self.columns], lineterminator="\n")
        if not size and not self._unwritten:
            writer.writeheader()
        for i in range(self.config.num_seeds):
            row = {name: f"{float(values[i]):.9g}" for name, values in metrics.items()}
            writer.writerow({"seed": self.config.seed + i, **head, **row})
        self._unwritten += text.getvalue()
        try:
            with path.open("a") as file:
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            self.print(f"warning: cannot write {path}: {error}; these rows come with the next")
        means = {name: float(np.mean(x)) for name, x in metrics.items() if np.isfinite(x).all()}
        for sink in list(self._sinks):
            try:
                sink.write(self.steps[self._clock], means)
            except Exception as error:  # of any kind that these packages have
                self._sinks.remove(sink)
                self.print(f"warning: {sink.name} failed, and the run goes on without it: {error!r}")

    def _show_progress(self):
        """How far, how fast, how long to go, how well."""
        total, done = self._total, self.steps[self._clock]
        rate = (self._last_step[0] - self._first_step[0]) / (self._last_step[1] - self._first_step[1])
        left, whole = (datetime.timedelta(seconds=int(max(total - x, 0) / rate)) for x in (done, self._first_step[0]))
        if left.total_seconds() > 10 and not self._told / 1.5 <= whole <= self._told * 1.5:
            self.print(f"about {left} to go")
            self._told = whole
        text = f"{done:,} of {total:,} {self._step}s  {rate:,.0f} steps/s  {left} left  {self._score}"
        self.progress.show(text.rstrip())

    def save(self, state) -> None:
        """Writes a checkpoint: a JSON line with the steps, times and a checksum, then the leaves of the state.

        It is complete or absent: written under another name, flushed to the disk and renamed. The last two are kept.
        """
        steps = _count(state)
        if self._saved_at == steps[self._clock]:
            return
        state = jax.tree.map(_plain, whole(state._replace(**self._unsaved)))
        if not self._leads:
            self._saved_at = steps[self._clock]
            return
        header = {"steps": steps, "seconds": self.seconds, "compile_seconds": self.compile_seconds, "sha256": "0" * 64}
        path = self.folder / "checkpoints" / f"{steps[self._clock]:012d}.eqx"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("w+b") as file:
                file.write(json.dumps(header).encode() + b"\n")
                eqx.tree_serialise_leaves(file, state)
                header["sha256"] = _header_and_checksum(file)[1]
                file.seek(0)
                file.write(json.dumps(header).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write checkpoint {path}: {error}; make room and go on with --resume") from None
        self._saved_at = steps[self._clock]
        for old in _checkpoints(self.folder)[CHECKPOINTS_KEPT:]:
            old.unlink()

    def _cut_metrics(self, steps):
        if not self._leads:
            return
        path = self.folder / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if not lines or not lines[0].endswith("\n"):  # killed while the header was written
            path.unlink(missing_ok=True)
            return
        header, *rows = lines
        column = header.rstrip().split(",").index(self._clock)
        whole = [row for row in rows if row.count(",") == header.count(",") and row.endswith("\n")]
        kept = [row for row in whole if int(row.split(",")[column]) <= steps]
        _write_atomically(path, "".join([header, *kept]).encode())


# ---- what else reads runs -----------------------------------------------------------------------------------------


def load_agent(make_agent, folder, config, seed: int | None = None):
    """The networks of one seed from the newest intact checkpoint of a run, which may be going on. Only reads.

    Args:
      make_agent: random key -> the networks, for their shapes.
      seed: one of the run's seeds; by default its first.

    Raises:
      UserError: the run has no such seed or no intact checkpoint, or another version of the script made it.
    """
    index = 0 if seed is None else seed - config.seed
    there = f"{folder} has {config.num_seeds} seed(s) from {config.seed} on"
    need(0 <= index < config.num_seeds, f"seed is {seed}; {there}")
    like = jax.eval_shape(jax.vmap(make_agent), _seed_keys(config))
    for path in _checkpoints(folder):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # a run deletes its older ones
            if _intact_header(file):
                return one_seed(_read_state(file, like), index)
    raise UserError(f"{folder} has no intact checkpoint; a run saves its first before its first gradient step")


def evaluation_key(key: Key[jax.Array, ""]) -> Key[jax.Array, ""]:
    """The part of a seed's key that only evaluations and pictures draw from."""
    return jax.random.split(key, 4)[3]


def read_metrics(folder) -> dict[str, np.ndarray]:
    """metrics.csv as float columns; blank entries are NaN."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def over_seeds(num_seeds: int, function):
    """Batches a function of one seed over a leading axis of seeds; see `Run.over_seeds`."""
    if num_seeds > 1:
        return jax.vmap(function)
    return lambda *args: jax.tree.map(lambda x: x[None], function(*one_seed(args)))


def one_seed(tree, i: int = 0):
    """Of arrays with a leading axis of seeds, those of the i-th; on one device."""
    spread = lambda x: not isinstance(x, jax.core.Tracer) and len(x.devices()) > 1
    here = lambda x: jax.device_put(x, jax.local_devices()[0])
    return jax.tree.map(lambda x: here(whole(x)[i]) if spread(x) else x[i], tree)


def whole(tree):
    """Arrays that are spread over several processes, each whole in this one; all call this at the same time."""

    def gather(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if _is_key(x):
            return jax.random.wrap_key_data(gather(jax.random.key_data(x)))
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gather, tree)


def use_precision(config) -> None:
    """Lets a config's matmul_precision hold from here on, if it has one."""
    if config.matmul_precision:
        jax.config.update("jax_default_matmul_precision", config.matmul_precision)


def device_name() -> str:
    device = jax.devices()[0]
    cores = f" ({os.cpu_count()} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, jax {jax.__version__}"


def commit(script: str | Path | None = None) -> str:
    """The commit of this checkout, with '+changes' if tracked files differ from it or a script is not one of them;
    'unknown' outside of git.

    Pages and what lies in results/ do not count: one measurement rewrites them before the next begins.
    """
    git = functools.partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    paths = ":(top)", ":(top,exclude)*.md", ":(top,exclude)results"
    try:
        head = git(["git", "rev-parse", "HEAD"], check=True).stdout.strip()
        changes = git(["git", "status", "--porcelain", "--untracked=no", *paths], check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    tracked = script is None or git(["git", "ls-files", "--error-unmatch", Path(script).resolve()]).returncode == 0
    return head if tracked and not changes else f"{head}+changes"


# ---- helpers ------------------------------------------------------------------------------------------------------


def _mesh(config, environments, in_jax: bool) -> jax.sharding.Mesh | None:
    """The devices that seeds, or the environments of one seed, are spread over; None where it is one, as for worlds
    outside of JAX. UserError if there are not so many as were asked for, or they do not divide them."""
    split = "environments" if config.num_seeds == 1 and environments else "seeds"
    there, parts = len(jax.devices()) if in_jax else 1, config.num_envs if split == "environments" else config.num_seeds
    fit = [number for number in range(1, there + 1) if parts % number == 0]
    number = config.devices or fit[-1]
    need(number <= there, f"devices is {number}; {config.env} can have {there} here")
    if config.processes > 1:
        need(parts % there == 0, f"{there} devices of {config.processes} processes do not divide the {parts} {split}")
        number = there
    nearest = min(fit, key=lambda each: abs(each - number))
    need(number in fit, f"devices is {number}, which does not divide the {parts} {split}; the nearest is {nearest}")
    return jax.make_mesh((number,), (split,), (jax.sharding.AxisType.Auto,)) if number > 1 else None


def spread(batch):
    """A batch inside of a program whose environments are spread over devices: so are its rows. Else as it is."""
    on_devices = "environments" in jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(batch, jax.P("environments")) if on_devices else batch


def _seed_keys(config):
    return jax.vmap(jax.random.key)(config.seed + jnp.arange(config.num_seeds))


@jax.jit
def all_finite(tree) -> jax.Array:
    """Whether no number in a PyTree of arrays is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _count(state) -> dict[str, int]:
    """The step counts of a state, which are those of each of its seeds."""
    counts = {name: value for name, value in state._asdict().items() if name.endswith("_steps")}
    return {name: int(np.asarray(value)[0]) for name, value in whole(counts).items()}


def _open_folder(config, algorithm, recipes) -> Path:
    """The folder of a run, a new one under a name that no other run has."""
    folder = Path(config.resume or config.run_dir)
    if not (config.resume or config.run_dir):
        told = [f"{name}={value}" for name, value in _changed(config, recipes).items() if name not in UNTOLD]
        told = re.sub(r"[^\w.=+-]", "_", "".join(f"{setting}-" for setting in told))
        told = re.match(r"(.{0,150}-)?", told)[0]
        wanted = Path("runs", algorithm, config.env, f"{told}seed={config.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
        wanted.parent.mkdir(parents=True, exist_ok=True)
        for folder in itertools.chain([wanted], (Path(f"{wanted}-{i}") for i in itertools.count(2))):
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    elif not config.resume and ((folder / "config.json").exists() or _checkpoints(folder)):
        raise UserError(f"{folder} already holds a run; go on with --resume {folder}, or name another")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


def _lock(folder):
    """Keeps other processes from working on a folder, until the file that it returns is closed or the process ends."""
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work on {folder}; wait until it ends, or start another run") from None
    except OSError:
        pass  # a file system without locks
    return file


def _write_facts(path, config, recipes) -> list[str]:
    """Writes config.json: how the run was made, and how each time it was gone on with. Returns what differs from the
    last time."""
    now, differs = _facts(config, recipes), []
    facts = {"config": _settings(config), **now, "id": secrets.token_hex(8)}
    if config.resume:
        facts = json.loads(path.read_text())
        facts |= {"config": _settings(config), "resumed": [*facts.get("resumed", []), now]}
        last = [facts, *facts["resumed"]][-2]
        old, new = ({"commit": x["commit"], "device": x["device"], **x["versions"]} for x in (last, now))
        differs = [f"{key} was {old.get(key)} before, and is {new[key]}" for key in new if old.get(key) != new[key]]
    _write_atomically(path, json.dumps(facts, indent=2).encode())
    return differs


def _settings(config):
    return {**dataclasses.asdict(config), "resume": ""}


def _changed(config, recipes):
    """The settings that differ from those in force without a flag, the environment aside."""
    recipe = recipe_for(type(config), config.env, recipes, dataclasses.asdict(config))
    usual = type(config)(**recipe | {"env": config.env})
    return {name: value for name, value in _settings(config).items() if value != getattr(usual, name)}


def _script(config):
    """The file of the script that a Config belongs to."""
    return getattr(sys.modules[type(config).__module__], "__file__", sys.argv[0])


def _typed(config, *arguments):
    """A command of the script, as one can type it here."""
    here = lambda path: path if (relative := os.path.relpath(path)).startswith("..") else relative
    python = "python" if shutil.which("python") == sys.executable else here(sys.executable)
    return shlex.join([python, here(_script(config)), *arguments])


def _facts(config, recipes):
    version = lambda name: next((each.version for each in importlib.metadata.distributions(name=name)), None)
    arguments = sys.argv[1:]
    if Path(sys.argv[0]).resolve() != Path(_script(config)).resolve():  # a notebook's call of main
        told = {"resume": config.resume} if config.resume else {"env": config.env, **_changed(config, recipes)}
        arguments = [f"--{name}={value}" for name, value in told.items()]
    return {
        "command": _typed(config, *arguments),
        "commit": commit(_script(config)),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": device_name(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _put(x, place):
    """An array where it is wanted; as it is, if it is there."""
    if x.sharding.is_equivalent_to(place, x.ndim):
        return x
    if _is_key(x):
        return jax.random.wrap_key_data(jax.device_put(jax.random.key_data(x), place))
    return jax.device_put(x, place)


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    """A PRNG key as its raw numbers, which can be written to a file."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _checkpoints(folder):
    """The checkpoints in a run folder, the newest first."""
    return sorted((Path(folder) / "checkpoints").glob("*.eqx"), reverse=True)


def _header_and_checksum(file):
    """A checkpoint's header, and the checksum of all but the checksum that stands there."""
    file.seek(0)
    header = json.loads(file.readline())
    checksum = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}).encode())
    while block := file.read(1 << 20):
        checksum.update(block)
    return header, checksum.hexdigest()


def _intact_header(file):
    """A checkpoint's header, or None if its checksum does not fit."""
    try:
        header, checksum = _header_and_checksum(file)
        return header if checksum == header["sha256"] else None
    except (ValueError, KeyError, AttributeError):
        return None


def _read_state(file, like):
    """The leaves of a checkpoint, or its first ones; UserError if they are other arrays than those of `like`."""
    file.seek(0)
    file.readline()
    try:
        plain = eqx.tree_deserialise_leaves(file, jax.eval_shape(lambda tree: jax.tree.map(_plain, tree), like))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file.name} does not fit this version of the script: {reason}") from None
    return jax.tree.map(lambda raw, shape: jax.random.wrap_key_data(raw) if _is_key(shape) else raw, plain, like)


def _write_atomically(path, data):
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


class _TensorBoard:
    name = "tensorboard"

    def __init__(self, config, folder):
        from tensorboardX import SummaryWriter

        self._make, self._writer = functools.partial(SummaryWriter, str(folder)), None

    def write(self, step, metrics):
        # a resumed run repeats what it had written after its checkpoint
        self._writer = self._writer or self._make(purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        if self._writer:
            self._writer.close()


class _Wandb:
    name = "wandb"

    def __init__(self, config, folder):
        import wandb

        os.environ.setdefault("WANDB_PROJECT", "cleancrl")
        facts = json.loads((folder / "config.json").read_text())
        self._run = wandb.init(dir=str(folder), config=facts["config"], id=facts.get("id"), resume="allow")

    def write(self, step, metrics):
        self._run.log(metrics, step=step)

    def close(self):
        self._run.finish()


def _sinks(config, folder):
    for wanted, sink in ((config.tensorboard, _TensorBoard), (config.wandb, _Wandb)):
        if wanted:
            try:
                yield sink(config, folder)
            except Exception as error:  # of any kind that these packages have
                missing = f"needs packages that are missing: pip install -e '.[{sink.name}]'"
                what = missing if isinstance(error, ImportError) else f"failed: {error!r}"
                raise UserError(f"--{sink.name} {what}") from None
