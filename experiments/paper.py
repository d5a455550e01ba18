"""The side experiments of '1000 Layer Networks', by the numbers of its figures.

    python experiments/paper.py                 what there is
    python experiments/paper.py 4               figure 4 at a size for two CPU cores: trains, publishes, draws
    python experiments/paper.py 4 --full        the commands at the paper's size, for a GPU, and what they take

Where the paper takes humanoids, ants and arms at widths from 256 and depths to 64, the small size is the point robot in
u4_maze, width 64, five seeds, half a million steps. Runs are those of experiments/runs.py. One whose CSV is in results/
is not trained again, except where its weights are looked at (9, 10, 17).

Not here: figures 1 and 12, which are --depth on the paper's tasks (in small: runs.py point_depth); 5, which has depths
that are no multiples of four; 20, which compares versions of brax.
"""

import itertools
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

import embedding_path
import figures
import residual_norms
import runs
from shared import run


class Side(NamedTuple):
    question: str
    shown: str | tuple[str, ...]
    """A figure of figures.py, or the runs that a program looks at."""
    full: tuple[str, ...]
    """Commands at the paper's size, with braces for what varies."""
    takes: str
    """Hours, as far as the paper and its authors' rebuttal print them."""


TASKS = "--env {humanoid,ant_big_maze,arm_push_easy}"
DEEP = ("point_u4_maze_depth_4", "point_u4_maze_depth_16", "point_u4_maze_depth_32")
THREE = "Hours of a seed, mean of the three tasks, at depths 4, 8, 16, 32, 64: 4.5, 5.3, 6.6, 9.1, 14.1"
HUMANOID = "Hours of a seed at depths 4, 8, 16, 32, 64: 1.5, 2.1, 3.4, 5.9, 11.0"
FIGURES = {
    "4": Side(
        "does width do what depth does?",
        "width",
        (
            f"crl.py {TASKS} --depth 4 --width {{256,512,1024,2048,4096}} --num_seeds 3",
            f"crl.py {TASKS} --depth {{8,32}} --num_seeds 3",
        ),
        "Hours of a seed, mean of the three tasks, at these widths: 4.5, 5.3, 6.0, 8.4, 15.9. "
        "The paper's humanoids have 200 million steps: --total_env_steps 200_000_000",
    ),
    "6": Side(
        "which of actor and critic has to be deep?",
        "actor_critic",
        (f"crl.py {TASKS} --actor_depth {{4,8,16,32,64}} --critic_depth {{4,8,16,32,64}} --num_seeds 3",),
        THREE,
    ),
    "7": Side(
        "do larger batches help deep networks?",
        "batch",
        ("crl.py --env humanoid --depth {4,8,16,64} --batch_size {128,256,512,1024,2048} --num_seeds 3",),
        f"{HUMANOID}, at batch 512",
    ),
    "8": Side(
        "do deep agents learn better, or collect better?",
        "collectors",
        (f"experiments/collectors.py {TASKS} --depth {{4,32}} --deep_depth 32 --num_seeds 3",),
        "The paper gives no hours; three agents learn at once",
    ),
    "9": Side(
        "what does a deep critic think of a maze?",
        DEEP,
        ("crl.py --env ant_u4_maze --depth {4,64}",),
        "Hours: 2.0 and 11.4; each run draws value_map.png",
    ),
    "10": Side(
        "where along an episode does a deep embedding spread?",
        DEEP,
        ("crl.py --env humanoid --depth {4,64}",),
        f"{HUMANOID}; then experiments/embedding_path.py on the runs",
    ),
    "11": Side(
        "are ways stitched together that were never trained?",
        "stitching",
        ("crl.py --env ant_u_maze_gen_1f2f3f --depth {4,16,64} --num_seeds 3",),
        "The paper gives no hours",
    ),
    "16": Side(
        "which parts does the block need?",
        "point_blocks",
        (
            "crl.py --env humanoid --depth {4,16,32,64} --num_seeds 3",
            "crl.py --env humanoid --depth {4,16,32,64} --norm none --num_seeds 3",
            "crl.py --env humanoid --depth {4,16,32,64} --activation relu --num_seeds 3",
        ),
        HUMANOID,
    ),
    "17": Side(
        "how much does each block add?",
        DEEP,
        ("crl.py --env humanoid --depth {32,64,128,256}",),
        f"{HUMANOID}; then experiments/residual_norms.py on the runs",
    ),
}
"""Number of the figure -> what it asks and how it is redone."""


def value_maps(folders: list[str]) -> None:
    """Says where the maps are that the runs drew at their end."""
    for folder in folders:
        print(Path(folder) / "value_map.png")


PROGRAMS = {"9": value_maps, "10": embedding_path.draw, "17": residual_norms.show}


@run.command
def main(argv: list[str] | None = None) -> None:
    matplotlib.use("agg")
    match (argv or sys.argv)[1:]:
        case []:
            print(__doc__)
            for number, side in FIGURES.items():
                print(f"{number:>3}  {side.question}")
        case [number, *rest] if number in FIGURES and rest in ([], ["--full"]):
            redo(number) if not rest else print(full(FIGURES[number]))
        case _:
            raise run.UserError(f"paper.py takes one of {', '.join(FIGURES)}, and perhaps --full")


def full(side: Side) -> str:
    """A line for each run, and what it takes."""
    lines = []
    for command in side.full:
        parts = re.split(r"\{(.*?)\}", command)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        lines += [runs.typed("".join(each)) for each in itertools.product(*choices)]
    return "\n".join([*lines, f"{side.takes}. The paper's runs fit one GPU of 80 GB."])


def redo(number: str) -> None:
    """Trains what is missing and shows the figure."""
    shown = FIGURES[number].shown
    if number in PROGRAMS:
        runs.train_all(list(shown))
        PROGRAMS[number]([str(runs.FOLDER / name) for name in shown])
    else:
        runs.redo([name for name in runs.choose([shown]) if not (figures.RESULTS / f"{name}.csv").exists()])
        picture = figures.RESULTS / f"{shown}.png"
        picture.write_bytes(figures.draw_curves(figures.FIGURES[shown]))
        print(picture)


if __name__ == "__main__":
    main()
