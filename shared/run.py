"""Everything of a run that is not the algorithm: flags, run folder, progress, checkpoints, learning curve.

This is the only file that knows about disks and terminals; a fork may delete it and lose no algorithm.
"""

import ast
import csv
import dataclasses
import fnmatch
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "optax",
    "ott-jax",
    "brax",
    "mujoco",
    "mujoco-mjx",
    "craftax",
    "crafter",
    "numpy",
)
CHECKPOINTS_KEPT = 2
TIMING_COLUMNS = ("seconds", "compile_seconds", "env_steps_per_second")
"""The columns of metrics.csv that differ between two runs of one command on one machine."""


class UserError(Exception):
    """Something the user can mend; the message is one line that says what is wrong and what would be right."""


def command(main):
    """Makes `main(argv=None)` a command: a UserError is one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped


# ---- flags --------------------------------------------------------------------------------------------------------


def field_docs(config_class) -> dict[str, str]:
    """The docstring under each field of a dataclass, which Python itself throws away."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    docs = {}
    for field, doc in zip(tree.body, tree.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[field.target.id] = inspect.cleandoc(doc.value.value).replace("\n", " ")
    return docs


def configure(config_class, recipes: dict[str, dict], description: str, argv: list[str] | None = None):
    """Builds a Config from the command line.

    Defaults are the dataclass's; on them come the recipes whose pattern matches `--env`, then the flags given. With
    `--resume`, everything comes from that run's config.json and a flag may only repeat it. `--help` prints and exits.

    Args:
      config_class: a dataclass with fields `env` and `resume` and a docstring under each field.
      recipes: pattern of environment names -> field values.
      description: what `--help` says first.
      argv: the command line, program first; by default the process's.

    Raises:
      UserError: an unknown flag, a bad value, a leftover argument, or a run folder that does not fit.
    """
    argv = sys.argv if argv is None else argv
    docs, values = field_docs(config_class), flags.FlagValues()
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name, field in fields.items():
        _define(field, docs[name], values)
    if {"-h", "--help", "-help"} & set(argv[1:]):
        print(_help(description, fields, docs, recipes))
        sys.exit(0)
    try:
        leftover = values(argv)[1:]
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ") + " (--help lists all flags)") from None
    if leftover:
        raise UserError(f"{leftover[0]!r} is not a flag; write --name=value (--help lists all flags)")
    given = {name: values[name].value for name in fields if values[name].present}
    if given.get("resume"):
        saved = _saved_config(given["resume"], fields)
        for name, value in given.items():
            if name != "resume" and value != saved[name]:
                raise UserError(
                    f"--{name}={value} disagrees with the run in {given['resume']}, which has {saved[name]}; "
                    "drop the flag, or start a new run"
                )
        return config_class(**{**saved, "resume": given["resume"]})
    return config_class(**{**recipe_for(given.get("env", fields["env"].default), recipes), **given})


def recipe_for(env: str, recipes: dict[str, dict]) -> dict:
    """The settings of all patterns that match an environment's name, later ones over earlier ones."""
    return {k: v for pattern, recipe in recipes.items() if fnmatch.fnmatch(env, pattern) for k, v in recipe.items()}


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


def _define(field, doc, values):
    kind, options = field.type, {"flag_values": values}
    if typing.get_origin(kind) is typing.Literal:
        flags.DEFINE_enum(field.name, field.default, list(typing.get_args(kind)), doc, **options)
        return
    kind = next(k for k in (bool, int, float, str) if k in (kind, *typing.get_args(kind)))
    define = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }[kind]
    define(field.name, field.default, doc, **options)


