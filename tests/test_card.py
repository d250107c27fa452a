"""The card of the project: what lies where, what imports what, and that the four scripts stay alike."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPTS, module

PACKAGES = {"torch", "torchvision", "numpy", "PIL"}
PUBLIC = {
    "began": "reconstruction_loss balance update_ema Generator Discriminator load_generator train main",
    "ebgan": "energy pull_away_term discriminator_loss generator_loss collapse Generator Discriminator load_generator "
             "train main",
    "unrolled_gan": "mixture discriminator_loss generator_loss unroll mode_statistics load_generator train main",
    "wgan_gp": "gradient_penalty critic_loss minibatch_stddev pixel_norm parse_schedule Generator Critic "
               "load_generator train main",
}


PARTS = ["networks", "losses", "data", "training", "sampling", "command line",
         "runs: the same text in all four scripts"]
USED = {  # what a reader might do with everything that is lifted out
    "began": """
images, zero = torch.rand(4, 3, 16, 16) * 2 - 1, torch.zeros(())
generator, discriminator = Generator(8, 4, 16, 3, skip=True), Discriminator(8, 4, 16, 3, skip=True)
assert Conv(3, 4)(images).shape == (4, 4, 16, 16) and UpConv(3, 4)(images).shape == (4, 4, 32, 32)
loss = reconstruction_loss(images, discriminator(images), 2)
loss.backward()
k, m = balance(zero, loss.detach(), loss.detach() / 4, 0.5, 0.1)
lr, best = torch.tensor(1.0), torch.tensor(torch.finfo(torch.float32).max)
for _ in range(9):
    halve_on_stall(m, lr, zero, best, waited := torch.zeros(()), 1, 0.1)
update_ema(Generator(8, 4, 16, 3, skip=True), generator, torch.zeros(()), 0.9)
""",
    "ebgan": """
images = torch.rand(4, 3, 32, 32) * 2 - 1
generator = Generator(8, 16, 32, 3, "fused", nn.BatchNorm2d)
discriminator = Discriminator(8, 4, 32, 3, "paper", nn.Identity)
assert generator(torch.rand(4, 8)).shape == decoder([8, 4, 2], 3, "paper", nn.Identity)(torch.rand(4, 8, 4, 4)).shape
assert UpConv(3, 4)(images).shape == (4, 4, 64, 64)
reconstructions, codes = discriminator(images)
energies = energy(images, reconstructions)
(discriminator_loss(energies, energies, 9.0) + generator_loss(energies, codes, 0.1) + pull_away_term(codes)).backward()
update_ema(Generator(8, 16, 32, 3, "fused", nn.BatchNorm2d), generator, torch.zeros(()), 0.9)
assert collapse([{"step": 500, "energy_real": 2.0, "energy_fake": 1.0}])
""",
    "unrolled_gan": """
z, x = torch.randn(4, 8), torch.randn(4, 2)
generator, discriminator = Generator(8, 4), Discriminator(4)
assert len(layered([nn.Linear(2, 2)] * 2, "tanh", 0)) == 3
images = ImageGenerator(8, 8, 32, 3)(z)
assert images.shape == (4, 3, 32, 32) and ImageDiscriminator(2, 32, 3)(images).shape == (4, 1)
fake, adam = generator(z), torch.optim.Adam(discriminator.parameters())
loss = lambda theta: discriminator_loss(functional_call(discriminator, theta, (x,)), discriminator(fake))
theta = unroll(discriminator, adam, loss, 2)
generator_loss(functional_call(discriminator, theta, (x,)), functional_call(discriminator, theta, (fake,))).backward()
means, weights = mixture("ring")
assert mode_statistics(draw(means, weights, MODE_STD["ring"], 999), means, MODE_STD["ring"], weights)["covered"] == 8
""",
    "wgan_gp": """
images, z = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 8)
generator, critic = Generator(8, 2, 64, 3), Critic(2, 64, 3, dropout=0.2)
fake = generator(z)
assert fake.shape == images.shape and UpConv(3, 4)(images).shape == (4, 4, 128, 128) and features(2, 8) == 8
assert pixel_norm(images).shape == dropout(images, 0.5).shape == images.shape
assert minibatch_stddev(images).shape == (4, 4, 64, 64)
penalty = gradient_penalty(critic, images, fake.detach())
critic_loss(critic(images), critic(fake.detach()), penalty, 10, 0.001).backward()
generator_loss(critic(fake)).backward()
gradient_penalty(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(6, 5), torch.randn(6, 5)).backward()
update_ema(Generator(8, 2, 64, 3), generator, torch.zeros(()), 0.9)
""",
}


def imported(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_top_level():
    scripts = {"ebgan.py", "began.py", "unrolled_gan.py", "wgan_gp.py"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.split("\n")
    assert {name.split("/")[0] for name in tracked if name and name[0] != "."} <= {
        *scripts, "common.py", "requirements.txt", "README.md", "tests"}


def test_requirements_are_the_four_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.split(">=")[0] for line in lines] == ["torch", "torchvision", "numpy", "pillow"]
    assert all(">=" in line for line in lines)


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_imports(name):
    foreign = imported(ROOT / f"{name}.py") - set(sys.stdlib_module_names) - PACKAGES
    assert foreign == (set() if name == "common" else {"common"})


def test_public_names(script):
    missing = [name for name in PUBLIC[script].split() if not hasattr(module(script), name)]
    assert not missing


def test_import_runs_nothing_and_is_light(script, tmp_path):
    code = f"import sys; sys.argv = ['x', '--no-such-flag']; import {script}; assert 'torchvision' not in sys.modules"
    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, b"", b"", [])


def test_help_names_at_most_34_flags(script, capsys):
    with pytest.raises(SystemExit) as stop:
        module(script).main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.count("\n  --") <= 34
    assert "seed of weights, batches and noise (default: 0)" in " ".join(text.split())


def block(script: str) -> str:
    text = (ROOT / f"{script}.py").read_text()
    return text[text.index("# ---- runs"):text.index("if __name__")]


def test_the_runs_are_the_same_text_and_short(script):
    assert 60 < len(block(script).rstrip().splitlines()) <= 120
    assert block(script) == block("began")


def test_order_of_the_parts(script):
    text = (ROOT / f"{script}.py").read_text()
    wanted = [part for part in PARTS if part != "data" or script == "unrolled_gan"]
    assert re.findall("^# ---- ([a-z: ]+) -", text, re.M) == wanted


IMPORTS = """import math, itertools, torch, torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from collections.abc import Callable, Iterable, Iterator, Sequence
"""


def test_networks_and_losses_can_be_lifted_out(script):
    """What stands between the two lines needs these imports and nothing else, and all of it works when called."""
    text = (ROOT / f"{script}.py").read_text()
    lifted = {"__name__": "lifted"}
    exec(IMPORTS + text[text.index("# ---- networks"):text.index("# ---- training")], lifted)
    names = {name for name, item in lifted.items() if getattr(item, "__module__", None) == "lifted"}
    exec(USED[script], lifted)
    unused = [name for name in names if name not in USED[script]]
    assert names and not unused, unused


def test_lines_fit():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        assert max(map(len, path.read_text().split("\n"))) <= 120, path
