"""CoCOA's values that the thesis leaves open, one changed at a time: what each does to the embedding and to the return.

    python experiments/cocoa_choices.py [FOLDER]    all runs (about 20 minutes on 2 cores), then cocoa_choices.csv
    python experiments/figures.py                   the figure

Runs go to FOLDER (runs/cocoa_choices); those that are there already are gone on with, or kept. The setting is PEARL's
data schedule for the point robot, where contexts hold prior episodes only: PEARL's embedding is imperfect there.
"""

import csv
import json
import sys
from pathlib import Path

import probe_embedding
from runs import provenance, train

RESULTS = Path(__file__).parent.parent / "results"
SCRIPT = "cocoa.py"
COMMON = (
    "--num_seeds 3 --total_env_steps 30000 --num_test_tasks 100 --prior_steps 80 --posterior_steps 0 --extra_steps 40 "
    "--exploration_episodes 3 --eval_episodes 4 --eval_every 30000"
)
CHOICES = {
    "PEARL": "--contrastive=false",
    "CoCOA": "",
    "window 3": "--window 3",
    "window 20": "--window 20",
    "weight 10": "--contrastive_weight 10",
    "momentum 0": "--momentum 0",
    "momentum 0.999": "--momentum 0.999",
    "temperature 1": "--temperature 1",
    "temperature 10": "--temperature 10",
    "query KL 0": "--contrastive_kl_weight 0",
    "query KL 1.6": "--contrastive_kl_weight 1.6",
    "bhattacharyya, temperature 12.5": "--similarity bhattacharyya --temperature 12.5",
    "wasserstein, temperature 1": "--similarity wasserstein --temperature 1",
    "bilinear, temperature 1": "--similarity bilinear --temperature 1",
}
"""CoCOA with the recipe's settings: window 6, weight 1, momentum 0.995, mahalanobis, temperature 100, query KL 0.1."""
METRICS = ("eval/return_adapted", "train/contrastive_accuracy", "train/kl", "train/logit_range")


def measure(name: str, flags: str, folder: Path) -> list[dict]:
    """The last evaluation of a choice, a row a seed; trains if that is not done."""
    train(f"{SCRIPT} {COMMON} {flags}".rstrip(), folder, name)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    tells = probe_embedding.measure(str(folder))
    last = [row for row in rows if row["env_steps"] == rows[-1]["env_steps"]]
    return [
        {"choice": name, "seed": row["seed"], "eval/probe_r2": f"{tells[int(row['seed'])]:.9g}"}
        | {key: row.get(key, "") for key in METRICS}
        for row in last
    ]


def main(parent: str = "runs/cocoa_choices") -> None:
    rows, facts = [], []
    for name, flags in CHOICES.items():
        folder = Path(parent).resolve() / name.replace(",", "").replace(" ", "_")
        rows += measure(name, flags, folder)
        facts.append(provenance(folder))
    with (RESULTS / "cocoa_choices.csv").open("w", newline="") as file:
        file.writelines(f"# {json.dumps(fact)}\n" for fact in facts)
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