def _help(description, fields, docs, recipes):
    lines = [inspect.cleandoc(description), "", "flags:"]
    for name, field in fields.items():
        choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
        default = f"default: {'none' if field.default in (None, '') else field.default}"
        for pattern, recipe in recipes.items():
            if name in recipe:
                default += f"; {recipe[name]} for {pattern}"
        text = f"{docs[name]} {'One of ' + ', '.join(choices) + '. ' if choices else ''}({default})"
        lines.append(f"  --{name}")
        lines.append(textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _saved_config(folder, fields):
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not a run folder: it has no readable config.json") from None
    if set(saved) != set(fields):
        odd = ", ".join(sorted(set(saved) ^ set(fields)))
        raise UserError(f"{folder} was made by another version of this script (fields {odd}); resume it with that one")
    return saved


# ---- progress -----------------------------------------------------------------------------------------------------


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
                sys.stderr.write("\r\033[K")
                sys.stderr.flush()
            print(text, flush=True)
            self._text, self._printed = "", -math.inf  # what was going on is done; show at once what comes next

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            if self._live:
                sys.stderr.write("\r\033[K")

    def _heartbeat(self):
        while not self._closed.wait(1 if self._live else 30):
            with self._lock:
                seconds = time.monotonic() - self._since
                if self._text and seconds > 1.5:
                    self._draw(f"{self._text} [{seconds:.0f} s]")

    def _draw(self, text):
        self._printed = time.monotonic()
        if self._live:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
            sys.stderr.write("\r\033[K" + text[: width - 1])
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


# ---- the run folder -----------------------------------------------------------------------------------------------


class Run:
    """A run folder and the bookkeeping of the loop that fills it.

    Attributes:
      folder: `config.json`, `metrics.csv`, `checkpoints/` and figures lie here.
      resumed: whether it existed before.
      stopping: Ctrl-C or SIGTERM asked the loop to end after its chunk.
      compile_seconds: spent in `compile` so far, over all sessions of the run.

    Args:
      config: the script's Config.
      algorithm: its name, a part of the default folder.

    Raises:
      UserError: the folder cannot be written, or already holds a run.
    """

    def __init__(self, config, algorithm: str):
        self.config, self.resumed, self.stopping, self.compile_seconds = config, bool(config.resume), None, 0.0
        name = f"{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(config.resume or config.run_dir or Path("runs", algorithm, config.env, name))
        config_file = self.folder / "config.json"
        try:
            if not self.resumed and config_file.exists():
                raise UserError(
                    f"{self.folder} already holds a run; go on with --resume {self.folder}, or name another"
                )
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._sinks = list(_sinks(config, self.folder))
            if self.resumed:
                os.utime(self.folder / "checkpoints")
            else:
                _write_atomically(config_file, json.dumps(_facts(config), indent=2).encode())
        except OSError as error:
            raise UserError(f"cannot write run folder {self.folder}: {error.strerror}; choose a --run_dir") from None
        self._earlier_seconds, self._started = 0.0, time.monotonic()
        self._first_step = self._last_step = (0, 0.0)
        self.progress = Progress()

    def __enter__(self):
        self._handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.progress.close()
        for sink in self._sinks:
            sink.close()

    def _on_signal(self, number, _):
        if self.stopping:
            raise KeyboardInterrupt  # asked twice: at once; the last checkpoint stays
        self.stopping = signal.Signals(number)
        # not through self.progress, whose lock the main thread may hold
        os.write(2, b"\nstopping after this chunk; once more to stop at once\n")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def print(self, text: str) -> None:
        self.progress.print(text)

    def compile(self, name: str, function, *args):
        """Compiles a jitted function for these arguments; prints how long that took and what memory it will use."""
        self.progress.show(f"compiling {name}")
        start = time.monotonic()
        compiled = function.lower(*args).compile()
        seconds = time.monotonic() - start
        self.compile_seconds += seconds
        memory = compiled.memory_analysis()
        held, temporary = (getattr(memory, f"{kind}_size_in_bytes", 0) / 1e6 for kind in ("argument", "temp"))
        self.print(f"compiled {name} in {seconds:.1f} s; memory {held:.0f} MB held, {temporary:.0f} MB temporary")
        return compiled

    # -- metrics

    def log(self, steps: dict[str, int], metrics: dict[str, np.ndarray], columns: list[str]) -> None:
        """Writes one row per seed to metrics.csv.

        Args:
          steps: step counts, the first of them `env_steps`.
          metrics: name -> array of shape (num_seeds,); what is missing of `columns` is left blank.
          columns: all metrics that this script ever logs.
        """
        now, before = (steps["env_steps"], self.seconds), self._last_step
        rate = (now[0] - before[0]) / (now[1] - before[1])
        self._last_step = now
        head = {**steps, **dict(zip(TIMING_COLUMNS, (self.seconds, self.compile_seconds, rate)))}
        path = self.folder / "metrics.csv"
        new = not path.exists() or not path.stat().st_size
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, ["seed", *head, *columns])
            if new:
                writer.writeheader()
            for i in range(self.config.num_seeds):
                row = {name: f"{float(values[i]):.9g}" for name, values in metrics.items()}
                row |= {k: v if isinstance(v, int) else f"{v:.3f}" for k, v in head.items()}
                writer.writerow({"seed": self.config.seed + i, **row})
        for sink in self._sinks:
            sink.write(steps["env_steps"], {k: float(np.mean(v)) for k, v in metrics.items()})

    def due(self, every: int, before: dict[str, int], after: dict[str, int]) -> bool:
        """Whether a chunk reached or crossed a multiple of `every` environment steps, or ended the run."""
        done = after["env_steps"] >= self.config.total_env_steps
        return done or after["env_steps"] // every > before["env_steps"] // every

    def show(self, env_steps: int, score: str) -> None:
        """The progress line: how far, how fast, how long to go, how well."""
        total = self.config.total_env_steps
        rate = (self._last_step[0] - self._first_step[0]) / (self._last_step[1] - self._first_step[1])
        left = _clock((total - env_steps) / rate)
        text = f"{_short(env_steps)} of {_short(total)} env steps  {rate:,.0f} steps/s  {left} left"
        self.progress.show(f"{text}  {score}".rstrip())

    def start_clock(self, env_steps: int) -> None:
        """Call before the first chunk: speed is counted from here, after all compilation."""
        self._first_step = self._last_step = (env_steps, self.seconds)

    # -- checkpoints

    def save(self, state, steps: dict[str, int]) -> None:
        """Writes a checkpoint: a JSON line with the steps, times and a checksum, then the leaves of `state`.

        It is complete or absent: written under another name, flushed to the disk and renamed. The last two are kept.
        """
        header = {"steps": steps, "seconds": self.seconds, "compile_seconds": self.compile_seconds, "sha256": "0" * 64}
        path = self.folder / "checkpoints" / f"{steps['env_steps']:012d}.eqx"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                hashing = _Hashing(file, header)
                eqx.tree_serialise_leaves(hashing, jax.tree.map(_plain, state))
                file.seek(0)
                file.write(json.dumps({**header, "sha256": hashing.digest()}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write checkpoint {path}: {error}; make room and go on with --resume") from None
        for old in self._checkpoints()[CHECKPOINTS_KEPT:]:
            old.unlink()

    def restore(self, like):
        """Loads the newest checkpoint that is intact, and cuts metrics.csv back to it.

        Args:
          like: PyTree of arrays or `jax.ShapeDtypeStruct` shaped like the saved one.

        Returns:
          The state and its step counts, or (None, None) if the run had not saved any yet.

        Raises:
          UserError: every checkpoint is damaged, or an intact one holds other arrays; nothing was changed then.
        """
        paths = self._checkpoints()
        for path in paths:
            header = _intact_header(path)
            if header is None:
                self.print(f"checkpoint {path} is damaged; falling back to the one before it")
                continue
            try:
                state = _read_state(path, like)
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} does not fit this version of the script: {reason}") from None
            for damaged in paths[: paths.index(path)]:
                damaged.replace(damaged.with_suffix(".damaged"))
            self._earlier_seconds = header["seconds"]
            self.compile_seconds += header["compile_seconds"]
            self._cut_metrics(header["steps"]["env_steps"])
            self.print(f"resumed from {path}")
            return state, header["steps"]
        if paths:
            raise UserError(f"no checkpoint in {self.folder / 'checkpoints'} is intact; start a new run")
        self.print("the run had not saved a checkpoint yet: starting from the beginning")
        self._cut_metrics(-1)
        return None, None

    def _checkpoints(self):
        return sorted((self.folder / "checkpoints").glob("*.eqx"), reverse=True)

    def _cut_metrics(self, env_steps):
        path = self.folder / "metrics.csv"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if not lines or not lines[0].endswith("\n"):  # killed while the header was written
            path.unlink(missing_ok=True)
            return
        header, *rows = lines
        column = header.rstrip().split(",").index("env_steps")
        whole = [row for row in rows if row.count(",") == header.count(",") and row.endswith("\n")]
        kept = [row for row in whole if int(row.split(",")[column]) <= env_steps]
        _write_atomically(path, "".join([header, *kept]).encode())

    # -- the end

    def stopped(self, where: str) -> typing.NoReturn:
        """Says how to go on after Ctrl-C or SIGTERM, and exits."""
        number = signal.Signals(self.stopping)
        command = shlex.join(["python", sys.argv[0], "--resume", str(self.folder)])
        self.print(f"{number.name}: stopped {where}. To go on: {command}")
        self.print(str(self.folder))
        sys.exit(128 + number)


def read_metrics(folder) -> dict[str, np.ndarray]:
    """metrics.csv as float columns; blank entries are NaN."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def plot_curve(folder, curves: dict[str, str], ylabel: str, bottom: float | None = -0.02) -> Path:
    """Draws metrics against environment steps: the mean over seeds, and a band from the lowest to the highest.

    Args:
      folder: the run folder; the figure is its `curve.png`.
      curves: name of a metric -> label.
      bottom: where the vertical axis begins; None for wherever the curves do.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    metrics = read_metrics(folder)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in curves.items():
        plot_seeds(axes, metrics["env_steps"], metrics[name], label)
    axes.set(xlabel="environment steps", ylabel=ylabel, ylim=(bottom, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(folder) / "curve.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_seeds(axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """A line through the means over seeds of values (rows,) at equal steps (rows,), in their range; NaN is left out."""
    at = np.unique(steps[~np.isnan(values)])
    seeds = [values[(steps == step) & ~np.isnan(values)] for step in at]
    (line,) = axes.plot(at, [v.mean() for v in seeds], label=label)
    axes.fill_between(at, [v.min() for v in seeds], [v.max() for v in seeds], alpha=0.2, color=line.get_color())


def over_seeds(num_seeds: int, function):
    """Batches a function of one seed over a leading axis of seeds.

    One seed skips `vmap`, under which `lax.cond` would compute both of its branches.
    """
    if num_seeds > 1:
        return jax.vmap(function)
    return lambda *args: jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], args)))


def device_name() -> str:
    device = jax.devices()[0]
    cores = f" ({os.cpu_count()} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, jax {jax.__version__}"


def commit() -> str:
    """The commit of this checkout, with '+changes' if tracked files differ from it; 'unknown' outside of git.

    Pages and the data in results/ do not count: one measurement rewrites them before the next begins.
    """

    def git(*arguments):
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    but = [
        ":(top)",
        *(f":(top,exclude){kind}" for kind in ("*.md", "results/*.csv", "results/*.json", "results/*.png")),
    ]
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked=no", *but) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- helpers ------------------------------------------------------------------------------------------------------


def _facts(config):
    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "config": {**dataclasses.asdict(config), "resume": ""},
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": device_name(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class _Hashing:
    """A file that hashes what is written to it, on top of a checkpoint's header."""

    def __init__(self, file, header):
        self._file, self._hash = file, _header_hash(header)

    def write(self, data):
        self._hash.update(data)
        return self._file.write(data)

    def digest(self):
        return self._hash.hexdigest()


def _header_hash(header):
    return hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}).encode())


