"""Measures the tables of the results pages, cell by cell; a second call goes on where the first one stopped.

    python tests/reproduce.py began                    # 6 runs of 2,000 steps, two at a time on one thread each
    python tests/reproduce.py variants                 # BEGAN at 16x16, a flag at a time: 18 runs of 2,500 steps
    python tests/reproduce.py ebgan                    # 30 runs of 1,000 steps, on MNIST
    python tests/reproduce.py unrolled                 # 60 runs of 3,000 steps
    python tests/reproduce.py stacked                  # 1,000 modes: 16 runs of 2,500 steps, one of each other script
    python tests/reproduce.py wgan_gp                  # 36 runs of 1,500 steps
    python tests/reproduce.py precision                # BEGAN and EBGAN in fp32 and bf16: 12 runs of 1,500 steps
    OMP_NUM_THREADS=2 python tests/reproduce.py defaults --jobs 1       # 12 default runs, scored by tests/judge.py
    python tests/reproduce.py former                   # 12 runs by the defaults of old
    python tests/reproduce.py deviations               # 46 runs: other deviations from the papers, one at a time

MNIST is looked for in the folder that GAN_TEST_DATA names, or else downloaded to data.

Every finished cell is one JSON line in .github/results/NAME.jsonl; at the end a table of them is printed.
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

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import judge  # noqa: E402

RESULTS, IMAGES = ROOT / ".github/results", ROOT / ".github/images"
MNIST = os.environ.get("GAN_TEST_DATA", "data")
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


def run(file: Path, *flags: str) -> None:
    """Runs a script, or a changed copy of one, on THREADS threads."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(file), *flags], env=environment, stdout=subprocess.DEVNULL, check=True)


