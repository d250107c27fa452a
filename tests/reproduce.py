"""Measures the tables of the README, cell by cell; a second call goes on where the first one stopped.

    python tests/reproduce.py began                    # 6 default runs, two at a time on one thread each
    python tests/reproduce.py unrolled                 # 36 runs of 3,000 steps

Every finished cell is one JSON line in .github/results/NAME.jsonl; at the end stands NAME.md, a table of them.
"""

import argparse
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import began  # noqa: E402
import common  # noqa: E402

RESULTS, IMAGES = ROOT / ".github/results", ROOT / ".github/images"


def train(script: str, *flags: str) -> tuple[list[dict[str, str]], Path]:
    """Runs a script to its end on one thread; returns the rows of metrics.csv and the run's folder."""
    folder = Path(tempfile.mkdtemp(prefix="reproduce-"), "run")
    arguments = [sys.executable, str(ROOT / f"{script}.py"), *flags, "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL, check=True)
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file)), folder


def run_cells(name: str, cells: list[dict], measure: Callable[[dict], dict], jobs: int) -> list[dict]:
    """Measures those cells that NAME.jsonl does not hold yet, some at a time; returns all their lines."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def finished() -> list[dict]:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if any(cell.items() <= line.items() for cell in cells)]

    def work(cell: dict) -> None:
        line = json.dumps(cell | measure(cell))
        with open(path, "a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    done = finished()
    left = [cell for cell in cells if not any(cell.items() <= line.items() for line in done)]
    print(f"{name}: {len(done)} of {len(cells)} cells are done", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, left))  # list() raises what a cell raised
    return finished()


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation over the seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def began_summary(table: list[dict[str, str]], folder: Path) -> dict:
    """A run's means over its last fifth, M's also over the fifths before, and a row of samples, kept as a picture."""
    means = lambda name, first, last: statistics.fmean(
        float(row[name]) for row in table[len(table) * first // 5:len(table) * last // 5])
    summary = {name: means(name, 4, 5) for name in ("ratio", "k", "m", "swd", "diversity")}
    summary |= {"m_third_fifth": means("m", 2, 3), "m_fourth_fifth": means("m", 3, 4)}
    generator, config = began.load_generator(folder / "checkpoint.pt")
    torch.manual_seed(0)
    row = generator(began.uniform(16, config["latent"]))
    common.save_grid(row, IMAGES / f"began-gamma-{config['gamma']}-{config['seed']}.png", columns=16, zoom=2)
    return summary | {"seconds": float(table[-1]["seconds"])}


def began_gammas(jobs: int) -> str:
    """BEGAN's default run at three diversity ratios: is L(G(z)) / L(x) held at gamma, and does diversity follow?"""
    cells = [dict(gamma=gamma, seed=seed) for gamma in (0.3, 0.5, 0.7) for seed in (0, 1)]

    def measure(cell: dict) -> dict:
        table, folder = train("began", "--gamma", str(cell["gamma"]), "--seed", str(cell["seed"]), "--device", "cpu")
        summary = began_summary(table, folder)
        shutil.rmtree(folder.parent)
        return summary

    text = "| γ | seed | L(G(z)) / L(x) | M, third to last fifth | SWD | diversity |\n|---|---|---|---|---|---|\n"
    for line in sorted(run_cells("began", cells, measure, jobs), key=lambda line: (line["gamma"], line["seed"])):
        text += ("| {gamma} | {seed} | {ratio:.3f} | {m_third_fifth:.4f}, {m_fourth_fifth:.4f}, {m:.4f} | {swd:.3f} "
                 "| {diversity:.2f} |\n".format(**line))
    return text


def unrolled(jobs: int) -> str:
    """Seed 003's table: what 10 unrolled steps buy, for even and uneven mixtures, and for both non-linearities of G."""
    keys = dict(unroll_steps=(0, 10), prior_std=(0.0, 0.06, 0.12), activation=("relu", "tanh"), seed=(0, 1, 2))
    cells = [dict(zip(keys, values)) for values in itertools.product(*keys.values())]

    def measure(cell: dict) -> dict:
        flags = [text for name, value in cell.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        table, folder = train("unrolled_gan", *flags, "--steps", "3000", "--sample-every", "300", "--device", "cpu")
        name = "unrolled-{unroll_steps}-{prior_std}-{activation}-{seed}.png".format(**cell)
        IMAGES.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "strip.png", IMAGES / name)
        shutil.rmtree(folder.parent)
        last = {column: float(table[-1][column]) for column in ("covered", "coverable", "reached", "quality", "kl")}
        return last | dict(most=max(int(row["covered"]) for row in table), seconds=float(table[-1]["seconds"]))

    lines = run_cells("unrolled", cells, measure, jobs)
    text = "| K | prior std | non-linearity | modes covered | of | reached | high quality, % | KL |\n"
    text += "|" + "---|" * 8 + "\n"
    for values in itertools.product(keys["activation"], keys["prior_std"], keys["unroll_steps"]):
        cell = dict(zip(("activation", "prior_std", "unroll_steps"), values))
        group = [line for line in lines if cell.items() <= line.items()]
        column = lambda name, factor=1: [factor * line[name] for line in group]
        text += (f"| {cell['unroll_steps']} | {cell['prior_std']} | {cell['activation']} "
                 f"| {spread(column('covered'), 1)} | {spread(column('coverable'), 1)} "
                 f"| {spread(column('reached'), 1)} | {spread(column('quality', 100), 1)} "
                 f"| {spread(column('kl'), 3)} |\n")
    return text


TABLES = {"began": began_gammas, "unrolled": unrolled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    text = TABLES[args.table](args.jobs)
    (RESULTS / f"{args.table}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
