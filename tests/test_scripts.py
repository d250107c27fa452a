"""Every script as a user runs it, with tiny settings: its files, resuming, ranks, interruptions and bad input."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import time

import pytest
import torch
from conftest import ENVIRONMENT, SCRIPTS, TINY, command, flat, load, module, rows, run, same_state
from PIL import Image

FLAG_OF_A_PAPER = {"began": ("--gamma", "0.7"), "ebgan": ("--margin", "9"),
                   "unrolled_gan": ("--unroll-steps", "3"), "wgan_gp": ("--gp-weight", "5.0")}
BAD_FLAGS = {
    "began": [("--gamma", "1.5"), ("--gamma", "nan"), ("--lambda-k", "x"), ("--image-size", "48"), ("--eta", "3")],
    "ebgan": [("--margin", "-1"), ("--margin", "nan"), ("--pt-weight", "x"), ("--d-steps", "0"), ("--layers", "conv"),
              ("--image-size", "48")],
    "unrolled_gan": [("--data", "moon"), ("--prior-std", "-0.1"), ("--unroll-steps", "-1"), ("--activation", "elu"),
                     ("--g-loss", "hinge"), ("--lr", "0"), ("--d-layers", "0"), ("--input-scale", "0")],
    "wgan_gp": [("--lr", "1e-3:1,1e-4"), ("--lr", "2e-4~1e-4:1"), ("--n-critic", "0"),
                ("--dropout", "1"), ("--ema", "1.5"), ("--gp-weight", "-1"), ("--image-size", "48")],
}
IMAGES = [script for script in SCRIPTS if script != "unrolled_gan"]
ONE = ["began"]  # what only the plumbing decides, which is the same text in all four, is shown by one of them


def fails(capsys, script: str, *arguments: str) -> str:
    """The one line that the script ends with."""
    with pytest.raises(SystemExit) as stop:
        module(script).main([str(argument) for argument in arguments])
    error = capsys.readouterr().err + ("" if isinstance(stop.value.code, int) else stop.value.code + "\n")
    assert stop.value.code not in (0, None) and "Traceback" not in error
    return error.strip().split("\n")[-1]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data_flags):
    """One finished run of every script, in its own process, begun where --out is left to the script."""
    folders = {}
    for script in SCRIPTS:
        cwd = tmp_path_factory.mktemp(script)
        done = run(script, *TINY[script], *data_flags[script], cwd=cwd)
        assert done.returncode == 0, done.stderr
        folders[script] = cwd / "runs" / f"{script}-001", done.stdout
    return folders


@pytest.mark.parametrize("script", ["ebgan", "unrolled_gan"])
def test_one_rate_is_of_both_networks_and_three_are_refused(script, data_flags, tmp_path, capsys):
    flags = [*TINY[script], *data_flags[script], "--steps", "1", "--lr"]
    for folder, rates in dict(one=["5e-4"], two=["5e-4", "5e-4"], other=["5e-4", "1e-4"]).items():
        module(script).main([*flags, *rates, "--out", str(tmp_path / folder)])
    one, two, other = (load(tmp_path / f"{folder}/checkpoint.pt") for folder in ("one", "two", "other"))
    assert same_state(one, two) and not same_state(one, other)
    error = fails(capsys, script, *flags, "1e-3", "1e-3", "1e-3", "--out", tmp_path / "three")
    assert "--lr: 3 rates; accepted: one, or that of G and that of D" in error
    assert not (tmp_path / "three").exists()


def test_files_of_a_run(script, finished):
    folder, output = finished[script]
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 6 and config["out"] and "resume" not in config
    table = rows(folder)
    assert [row["step"] for row in table] == ["2", "4", "6"]
    assert all(torch.isfinite(torch.tensor(float(cell))) for row in table for cell in row.values())
    for name in ("000000", "000003", "000006", "real"):
        with Image.open(folder / f"samples/{name}.png") as image:
            darkest, lightest = image.convert("L").getextrema()
            assert darkest < lightest
    with Image.open(folder / "training.gif") as gif:
        assert gif.n_frames == 3
    with Image.open(folder / "curves.png") as chart:
        assert min(chart.size) > 200
    content = load(folder / "checkpoint.pt")
    assert content["script"] == script and int(content["state"]["step"]) == 6
    assert re.search(r"^6/6  .* steps/s  0 s left  ", output, re.M)
    assert not list(folder.rglob("*.tmp*"))


def test_the_same_command_takes_the_next_folder(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        folder = module(script).train(module(script).parser().settings([*flags, "--steps", "1"]))
        assert folder.name == f"{script}-00{count}"


def test_resume_ends_to_the_bit_where_one_run_ends(script, flags, tmp_path):
    main, whole, halves = module(script).main, tmp_path / "whole", tmp_path / "halves"
    main([*flags, "--out", str(whole)])
    main([*flags, "--out", str(halves), "--steps", "2"])
    main(["--resume", "--out", str(halves), "--steps", "6"])
    assert same_state(load(whole / "checkpoint.pt"), load(halves / "checkpoint.pt"))
    assert rows(whole) == rows(halves)


def test_seed_decides(script, flags, tmp_path):
    main = module(script).main
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main([*flags, "--steps", "2", "--seed", seed, "--out", str(tmp_path / name)])
    a, b, c = (load(tmp_path / name / "checkpoint.pt") for name in "abc")
    assert same_state(a, b) and not same_state(a, c)


def test_resume_rolls_back_to_a_kept_checkpoint(script, flags, tmp_path):
    main, out = module(script).main, tmp_path / "run"
    main([*flags, "--out", str(out), "--keep"])
    whole, table = load(out / "checkpoint.pt"), rows(out)
    assert sorted(path.name for path in out.glob("checkpoint-*.pt")) == [f"checkpoint-{n:06d}.pt" for n in (0, 2, 4, 6)]
    main(["--resume", "--checkpoint", str(out / "checkpoint-000002.pt")])
    assert same_state(whole, load(out / "checkpoint.pt")) and rows(out) == table


def test_resume_refuses_other_settings_by_name(script, flags, tmp_path, capsys):
    out, (flag, value) = tmp_path / "run", FLAG_OF_A_PAPER[script]
    module(script).main([*flags, "--steps", "2", "--out", str(out)])
    before = (out / "checkpoint.pt").read_bytes()
    resume = ["--resume", "--out", str(out)]
    assert re.search(rf"{flag}: the run has .*{value}", fails(capsys, script, *resume, flag, value))
    assert "--batch-size" in fails(capsys, script, *resume, "--batch-size", "8")
    assert "--steps" in fails(capsys, script, *resume, "--steps", "1")
    assert (out / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("script", ONE)
def test_killed_at_any_moment_it_resumes_to_the_same_end(script, flags, finished, tmp_path):
    """kill -9 at GAN_TEST_KILLS random moments, 3 unless set: no checkpoint is ever broken, and nothing is lost."""
    steps, rng = ["--steps", "300", "--save-every", "2", "--sample-every", "1000"], random.Random()
    module(script).main([*flags, *steps, "--out", str(tmp_path / "whole")])
    arguments = [*flags, *steps, "--out", "killed"]
    for _ in range(int(os.environ.get("GAN_TEST_KILLS", 3))):
        process = subprocess.Popen(command(script, *arguments), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert process.stdout.readline()  # it has begun
        while not (tmp_path / "killed/checkpoint.pt").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        load(tmp_path / "killed/checkpoint.pt")
        arguments = ["--resume", "--out", "killed"]
    assert run(script, *arguments, cwd=tmp_path).returncode == 0
    assert same_state(load(tmp_path / "whole/checkpoint.pt"), load(tmp_path / "killed/checkpoint.pt"))
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


def test_a_non_finite_state_is_not_saved(script, flags, tmp_path, capsys, monkeypatch):
    """The losses of a step are those before its update, so it is the state that must be looked at."""
    real, calls = torch.optim.Adam.step, []

    def broken(optimizer, *arguments):
        real(optimizer, *arguments)
        calls.append(1)
        if len(calls) > 12:
            optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    message = fails(capsys, script, *flags, "--steps", "40", "--log-every", "100", "--out", tmp_path / "run")
    assert re.search(r"step \d+: not finite: .*; the last good checkpoint is .*checkpoint.pt: .*--init-from", message)
    state = load(tmp_path / "run/checkpoint.pt")["state"]
    assert all(leaf.isfinite().all() for leaf in flat(state).values()) and 0 < int(state["step"]) < 40


@pytest.mark.parametrize("script", ONE)
def test_a_non_finite_metric_stops_with_its_name_and_step(script, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module(script), "reconstruction_loss", lambda x, y, eta: (x - y).mean() / 0)
    message = fails(capsys, script, *flags, "--save-every", "9", "--out", tmp_path / "run")
    assert re.search(r"step 2: not finite: loss_d nan, loss_real", message)


def close(one: dict, two: dict, within: float) -> bool:
    networks = [name for name in one["state"] if name in ("generator", "discriminator", "critic")]
    return bool(networks) and all(torch.allclose(value, two["state"][name][key], rtol=0, atol=within)
                                  for name in networks for key, value in one["state"][name].items())


def test_two_ranks_equal_one(script, flags, tmp_path):
    ten = [*flags, *RANKS.get(script, []), "--steps", "10", "--log-every", "5", "--save-every", "5"]
    done = run(script, *ten, "--out", "two", cwd=tmp_path, ranks=2)
    assert done.returncode == 0 and done.stdout.count("results are in") == 1
    module(script).main([*ten, "--out", str(tmp_path / "one")])
    assert close(load(tmp_path / "one/checkpoint.pt"), load(tmp_path / "two/checkpoint.pt"), 1e-5)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        one, two = ([float(cell) for cell in row.values()] for row in (one, two))
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert not close(load(tmp_path / "one/checkpoint.pt"), torch_zero(load(tmp_path / "two/checkpoint.pt")), 1e-5)


RANKS = {"ebgan": ["--no-batch-norm", "--pt-weight", "5"], "wgan_gp": ["--dropout", "0", "--no-stddev", "--lr", "1e-4"]}


def torch_zero(content: dict) -> dict:
    for name in ("generator", "discriminator", "critic"):
        for value in content["state"].get(name, {}).values():
            value.zero_()
    return content


@pytest.mark.parametrize("script", ONE)
def test_a_killed_rank_ends_the_run_and_leaves_a_checkpoint(script, flags, tmp_path):
    arguments = [*flags, "--steps", "100000", "--out", "run"]
    process = subprocess.Popen(command(script, *arguments, ranks=2), cwd=tmp_path, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not process.stdout.readline().startswith("4/"):
        pass
    children = subprocess.run(["pgrep", "-P", str(process.pid)], text=True, capture_output=True).stdout.split()
    subprocess.run(["kill", "-9", children[-1]], check=True)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert int(load(tmp_path / "run/checkpoint.pt")["state"]["step"]) >= 2


@pytest.mark.parametrize("script", ONE)
def test_ranks_must_share_the_batch(script, flags, tmp_path):
    done = run(script, *flags, "--batch-size", "3", cwd=tmp_path, ranks=2)
    assert done.returncode != 0 and "--batch-size: 3 is not a multiple of the 2 ranks" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_load_generator(script, finished):
    generator, config = module(script).load_generator(finished[script][0] / "checkpoint.pt")
    assert config["seed"] == 0 and not generator.training
    z = torch.zeros(3, config["latent"])
    assert torch.equal(generator(z), generator(z)) and len(generator(z)) == 3


@pytest.mark.parametrize("script", IMAGES)
def test_sample_writes_numbered_pictures(script, finished, tmp_path):
    checkpoint = ["--checkpoint", str(finished[script][0] / "checkpoint.pt"), "--device", "cpu"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        module(script).main([*checkpoint, "--sample", "5", "--seed", seed, "--out", str(tmp_path / name)])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [f"{index:05d}.png" for index in range(5)]
    a, b, c = ([(tmp_path / name / file).read_bytes() for file in files] for name in "abc")
    assert a == b and a != c and len(set(a)) == 5
    assert Image.open(tmp_path / "a/00000.png").size == (16, 16)


@pytest.mark.parametrize("script", IMAGES)
def test_sample_takes_the_newest_run_and_a_new_folder(script, finished, monkeypatch):
    folder = finished[script][0]
    monkeypatch.chdir(folder.parent.parent)
    for count in (1, 2):
        module(script).main(["--sample", "2"])
        assert len(list((folder / f"sample-00{count}").iterdir())) == 2
    shutil.rmtree(folder / "sample-001"), shutil.rmtree(folder / "sample-002")


@pytest.mark.parametrize("script", IMAGES)
def test_interpolate_writes_walks(script, finished, tmp_path):
    checkpoint = str(finished[script][0] / "checkpoint.pt")
    module(script).main(["--checkpoint", checkpoint, "--interpolate", "3", "--out", str(tmp_path / "walks")])
    with Image.open(tmp_path / "walks/walks.png") as image:
        assert image.width > image.height > 40


def test_bad_flags_are_named_with_what_is_accepted(script, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = [("--steps", "0"), ("--steps", "1.5"), ("--lr", "0"), ("--lr", "-1"), ("--lr", "nan"), ("--batch-size", "x"),
           ("--seed", "-1"), ("--device", "tpu"), ("--log-every", "0"), ("--sample", "0")]
    bad += [("--precision", "fp8")] if script in IMAGES else []
    for flag, value in bad + BAD_FLAGS[script]:
        message = fails(capsys, script, *flags, flag, value)
        assert f"argument {flag}" in message and value in message, message
        assert re.search("from .* to|choose from", message), message
    assert "unrecognized arguments: --no-such" in fails(capsys, script, "--no-such")
    if not torch.cuda.is_available():
        assert "--device: this machine has no cuda" in fails(capsys, script, *flags, "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_bad_checkpoints(script, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"no runs/{script}-*/checkpoint.pt in" in fails(capsys, script, "--sample", "1")
    assert f"no runs/{script}-*/checkpoint.pt in" in fails(capsys, script, "--resume")
    assert "nowhere" in fails(capsys, script, "--sample", "1", "--checkpoint", "nowhere/checkpoint.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert "text.pt' is not a checkpoint" in fails(capsys, script, "--sample", "1", "--checkpoint", "text.pt")
    whole = (finished[script][0] / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "half.pt' is not a checkpoint" in fails(capsys, script, "--resume", "--checkpoint", "half.pt")
    content = load(finished[script][0] / "checkpoint.pt") | {"script": "other"}
    torch.save(content, tmp_path / "other.pt")
    message = fails(capsys, script, "--resume", "--checkpoint", "other.pt")
    assert f"'other.pt' is not a checkpoint of {script}.py (ValueError: it is one of other.py)" in message
    assert "--checkpoint: only allowed with --resume" in fails(capsys, script, "--checkpoint", "half.pt")


def test_out_that_holds_something_is_refused(script, flags, finished, capsys):
    folder = finished[script][0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert f"--out: {folder} is not empty" in fails(capsys, script, *flags, "--out", folder)
    assert f"--out: {folder} is not empty" in fails(capsys, script, "--sample", "2", "--out", folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("script", IMAGES)
def test_bad_data_leaves_no_run_behind(script, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no such data: 'nowhere'" in fails(capsys, script, *flags, "--data", "nowhere")
    assert "no usable picture" in fails(capsys, script, *flags, "--data", "empty", "--data-root", "cache")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", IMAGES)
def test_trains_among_broken_pictures_as_without_them(script, flags, pictures, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(pictures, mixed)
    for index in range(10):
        (mixed / f"{index:02d}-broken.jpg").write_bytes(b"" if index % 2 else b"not a picture")
        (mixed / f"{index:02d}-half.png").write_bytes((pictures / "00.png").read_bytes()[:60])
    root = ["--data-root", str(tmp_path / "data"), "--steps", "2"]
    module(script).main([*flags, *root, "--out", str(tmp_path / "clean")])
    capsys.readouterr()
    module(script).main([*flags, *root, "--data", str(mixed), "--out", str(tmp_path / "run")])
    text = capsys.readouterr().err
    assert "20 skipped" in text and "00-broken.jpg" in text
    assert same_state(load(tmp_path / "clean/checkpoint.pt"), load(tmp_path / "run/checkpoint.pt"))


@pytest.mark.parametrize("script", IMAGES)
def test_the_same_step_runs_in_bf16_and_with_mirrored_images(script, flags, tmp_path):
    module(script).main([*flags, "--precision", "bf16", "--hflip", "--steps", "2", "--out", str(tmp_path / "run")])
    module(script).main([*flags, "--hflip", "--steps", "2", "--out", str(tmp_path / "fp32")])
    one, two = load(tmp_path / "run/checkpoint.pt"), load(tmp_path / "fp32/checkpoint.pt")
    assert not same_state(one, two)
    assert all(value.dtype in (torch.float32, torch.int64) for value in one["state"]["generator"].values())