def train(script: str, *flags: str, changes: dict[str, str] = {}) -> tuple[list[dict[str, str]], Path]:
    """Trains by a script to its end; returns the rows of metrics.csv and the run's folder.

    With ``changes`` it runs a copy, beside that folder, in which other text takes the place of some of its own.
    """
    folder, file = Path(tempfile.mkdtemp(prefix="reproduce-"), "run"), ROOT / f"{script}.py"
    if changes:
        text, file = file.read_text(), folder.parent / file.name
        for old, new in changes.items():
            if text.count(old) != 1:
                raise ValueError(f"{script}.py has {text.count(old)} times: {old}")
            text = text.replace(old, new)
        file.write_text(text)
    run(file, *flags, "--out", str(folder))
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
    """Mean and, of more than one seed, sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def fifth(table: list[dict[str, str]], name: str, which: int = 5) -> float:
    """The mean of a column over a fifth of the run; 5 is the last."""
    rows = table[len(table) * (which - 1) // 5:len(table) * which // 5]
    return statistics.fmean(float(row[name]) for row in rows)


def began_gammas(jobs: int) -> str:
    """BEGAN at three diversity ratios: is L(G(z)) / L(x) held at gamma, and does diversity follow?"""
    cells = [dict(gamma=gamma, seed=seed) for gamma in (0.3, 0.5, 0.7) for seed in (0, 1)]

    def measure(cell: dict) -> dict:
        flags = ["--gamma", str(cell["gamma"]), "--seed", str(cell["seed"])]
        flags += ["--lr-patience", "150", "--precision", "fp32", "--ema", "0"]  # the paper's rule for the rate, plain G
        table, folder = train("began", "--steps", "2000", *flags, "--device", "cpu")
        summary = {name: fifth(table, name) for name in ("ratio", "k", "m", "swd", "diversity")}
        summary |= {"m_third_fifth": fifth(table, "m", 3), "m_fourth_fifth": fifth(table, "m", 4)}
        if cell["seed"] == 0:
            row = IMAGES / f"began-gamma-{cell['gamma']}.png"
            common.save_grid(judge.sampled(folder / "checkpoint.pt", 16), row, columns=16, zoom=2)
        shutil.rmtree(folder.parent)
        return summary | {"seconds": float(table[-1]["seconds"])}

    text = "| γ | seed | L(G(z)) / L(x) | M, third to last fifth | SWD | diversity |\n|---|---|---|---|---|---|\n"
    for line in sorted(run_cells("began", cells, measure, jobs), key=lambda line: (line["gamma"], line["seed"])):
        text += ("| {gamma} | {seed} | {ratio:.3f} | {m_third_fifth:.4f}, {m_fourth_fifth:.4f}, {m:.4f} | {swd:.3f} "
                 "| {diversity:.2f} |\n".format(**line))
    return text


def began_variants(jobs: int) -> str:
    """BEGAN at 16x16 with one flag changed at a time: what is each worth, and what helps recall?"""
    variants = ["", "--gamma 0.5", "--gamma 1", "--eta 1", "--lr-patience 150", "--ema 0", "--no-skip",
                "--residual-steps 1500", "--betas 0.5 0.999", "--lambda-k 0.02", "--lambda-k 1", "--latent 128",
                "--batch-size 32", "--latent 32", "--latent 16", "--width 64", "--lr 1e-4", "--lambda-k 0.001"]
    cells = [dict(flags=flags, seed=0) for flags in variants]
    faces = judge.Judge("faces", size=16)

    def measure(cell: dict) -> dict:
        table, folder = train("began", "--image-size", "16", "--steps", "2500", "--seed", str(cell["seed"]),
                              *cell["flags"].split(), "--sample-every", "2500", "--device", "cpu")
        scores = faces.score(judge.sampled(folder / "checkpoint.pt"))
        shutil.rmtree(folder.parent)
        return scores | {"diversity": float(table[-1]["diversity"]), "seconds": float(table[-1]["seconds"])}

    text = "| flags | Fréchet | precision | recall | KL | diversity | minutes |\n|" + "---|" * 7 + "\n"
    for line in run_cells("variants", cells, measure, jobs):
        text += ("| {flags} | {frechet:.1f} | {precision:.2f} | {recall:.2f} | {kl:.2f} | {diversity:.2f} "
                 "| {minutes:.1f} |\n".format(**line, minutes=line["seconds"] / 60))
    return text


def ebgan_margins(jobs: int) -> str:
    """The margins of the MNIST experiment behind the script, with and without the pull-away term; other deviations."""
    variants = [f"--margin {margin} --pt-weight {weight}" for margin in (2, 8, 16) for weight in (0, 0.1)]
    variants += [f"{variants[3]} {more}" for more in ("--ema 0", "--layers paper", "--lr 2e-4", "--betas 0.9 0.999")]
    shown = dict(zip(variants[1::2], ("margin-2", "margin-8", "margin-16", "layers-paper")))
    cells = [dict(flags=flags, seed=seed) for seed in (0, 1, 2) for flags in variants]
    mnist = judge.Judge("mnist", MNIST)
    watched = ("energy_real", "energy_fake", "loss_d", "diversity")

    def measure(cell: dict) -> dict:
        table, folder = train("ebgan", "--data", "mnist", "--data-root", MNIST, "--steps", "1000", "--batch-size", "32",
                              *cell["flags"].split(), "--seed", str(cell["seed"]), "--device", "cpu")
        pictures = judge.sampled(folder / "checkpoint.pt")
        if cell["seed"] == 0 and cell["flags"] in shown:
            common.save_grid(pictures[:16], IMAGES / f"ebgan-{shown[cell['flags']]}.png", columns=16)
        shutil.rmtree(folder.parent)
        return {name: fifth(table, name) for name in watched} | mnist.score(pictures)

    lines = run_cells("ebgan", cells, measure, jobs)
    columns = dict(energy_real=1, energy_fake=1, loss_d=1, diversity=2, frechet=2, precision=2, recall=2)
    text = "| flags | D(x) | D(G(z)) | L_D | diversity | Fréchet | precision | recall |\n|" + "---|" * 8 + "\n"
    for flags in variants:
        group = [line for line in lines if line["flags"] == flags]
        scores = " | ".join(spread([line[name] for line in group], places) for name, places in columns.items())
        text += f"| `{flags}` | {scores} |\n"
    return text


def wgan_gp_ablation(jobs: int) -> str:
    """The default settings, then without each of their items in turn, and with augmentation."""
    variants = {"default": [], "without EMA": ["--ema", "0"], "without minibatch stddev": ["--no-stddev"],
                "without pixel norm": ["--no-pixel-norm"], "with dropout 0.2": ["--dropout", "0.2"],
                "without drift": ["--drift", "0"], "with augmentation": ["--augment"],
                "second beta 0.9": ["--betas", "0", "0.9"], "rate 1e-4": ["--lr", "1e-4"],
                "one critic update": ["--n-critic", "1"], "five critic updates": ["--n-critic", "5"],
                "networks in bf16": ["--precision", "bf16"]}
    fish = judge.Judge("fish")

    def measure(cell: dict) -> dict:
        table, folder = train("wgan_gp", "--steps", "1500", *variants[cell["variant"]], "--seed", str(cell["seed"]),
                              "--sample-every", "1500", "--device", "cpu")
        scores = fish.score(judge.sampled(folder / "checkpoint.pt"))
        shutil.rmtree(folder.parent)
        return scores | {name: float(table[-1][name]) for name in ("swd", "diversity", "seconds")}

    cells = [dict(variant=name, seed=seed) for seed in (0, 1, 2) for name in variants]
    lines = run_cells("wgan_gp", cells, measure, jobs)
    columns = dict(frechet=1, precision=2, recall=2, swd=3, diversity=2)
    text = f"| variant | {' | '.join(columns)} |\n|" + "---|" * 6 + "\n"
    for name in variants:
        group = [line for line in lines if line["variant"] == name]
        text += f"| {name} | "
        text += " | ".join(spread([line[column] for line in group], places) for column, places in columns.items())
        text += " |\n"
    return text


RUNS = dict(  # the runs that the changes below are made to
    began="--image-size 16 --steps 2500 --sample-every 2500",
    ebgan=f"--data mnist --data-root {MNIST} --steps 1000 --batch-size 32 --margin 8 --pt-weight 0.1",
    wgan_gp="--steps 1500 --sample-every 1500",
    unrolled_gan="--data grid --unroll-steps 5 --steps 3000 --sample-every 3000",
)
PYTORCH_WEIGHTS = {"in built.parameters():": "in ():"}
CHANGES = [  # deviations undone: script, name, more flags and, where no flag does it, what replaces which text
    ("began", "images end in tanh(x)", "", {"2 * (self.last(x) / 2).tanh()": "self.last(x).tanh()"}),
    ("began", "images without a bound", "", {"2 * (self.last(x) / 2).tanh()": "self.last(x)"}),
    ("began", "PyTorch's initial weights", "", PYTORCH_WEIGHTS),
    ("began", "a z of its own for L_D", "", {
        "        L_G.backward()\n": """
        L_G.backward(inputs=list(generator.parameters()))
        other = generator(uniform(args.batch_size, args.latent, device)).detach()
        L_D = real_loss - k * reconstruction_loss(other, discriminator(other), args.eta)
        L_D.backward(inputs=list(discriminator.parameters()))
