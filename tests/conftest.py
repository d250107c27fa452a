"""What the tests share: a small folder of pictures, the scripts with tiny settings, and ways to run them."""

import contextlib
import csv
import io
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from importlib import import_module as module
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import load  # with weights_only=True, as is the default

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # on tiny tensors, more threads only wait for each other

RUN = "--steps 6 --every 2 --device cpu --batch-size 4".split()
IMAGE = [*RUN, *"--image-size 16 --precision fp32".split()]
TINY = {
    "began": [*IMAGE, *"--width 4 --latent 8 --gamma 0.5 --lambda-k 0.5".split()],
    "ebgan": [*IMAGE, *"--g-width 8 --d-width 4 --latent 8 --code 8".split()],
    "unrolled_gan": [*RUN, *"--width 8 --latent 4 --unroll-steps 2".split()],
    "wgan_gp": [*IMAGE, *"--width 2 --latent 8 --n-critic 2 --lr 5e-4~2e-3".split()],
}
SCRIPTS = sorted(TINY)
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def refusal(script: str, *arguments: object) -> tuple[int, str]:
    """The exit status and the last line of the error with which a script refuses these arguments."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as text:
        module(script).main([str(argument) for argument in arguments])
    if isinstance(stop.value.code, int):
        return stop.value.code, text.getvalue().strip().rpartition("\n")[2]
    assert "\n" not in stop.value.code and len(stop.value.code) < 600
    return 1, stop.value.code


def forked(*tasks: Callable) -> list[int]:
    """Run functions in processes of their own. The exit status of each."""
    processes = [multiprocessing.get_context("fork").Process(target=task) for task in tasks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


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
