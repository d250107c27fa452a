"""What the tests share: a small folder of pictures, the scripts with tiny settings, and ways to run them."""

import csv
import importlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
for number, handler in (signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler):
    signal.signal(number, handler)  # the runs that tests signal would inherit what nohup or a shell's & has set

IMAGE = "--image-size 16 --batch-size 4 --precision fp32".split()
COMMON = "--steps 6 --log-every 2 --sample-every 3 --save-every 2 --device cpu".split()
TINY = {
    "began": [*IMAGE, *COMMON, "--width", "4", "--latent", "8", "--gamma", "0.5", "--lambda-k", "0.5",
              "--lr-patience", "150"],
    "ebgan": [*IMAGE, *COMMON, "--g-width", "8", "--d-width", "4", "--latent", "8", "--code", "8"],
    "unrolled_gan": ["--batch-size", "4", *COMMON, "--width", "8", "--latent", "4", "--unroll-steps", "2"],
    "wgan_gp": [*IMAGE, *COMMON, "--width", "2", "--latent", "8", "--n-critic", "2",
                "--lr", "5e-4~2e-3"],
}
SCRIPTS = sorted(TINY)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of 24 coloured pictures of uneven sizes."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for index in range(24):
        size = rng.randrange(20, 40), rng.randrange(20, 40)
        image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        ImageDraw.Draw(image).ellipse((4, 4, 15, 15), tuple(rng.randrange(256) for _ in range(3)))
        image.save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def data_flags(pictures, tmp_path_factory) -> dict[str, list[str]]:
    """The --data flags that each script's tests train on."""
    folder = ["--data", str(pictures), "--data-root", str(tmp_path_factory.mktemp("data"))]
    return {script: folder for script in SCRIPTS} | {"unrolled_gan": ["--data", "ring"]}


@pytest.fixture(params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture
def flags(script, data_flags) -> list[str]:
    """Settings with which the script trains in a second or two."""
    return TINY[script] + data_flags[script]


@pytest.fixture
def double():
    """Everything in float64, where rounding cannot hide a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def module(script: str):
    return importlib.import_module(script)


def command(script: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / f"{script}.py"), *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(script: str, *arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess:
    """Runs a script as a user does, in its own process."""
    return subprocess.run(command(script, *arguments, ranks=ranks), cwd=cwd, env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=240)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def flat(item, name: str = "") -> dict[str, object]:
    """A nested state as {path: leaf}."""
    if isinstance(item, dict):
        return {path: leaf for key, value in item.items() for path, leaf in flat(value, f"{name}/{key}").items()}
    if isinstance(item, (list, tuple)):
        return {path: leaf for key, value in enumerate(item) for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: item}


def same_state(one: dict, two: dict) -> bool:
    """Whether two checkpoints hold the same state and random numbers, to the bit."""
    one, two = ({path: leaf for path, leaf in flat(content).items() if "/config" not in path} for content in (one, two))
    return one.keys() == two.keys() and all(
        torch.equal(leaf, two[path]) if isinstance(leaf, torch.Tensor) else leaf == two[path]
        for path, leaf in one.items())


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with open(folder / "metrics.csv") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]