""",
        "        torch._foreach_mul_([parameter.grad for parameter in discriminator.parameters()], -k)\n": "",
        "        real_loss.backward()\n": ""}),
    ("ebgan", "energy: the mean square", "--margin 0.0625", {".norm(dim=1)": ".square().mean(dim=1)"}),
    ("ebgan", "the paper's initial weights", "", {"    return built.to(": """
    for parameter in built.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02 if network is Generator else 0.002)
    return built.to("""}),
    ("ebgan", "images of its own for L_D", "", {"                x = batches(turn)\n": """
                x = batches(turn)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    fake = generator(uniform(args.batch_size, args.latent, device)).detach().to(z.dtype)
                    reconstructions, _ = discriminator(fake)
                fake_energy = energy(fake, reconstructions)
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
             if seed == 0 or script != "began"]  # as in their tables
    judges = dict(began=judge.Judge("faces", size=16), ebgan=judge.Judge("mnist", MNIST), wgan_gp=judge.Judge("fish"))

    def measure(cell: dict) -> dict:
        script, name, seed = cell.values()
        (more, changes), = [(flags, changes) for *key, flags, changes in CHANGES if key == [script, name]]
        flags = f"{RUNS[script]} {more} --seed {seed} --device cpu"
        table, folder = train(script, *flags.split(), changes=changes)
        if script == "unrolled_gan":
            scores = {name: float(table[-1][name]) for name in ("covered", "reached", "modes", "quality", "kl")}
        else:  # by the changed script itself
            file = folder.parent / f"{script}.py"
            run(file, "--checkpoint", str(folder / "checkpoint.pt"), "--sample", "2000", "--device", "cpu")
            scores = judges[script].score(judge.read_folder(folder / "sample-001", 1 if script == "ebgan" else 3))
        shutil.rmtree(folder.parent)
        return scores | {"seconds": float(table[-1]["seconds"])}

    lines = run_cells("deviations", cells, measure, jobs)
    text = ""
    for script in RUNS:
        places = dict(covered=1, reached=1, modes=1, quality=2, kl=3) if script == "unrolled_gan" else dict(
            frechet=2, precision=2, recall=2)
        text += f"\n| {script} | runs | {' | '.join(places)} |\n|" + "---|" * (2 + len(places)) + "\n"
        for name in [name for which, name, _, _ in CHANGES if which == script]:
            group = [line for line in lines if (line["script"], line["change"]) == (script, name)]
            scores = " | ".join(spread([line[column] for line in group], digits) for column, digits in places.items())
            text += f"| {name} | {len(group)} | {scores} |\n" if group else ""
    return text


