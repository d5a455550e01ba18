"""What the scripts that measure speed share: clocks, memory, and a CSV whose first line says how it was made."""

import csv
import platform
import resource
import time
from pathlib import Path

import jax
import numpy as np

from shared import run

RESULTS = Path(__file__).parent.parent / "results"


def facts(more: str = "") -> str:
    """Device, versions, commit; and `more`."""
    return "; ".join(filter(None, (f"{run.device_name()}, {run.commit()}, Python {platform.python_version()}", more)))


def timed(function, *args):
    """Seconds until the result is there, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def compiled(function, *args):
    """Seconds of tracing, lowering and compiling a jitted function for these arguments, and the compiled one."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return time.perf_counter() - start, program


def repeated(function, state, rounds: int = 6):
    """The median seconds of a function from state to state, but for its first call; and the last state."""
    times = []
    for _ in range(rounds):
        seconds, state = timed(function, state)
        times.append(seconds)
    return float(np.median(times[1:])), state


def interleaved(functions: dict[str, callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of functions without arguments, called in turns after one call of each."""
    seconds = [[timed(function)[0] for function in functions.values()] for _ in range(rounds + 1)]
    return dict(zip(functions, np.transpose(seconds[1:])))


def peak_memory() -> int:
    """Bytes: the most this process held, on the GPU where there is one."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(name: str, how: str, rows: list[dict]) -> None:
    """Writes results/NAME.csv, with `how` it was made in a comment on top."""
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        file.write(f"# {how}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def measured(name: str, how: str, measurements) -> None:
    """Makes a row of each measurement, a function; prints it, and writes the rows so far to results/NAME.csv."""
    rows = []
    for measurement in measurements:
        rows.append(measurement())
        print(rows[-1], flush=True)
        write(name, how, rows)
