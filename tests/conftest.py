"""What the tests share: a small folder of pictures, the scripts with tiny settings, and ways to run them."""

import csv
import functools
import importlib
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # on tiny tensors, more threads only wait for each other
for number, handler in (signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler):
    signal.signal(number, handler)  # nohup, or an & in a shell, would have the tests' processes ignore them

RUN = "--steps 6 --every 2 --device cpu --batch-size 4".split()
IMAGE = [*RUN, *"--image-size 16 --precision fp32".split()]
TINY = {
    "began": [*IMAGE, *"--width 4 --latent 8 --gamma 0.5 --lambda-k 0.5".split()],
    "ebgan": [*IMAGE, *"--g-width 8 --d-width 4 --latent 8 --code 8".split()],
    "unrolled_gan": [*RUN, *"--width 8 --latent 4 --unroll-steps 2".split()],
    "wgan_gp": [*IMAGE, *"--width 2 --latent 8 --n-critic 2 --lr 5e-4~2e-3".split()],
}
SCRIPTS = sorted(TINY)
module, load = importlib.import_module, functools.partial(torch.load, weights_only=True)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


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
    """The --data flags with which each script is tested."""
    folder = ["--data", str(pictures), "--data-root", str(tmp_path_factory.mktemp("data"))]
    return {script: folder for script in SCRIPTS} | {"unrolled_gan": ["--data", "ring"]}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def flags(script, data_flags) -> list[str]:
    return TINY[script] + data_flags[script]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_same(one: Path, two: Path, *, and_rows: bool = True) -> None:
    """Two runs have come to the same step and state, to the bit, and have the same rows."""
    ends = [load(folder / "checkpoint.pt") for folder in (one, two)]
    torch.testing.assert_close(*([end["step"], end["state"]] for end in ends), rtol=0, atol=0)
    assert not and_rows or (ends[0]["rows"] == ends[1]["rows"] and rows(one) == rows(two))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
