"""The side experiments of '1000 Layer Networks', by the numbers of its figures.

    python experiments/paper.py                 what there is
    python experiments/paper.py 4               figure 4 at a size for two CPU cores: trains, publishes, draws
    python experiments/paper.py 4 --full        the commands at the paper's size, for a GPU, and what they take

Where the paper takes humanoids, ants and arms at widths from 256 and depths to 64, the small size is the point robot in
u4_maze, width 64, five seeds, half a million steps. Runs are those of experiments/runs.py, which are trained once.
"""

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
    takes: str = ""
    """Hours of each and memory, as far as the paper and its authors' rebuttal print them."""


TASKS = "{humanoid,ant_big_maze,arm_push_easy}"
DEEP = ("point_u4_maze_depth_4", "point_u4_maze_depth_16", "point_u4_maze_depth_32")
HOURS = "mean hours of the three tasks at depths 4, 8, 16, 32, 64: 4.5, 5.3, 6.6, 9.1, 14.1; one GPU of 80 GB"
FIGURES = {
    "4": Side(
        "does width do what depth does?",
        "width",
        (
            f"crl.py --env {TASKS} --depth 4 --width {{256,512,1024,2048,4096}} --num_seeds 3",
            f"crl.py --env {TASKS} --depth 8 --num_seeds 3",
        ),
        "mean hours of the three tasks at these widths: 4.5, 5.3, 6.0, 8.4, 15.9; one GPU of 80 GB",
    ),
    "6": Side(
        "which of actor and critic has to be deep?",
        "actor_critic",
        (f"crl.py --env {TASKS} --actor_depth {{4,8,16,32,64}} --critic_depth {{4,8,16,32,64}} --num_seeds 3",),
        HOURS,
    ),
    "7": Side(
        "do larger batches help deep networks?",
        "batch",
        ("crl.py --env humanoid --depth {4,8,16,64} --batch_size {128,256,512,1024,2048} --num_seeds 3",),
        HOURS,
    ),
    "8": Side(
        "do deep agents learn better, or collect better?",
        "collectors",
        (f"experiments/collectors.py --env {TASKS} --depth {{4,32}} --deep_depth 32 --num_seeds 3",),
        "not printed; three agents learn at once",
    ),
    "9": Side(
        "what does a deep critic think of a maze?",
        DEEP,
        ("crl.py --env ant_u4_maze --depth {4,64}",),
        "hours in u4 at depth 64: 11.4; value_map.png of each run",
    ),
    "10": Side(
        "where along an episode does a deep embedding spread?",
        DEEP,
        ("crl.py --env humanoid --depth {4,64}",),
        f"{HOURS}; then experiments/embedding_path.py on the runs",
    ),
    "11": Side(
        "are ways stitched together that were never trained?",
        "stitching",
        ("crl.py --env ant_u_maze_gen_1f2f3f --depth {4,16,64} --num_seeds 3",),
        "not printed",
    ),
    "16": Side(
        "which parts does the block need?",
        "point_blocks",
        (
            "crl.py --env humanoid --depth {4,16,32,64} --norm none --num_seeds 3",
            "crl.py --env humanoid --depth {4,16,32,64} --activation relu --num_seeds 3",
        ),
        HOURS,
    ),
    "17": Side(
        "how much does each block add?",
        DEEP,
        ("crl.py --env humanoid --depth {32,64,128,256} --actor_depth 64",),
        f"{HOURS}; then experiments/residual_norms.py on the runs",
    ),
}
"""Number of the figure -> what it asks and how it is redone."""


def value_maps(argv: list[str]) -> None:
    """Says where the maps are that the runs drew at their end."""
    for folder in argv[1:]:
        print(Path(folder) / "value_map.png")


PROGRAMS = {"9": value_maps, "10": embedding_path.main, "17": residual_norms.main}


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
    return "\n".join([*map(runs.typed, side.full), f"It takes: {side.takes}."])


def redo(number: str) -> None:
    """Trains what is not trained yet and shows the figure."""
    shown = FIGURES[number].shown
    if number in PROGRAMS:
        runs.redo(list(shown))
        PROGRAMS[number](["", *(str(runs.FOLDER / name) for name in shown)])
    else:
        runs.redo(runs.choose([shown]))
        picture = figures.RESULTS / f"{shown}.png"
        picture.write_bytes(figures.draw_curves(figures.FIGURES[shown]))
        print(picture)


if __name__ == "__main__":
    main()