def defaults(jobs: int, name: str = "defaults", flags: dict[str, str] = {}) -> str:
    """Default runs, scored by tests/judge.py: how far are samples from the data, as a multiple of held-out data?"""
    runs = [("began", "faces"), ("ebgan", "mnist"), ("wgan_gp", "fish"), ("wgan_gp", "mnist")]
    cells = [dict(script=script, data=data, seed=seed) for seed in (0, 1, 2) for script, data in runs]
    roots = {data: MNIST if data == "mnist" else "data" for _, data in runs}
    judges = {data: judge.Judge(data, root) for data, root in roots.items()}

    def measure(cell: dict) -> dict:
        script, data, seed = cell.values()
        table, folder = train(script, "--data", data, "--data-root", roots[data], "--seed", str(seed),
                              *flags.get(script, "").split())
        pictures = judge.sampled(folder / "checkpoint.pt")
        if seed == 0 and name == "defaults":
            common.save_grid(pictures[:64], IMAGES / f"{script}-{data}.png", columns=16)
            shutil.copytree(folder, Path("runs", f"{script}-{data}"), dirs_exist_ok=True)
        shutil.rmtree(folder.parent)
        return judges[data].score(pictures) | {"seconds": float(table[-1]["seconds"])}

    lines = run_cells(name, cells, measure, jobs)
    columns = dict(frechet=2, precision=2, recall=2, least_class=3, kl=3)
    text = f"| script | data | runs | minutes | {' | '.join(columns)} |\n|" + "---|" * 9 + "\n"
    for script, data in runs:
        group = [line for line in lines if (line["script"], line["data"]) == (script, data)]
        scores = " | ".join(spread([line[name] for line in group], places) for name, places in columns.items())
        minutes = spread([line["seconds"] / 60 for line in group], 1)
        text += f"| {script} | {data} | {len(group)} | {minutes} | {scores} |\n"
    return text


def former(jobs: int) -> str:
    """The same runs by the defaults of old, in today's flags."""
    return defaults(jobs, "former", dict(began="--steps 3000 --gamma 0.5 --lr-patience 150 --ema 0",
                                         ebgan="--steps 3000 --ema 0",
                                         wgan_gp="--steps 4000 --augment --n-critic 4 --dropout 0.2"))


def precision(jobs: int) -> str:
    """Does bf16 cost quality? Short runs in both precisions, scored by tests/judge.py."""
    cells = [dict(script=script, numbers=numbers, seed=seed)
             for script in ("began", "ebgan") for seed in (0, 1, 2) for numbers in ("fp32", "bf16")]
    data = dict(began=("faces", "data"), ebgan=("mnist", MNIST))
    judges = {script: judge.Judge(*where) for script, where in data.items()}

    def measure(cell: dict) -> dict:
        script, numbers, seed = cell.values()
        name, root = data[script]
        table, folder = train(script, "--data", name, "--data-root", root, "--precision", numbers, "--seed", str(seed),
                              "--steps", "1500", "--sample-every", "1500", "--device", "cpu")
        scores = judges[script].score(judge.sampled(folder / "checkpoint.pt"))
        shutil.rmtree(folder.parent)
        return scores | {"seconds": float(table[-1]["seconds"])}

    lines = run_cells("precision", cells, measure, jobs)
    columns = dict(frechet=2, precision=2, recall=2, least_class=3, kl=3)
    text = f"| script | numbers | {' | '.join(columns)} |\n|" + "---|" * 7 + "\n"
    for script, numbers in itertools.product(data, ("fp32", "bf16")):
        group = [line for line in lines if (line["script"], line["numbers"]) == (script, numbers)]
        scores = " | ".join(spread([line[name] for line in group], places) for name, places in columns.items())
        text += f"| {script} | {numbers} | {scores} |\n"
    return text