def _is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf):
    """A PRNG key as its raw numbers, which can be written to a file."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _intact_header(path):
    """A checkpoint's header, or None if its checksum does not fit."""
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            checksum = _header_hash(header)
            while block := file.read(1 << 20):
                checksum.update(block)
            return header if checksum.hexdigest() == header["sha256"] else None
        except (ValueError, KeyError, AttributeError):
            return None


def _read_state(path, like):
    with path.open("rb") as file:
        file.readline()
        plain = eqx.tree_deserialise_leaves(file, jax.eval_shape(lambda tree: jax.tree.map(_plain, tree), like))
    return jax.tree.map(lambda raw, shape: jax.random.wrap_key_data(raw) if _is_key(shape) else raw, plain, like)


def _write_atomically(path, data):
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _short(n):
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= 0.9995 * size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _clock(seconds):
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class _TensorBoard:
    def __init__(self, folder):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step, metrics):
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        self._writer.close()


class _Wandb:
    def __init__(self, config, folder):
        import wandb

        name = "-".join(Path(folder).absolute().parts[-3:])
        settings = dataclasses.asdict(config)
        self._run = wandb.init(project="cleancrl", dir=str(folder), config=settings, id=name, resume="allow")

    def write(self, step, metrics):
        self._run.log(metrics, step=step)

    def close(self):
        self._run.finish()


def _sinks(config, folder):
    for wanted, extra, make in (
        (config.tensorboard, "tensorboard", lambda: _TensorBoard(folder)),
        (config.wandb, "wandb", lambda: _Wandb(config, folder)),
    ):
        if wanted:
            try:
                yield make()
            except ImportError:
                raise UserError(f"--{extra} needs packages that are missing: pip install -e '.[{extra}]'") from None
