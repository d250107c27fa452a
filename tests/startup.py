"""Measures how long the scripts take to begin: --help, the first step of a default run, and 50,000 pictures.

    python tests/startup.py

Every time is that of a new process, from its start to its end.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ebgan", "began", "unrolled_gan", "wgan_gp")
DRAW = """
import common
for number, face in enumerate(common.load_images("faces", 128)[:500]):
    picture = common.Image.fromarray(face.permute(1, 2, 0).numpy()).resize((178, 218))  # the size of CelebA's
    picture.save(f"pictures/{number:06d}.jpg", quality=90)
"""
LOAD = """
import resource, common, numpy, torch, torchvision
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
images = common.load_images("pictures", 64)
print(len(images), peak() - before)
"""


def timed(*command: str, folder: str) -> tuple[float, float, str]:
    """A Python command's seconds, its peak memory in MiB, and what it printed last.

    Linux counts this process's own memory as a peak of the new one's, so no large library is imported here.
    """
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read().strip()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - begun, usage.ru_maxrss / 1024, printed.split("\n")[-1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for script in SCRIPTS:
            path = str(ROOT / f"{script}.py")
            usage = statistics.median(timed(path, "--help", folder=folder)[0] for _ in range(5))
            one = [timed(path, "--steps", "1", "--out", f"{script}-{out}", folder=folder) for out in ("a", "b")]
            print(f"{script}: --help {usage:.1f} s; a default run of one step, with its pictures and checkpoints, "
                  f"{one[0][0]:.1f} s, and {one[1][0]:.1f} s when the data have been drawn before; "
                  f"peak memory {one[1][1]:.0f} MiB", flush=True)
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        timed("-c", DRAW, folder=folder)
        for number in range(500, 50_000):
            os.link(pictures / f"{number % 500:06d}.jpg", pictures / f"{number:06d}.jpg")
        for which in ("first", "second"):
            taken, _, line = timed("-c", LOAD, folder=folder)
            count, memory = line.split()
            print(f"{count} JPEGs of 178x218 to 64x64, {which} start: {taken:.1f} s, peak memory {float(memory):.0f} "
                  "MiB above the libraries", flush=True)


if __name__ == "__main__":
    main()