def unrolled(jobs: int) -> str:
    """Rings and grids of even weights at K = 0, 5 and 10, and seed 003's table: rings of uneven weights."""
    even = dict(data=("ring", "grid"), prior_std=(0.0,), activation=("relu", "tanh"), unroll_steps=(0, 5, 10))
    uneven = dict(data=("ring",), prior_std=(0.06, 0.12), activation=("relu", "tanh"), unroll_steps=(0, 10))
    groups = [dict(zip(keys, values)) for keys in (even, uneven) for values in itertools.product(*keys.values())]
    cells = [group | dict(seed=seed) for group in groups for seed in (0, 1, 2)]

    def measure(cell: dict) -> dict:
        flags = [text for name, value in cell.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        table, folder = train("unrolled_gan", *flags, "--steps", "3000", "--sample-every", "300", "--device", "cpu")
        if cell["seed"] == 0:
            name = "unrolled-{data}-{unroll_steps}-{prior_std}-{activation}.png".format(**cell)
            Image.open(folder / "strip.png").quantize(64).save(IMAGES / name, optimize=True)
        shutil.rmtree(folder.parent)
        last = {name: float(table[-1][name]) for name in ("covered", "coverable", "reached", "modes", "quality", "kl")}
        return last | dict(most=max(int(row["covered"]) for row in table), seconds=float(table[-1]["seconds"]))

    lines = run_cells("unrolled", cells, measure, jobs)
    text = "| data | prior std | non-linearity | K | covered | of | reached | modes | high quality, % | KL |\n"
    text += "|" + "---|" * 10 + "\n"
    for group in groups:
        found = [line for line in lines if group.items() <= line.items()]
        show = lambda name, places, factor=1: spread([factor * line[name] for line in found], places)
        text += "| {data} | {prior_std} | {activation} | {unroll_steps} | ".format(**group)
        text += f"{show('covered', 1)} | {show('coverable', 1)} | {show('reached', 1)} | {show('modes', 1)} | "
        text += f"{show('quality', 0, 100)} | {show('kl', 3)} |\n"
    return text


def stacked(jobs: int) -> str:
    """The paper's 1,000 modes: K, and D's width beside G's. The other scripts have about ten minutes each."""
    cells = [dict(script="unrolled_gan", d_width=width, unroll_steps=steps, seed=seed)
             for seed in (0, 1) for width in (2, 4) for steps in (0, 1, 5, 10)]
    others = {"wgan_gp": 6000, "ebgan": 4000, "began": 3000}
    cells += [dict(script=script, steps=steps, seed=0) for script, steps in others.items()]
    digits = judge.Judge("mnist", MNIST)

    def measure(cell: dict) -> dict:
        flags = [text for name, value in cell.items() if name != "script"
                 for text in (f"--{name.replace('_', '-')}", str(value))]
        if cell["script"] == "unrolled_gan":
            flags += ("--steps 2500 --batch-size 128 --lr 3e-4 6e-4 --width 64 --activation relu "
                      "--d-activation leaky --gain 1.4").split()
        table, folder = train(cell["script"], "--data", "stacked-mnist", "--data-root", MNIST, *flags,
                              "--sample-every", "500", "--device", "cpu")
        samples = judge.sampled(folder / "checkpoint.pt", 25_600)
        if cell["seed"] == 0:
            name = "-".join(str(value) for key, value in cell.items() if key not in ("seed", "steps"))
            common.save_grid(samples[:16], IMAGES / f"stacked-{name}.png", columns=16, zoom=1)
        shutil.rmtree(folder.parent)
        return judge.modes(digits, samples) | {"seconds": float(table[-1]["seconds"])}

    lines = run_cells("stacked", cells, measure, jobs)
    text = "| K | D a quarter of G: modes | KL | D half of G: modes | KL |\n|" + "---|" * 5 + "\n"
    for steps in (0, 1, 5, 10):
        text += f"| {steps} |"
        for width in (2, 4):
            group = [line for line in lines if (line.get("d_width"), line.get("unroll_steps")) == (width, steps)]
            text += f" {spread([line['modes'] for line in group], 1)} | {spread([line['kl'] for line in group], 2)} |"
        text += "\n"
    text += "\n| script | steps | minutes | modes | KL |\n|" + "---|" * 5 + "\n"
    for line in [line for line in lines if line["script"] in others]:
        minutes = line["seconds"] / 60
        text += f"| {line['script']} | {line['steps']} | {minutes:.0f} | {line['modes']} | {line['kl']:.2f} |\n"
    return text


TABLES = {"began": began_gammas, "variants": began_variants, "ebgan": ebgan_margins, "unrolled": unrolled,
          "stacked": stacked, "wgan_gp": wgan_gp_ablation, "deviations": deviations, "precision": precision,
          "defaults": defaults, "former": former}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    print(TABLES[args.table](args.jobs))


if __name__ == "__main__":
    main()
