"""What a run of each script does: kills, damage, flags, ranks, graphs, odd outputs, the commands of the docstrings.

GAN_TEST_THOROUGH=1 kills a run at every file event; without it, at a few random ones.
"""

import ast
import builtins
import contextlib
import errno
import functools
import inspect
import io
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import socket
import subprocess
import symtable
import sys
import threading
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SCRIPTS, TINY, command, flat, load, module, rows, run, same_state
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Writes charts and GIFs without pictures, which would take most of the time."""
    def write(contents: list, path: Path, *_: object, **__: object) -> None:
        with common.atomic_write(path) as file:
            file.write(repr([getattr(item, "name", item) for item in contents]).encode())

    monkeypatch.setattr(common, "save_chart", write)
    monkeypatch.setattr(common, "save_gif", write)


@contextlib.contextmanager
def interrupted(script: str, step: int) -> Iterator[pytest.ExceptionInfo]:
    """Runs inside are stopped by Ctrl-C after this step, before they write anything for it."""
    def say(text: str, end: str = "\n") -> None:
        if text.startswith(f"{step}/") and end == "\r":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(module(script), "say", say)
        yield stop


@pytest.fixture(scope="module")
def runs(data_flags, tmp_path_factory) -> Callable[[str], Path]:
    """The folder with a script's run of 6 steps, "whole", and one that was interrupted after step 2, "half"."""
    @functools.cache
    def folder(script: str) -> Path:
        made, flags = tmp_path_factory.mktemp(script), [*TINY[script], *data_flags[script], "--out"]
        module(script).main([*flags, str(made / "whole")])
        with interrupted(script, 3):
            module(script).main([*flags, str(made / "half")])
        return made
    return folder


@pytest.fixture
def whole(script, runs) -> Path:
    return runs(script) / "whole"


@pytest.fixture
def half(script, runs, tmp_path) -> Path:
    """A copy of the interrupted run. Resumed, it must end as the whole one."""
    return shutil.copytree(runs(script) / "half", tmp_path / "half")


def same_end(one: Path, two: Path) -> bool:
    ends = load(one / "checkpoint.pt"), load(two / "checkpoint.pt")
    return same_state(*ends) and ends[0]["rows"] == ends[1]["rows"] and rows(one) == rows(two)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(script: str, old: str = "import common\n", new: str = "import common\n") -> types.ModuleType:
    """A copy of a script, compiled as with -OO and with a piece of its text replaced, as a module."""
    text, copy = (ROOT / f"{script}.py").read_text(), types.ModuleType("changed")
    assert text.count(old) == 1, f"{script}.py does not hold {old!r} once"
    exec(compile(text.replace(old, new), f"{script}.py", "exec", optimize=2), copy.__dict__)
    return copy


def refusal(script: str, *arguments: object) -> tuple[int, str]:
    """The exit status and the last line of the error with which a script refuses these arguments."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as text:
        module(script).main([str(argument) for argument in arguments])
    if isinstance(stop.value.code, int):
        return stop.value.code, text.getvalue().strip().rpartition("\n")[2]
    assert "\n" not in stop.value.code and len(stop.value.code) < 600
    return 1, stop.value.code


# ---- kills and intervals --------------------------------------------------------------------------------------------


def killed_at(event: int, out: Path, main: Callable, arguments: list[str]) -> int:
    """Run in a forked process that dies before this file event in ``out``. The exit status: 9, or 0 without a death."""
    def hook(name: str, details: tuple) -> None:
        if name in ("open", "os.rename", "os.remove", "os.mkdir") and str(details[0]).startswith(str(out)):
            if next(count) == event:
                os._exit(9)

    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BaseException):
        count, os.fsync = itertools.count(1), lambda _: hook("open", [out])
        sys.addaudithook(hook)
        main(arguments)
        os._exit(0)
    os._exit(1)


def test_killed_at_any_file_event(script, flags, half, whole, tmp_path):
    main, out, resume = module(script).main, tmp_path / "run", ["--resume", "--keep", "--out", str(tmp_path / "run")]
    for arguments in [*flags, "--keep", "--out", str(out)], resume:
        thorough = "GAN_TEST_THOROUGH" in os.environ
        for event in itertools.count(1) if thorough else sorted(random.sample(range(1, 70), 2)):
            shutil.rmtree(out, ignore_errors=True)
            if arguments is resume:
                shutil.copytree(half, out)
            if (status := killed_at(event, out, main, arguments)) == 0:
                break
            again = resume if (out / "checkpoint.pt").exists() else arguments
            if again is not resume:
                shutil.rmtree(out, ignore_errors=True)
            main(again)
            names = {path.name for path in out.rglob("*") if path.is_file()}
            assert status == 9 and same_end(out, whole) and not [name for name in names if name[0] == "."], event
            assert names >= {"checkpoint-000006.pt", "000002.png", "000004.png", "training.gif", "curves.png"}, event
        print(f"{script}: {event - 1} file events")


def test_every_changes_nothing_in_the_training(script, flags, tmp_path):
    main = module(script).main
    for every in "1", "2", "5":
        main([*flags, "--every", every, "--out", str(tmp_path / every)])
    with interrupted(script, 4):
        main([*flags, "--every", "3", "--out", str(tmp_path / "mixed")])
    main(["--resume", "--every", "4", "--out", str(tmp_path / "mixed")])
    main([*flags, "--seed", "1", "--out", str(tmp_path / "seed")])
    each = rows(tmp_path / "1")
    for name, steps in {"2": [2, 4, 6], "5": [5, 6], "mixed": [3, 4, 6], "seed": [2, 4, 6]}.items():
        same = same_state(load(tmp_path / "1/checkpoint.pt"), load(tmp_path / name / "checkpoint.pt"))
        assert same == (name != "seed") and [int(row["step"]) for row in rows(tmp_path / name)] == steps
        for first, last, row in zip([0, *steps], steps, rows(tmp_path / name)) if same else ():
            for metric in module(script).METRICS:
                mean = sum(float(one[metric]) for one in each[first:last]) / (last - first)
                assert float(row[metric]) == pytest.approx(mean, rel=1e-4, abs=1e-6), (row, metric)


# ---- checkpoints and flags ------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("trap",)


def faults(good: bytes) -> Iterator[tuple[bytes, str]]:
    """Files that are no checkpoint, and what the error says."""
    def pack(item: object) -> bytes:
        torch.save(item, file := io.BytesIO())
        return file.getvalue()

    def edit(*path: str, **new: object) -> bytes:
        """The checkpoint with other entries in one of its dicts; without those that are given as Ellipsis."""
        place = content = torch.load(io.BytesIO(good), weights_only=True)
        for key in path:
            place = place[key]
        place.update(new)
        for key in [key for key, value in place.items() if value is ...]:
            del place[key]
        return pack(content)

    archive, content = zipfile.ZipFile(io.BytesIO(good)), torch.load(io.BytesIO(good), weights_only=True)
    adam = next(name for name, item in content["state"].items() if isinstance(item, dict) and "param_groups" in item)
    for record in random.sample([item for item in archive.infolist() if item.file_size > 60], 3):
        place = good.index(archive.read(record)) + random.randrange(60)
        yield good[:place] + bytes([good[place] ^ 16]) + good[place + 1:], "it is damaged"
    for text in b"", b"text", good[:len(good) // 2], pickle.dumps(Trap()):
        yield text, "not a zip file"
    for item in Trap(), {"script": Trap()}:
        yield pack(item), "Weights only load failed"
    yield pack([1, 2]), "not a checkpoint"
    yield edit(script="other"), "it is of other.py"
    yield edit("settings", seed=...), "of another version, with other settings (seed)"
    yield edit("settings", log_every=1), "of another version, with other settings (log_every)"
    yield edit(settings=3), "not a checkpoint"
    for name, value in dict(seed="0", data=None, betas=0.5, graph=1, every=2.0).items():
        yield edit("settings", **{name: value}), f"its setting {name} is {value!r}"
    for bad in dict(exp_avg=...), dict(exp_avg=torch.zeros(2)), dict(more=torch.zeros(2)):
        yield edit("state", adam, "state", 0, **bad), "Adam's moments do not fit the weights"
    yield edit("state", adam, state={}), "Adam's moments do not fit the weights"
    yield edit("state", generator={}), "Missing key"
    yield edit("state", generator=...), "'generator'"


def test_bad_checkpoints_are_refused_in_a_line(script, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bad, message in faults((half / "checkpoint.pt").read_bytes()):
        (half / "checkpoint.pt").write_bytes(bad)
        before = contents(half)
        status, text = refusal(script, "--resume", "--out", half)
        assert status == 1 and message in text and f"'{half}/checkpoint.pt'" in text, (message, text)
        assert contents(half) == before and os.listdir() == ["half"]


def test_flags_win_over_the_settings_of_a_resumed_run(script, half, whole, tmp_path, monkeypatch):
    save, groups = module(script).save, []

    def spy(args: object, step: int, state: dict, rows: list) -> None:
        groups.extend(item.param_groups[0].copy() for item in state.values() if isinstance(item, torch.optim.Adam))
        save(args, step, state, rows)

    content = load(half / "checkpoint.pt")
    for item in content["state"].values():
        if isinstance(item, dict) and "param_groups" in item:
            item["param_groups"][0].update(capturable=True, fused=False, weight_decay=0.5, lr=9.0, betas=(0.0, 0.0))
    torch.save(content, half / "checkpoint.pt")  # as from another device, with values that nobody asks for
    module(script).main(["--resume", "--out", str(half)])
    assert same_end(half, whole)
    monkeypatch.setattr(module(script), "save", spy)
    module(script).main(["--resume", "--out", str(half), "--steps", "8", "--lr", "7e-3", "--betas", "0.3", "0.8"])
    assert groups and all(group["betas"] == (0.3, 0.8) and not group["capturable"] for group in groups)
    settings, own = load(half / "checkpoint.pt")["settings"], load(whole / "checkpoint.pt")["settings"]
    assert {name for name in own if settings[name] != own[name]} == {"steps", "lr", "betas"}
    if "lr" in module(script).METRICS:
        assert float(rows(half)[-1]["lr"]) != float(rows(half)[-2]["lr"]) or script == "began"


def test_networks_of_another_shape_are_refused_by_name(script, whole, tmp_path):
    settings, before = load(whole / "checkpoint.pt")["settings"], contents(whole)
    actions = {action.dest: action for action in module(script).make_parser()._actions}
    for name in module(script).NETWORK_FLAGS:
        value, options, choices = settings[name], actions[name].option_strings, actions[name].choices
        other = next((choice for choice in choices or [2 * value] if choice and choice != value), 1)
        flag = [options[0], other]
        if isinstance(value, bool):
            other, flag = not value, [options[value]]
        message = f"argument --{name.replace('_', '-')}: the saved networks have {value}, not {other}"
        for use in ["--resume", "--out", whole], ["--init-from", whole, "--out", tmp_path / "new"]:
            status, text = refusal(script, *use, *flag)
            assert status == 2 and message in text and contents(whole) == before and not os.listdir(tmp_path), text


def test_init_from_takes_the_weights_and_their_shape_alone(script, data_flags, pictures, whole, tmp_path, monkeypatch):
    """Of a folder or a file, where ~ is the home wherever a path is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(whole, "home/old")
    shutil.copytree(pictures, "home/photos")
    settings, old = (load(whole / "checkpoint.pt")[name] for name in ("settings", "state"))
    flags = [*data_flags[script], *"--device cpu --batch-size 4 --steps 2 --every 2".split()]
    flags += [] if script == "unrolled_gan" else ["--data=~/photos", "--data-root=~/cache"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", lambda adam: None)
        patch.setattr(module(script), "check_finite", lambda step, metrics, networks: found.append(networks))
        found = []
        for path in "~/old", "~/old/checkpoint.pt":
            module(script).main([*flags, f"--init-from={path}", f"--out=~/from {Path(path).name}"])
            for network, item in found.pop().items():
                for name, value in item.named_parameters():
                    assert torch.allclose(value, old[network][name], atol=2e-2 if network == "averaged" else 0), name
            content = load(Path("home", f"from {Path(path).name}", "checkpoint.pt"))
            new = content["settings"]
            assert content["step"] == 2 and new["width" if "width" in new else "g_width"] in (2, 4, 8)
            assert {name for name in settings if new[name] != settings[name]} > {"steps"} and new["latent"] < 9
    module(script).main(["--sample", "2", "--out=~/old"])
    module(script).load_generator("~/old")
    assert os.listdir() == ["home"]


BAD = [("--steps", "0"), ("--steps", "1.5"), ("--lr", "nan"), ("--lr", "-1"), ("--batch-size", "x"), ("--every", "0"),
       ("--batch-size", "0"), ("--seed", "-1"), ("--seed", "4294967296"), ("--device", "tpu"), ("--out", ""),
       ("--data", ""), ("--data-root", ""), ("--init-from", ""), ("--betas", "0.5"), ("--latent", "0"),
       ("--image-size", "48"), ("--channels", "2"), ("--sample", "x")]
ODD = ["", " ", "x", "nan", "inf", "-1", "0", "1e99", "9" * 5000, "\0", "\n", "\udcff", "%s", "1,2", "1~2:3"]


def test_bad_flags_are_named(script, flags, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actions, before = module(script).make_parser()._actions, contents(half)
    for flag, value in BAD:
        if flag in [action.option_strings[0] for action in actions]:
            status, text = refusal(script, *flags, flag, value)
            assert status == 2 and f"argument {flag}: " in text, text
    for arguments, message in {
            ("--log-every", "5"): "unrecognized arguments", ("--resume", "--sample", "1"): "not allowed with",
            (*flags, "--out", "half"): "argument --out: 'half' is not empty",
            ("--resume", "--out", "no"): "no checkpoint 'no'",
            ("--init-from", "half", "--out", "half"): "is not empty", ("--init-from", "no"): "no checkpoint 'no'",
            ("--resume",): f"{script}.py: error: ", ("--sample", "1"): f"{script}.py: error: "}.items():
        assert message in refusal(script, *arguments)[1]
    for action in actions[1:]:
        for value in ODD if action.nargs != 0 else ():
            with contextlib.suppress(SystemExit, OSError, ValueError), contextlib.redirect_stderr(io.StringIO()):
                module(script).read_flags([*flags, f"{action.option_strings[0]}={value}"])
    if not torch.cuda.is_available():
        assert "argument --device: this machine has no cuda" in refusal(script, *flags, "--device", "cuda")[1]
    monkeypatch.setattr(module(script), "WORLD", 3)
    assert "--batch-size: 4 is not a multiple of the 3 ranks" in refusal(script, *flags)[1]
    assert os.listdir() == ["half"] and contents(half) == before


# ---- interruptions, threads, outputs --------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(script, flags, half, whole, tmp_path):
    with interrupted(script, 2) as stop:
        module(script).main([*flags, "--out", str(tmp_path / "new")])
    assert stop.value.code == "stopped before the first checkpoint, so nothing has been saved"
    half.rename(tmp_path / "ha lf")
    with interrupted(script, 5) as stop:
        module(script).main(["--resume", "--out", str(tmp_path / "ha lf")])
    python, name, *arguments = shlex.split(stop.value.code.removeprefix("stopped; to continue training: "))
    module(script).main(arguments)
    assert python == "python" and Path(name).name == f"{script}.py" and same_end(tmp_path / "ha lf", whole)


def test_a_copy_goes_on_in_a_thread(script, half, whole):
    """Under another name, with -OO, it reads the original's checkpoint and then its own."""
    copy = changed(script)
    for steps in "4", "6":
        thread = threading.Thread(target=copy.main, args=[["--resume", "--out", str(half), "--steps", steps]])
        thread.start()
        thread.join()
    assert same_end(half, whole)


class Output(io.StringIO):
    """A standard output that may be a terminal, and may fail after step 3."""

    def __init__(self, terminal: bool = False, failure: Exception | None = None):
        super().__init__()
        self.isatty, self.failure = lambda: terminal, failure

    def write(self, text: str) -> int:
        if self.failure and text.startswith("4/"):
            raise self.failure
        return super().write(text)


def test_whatever_becomes_of_the_output_the_run_goes_on(script, half, whole, tmp_path, monkeypatch):
    plain, narrow = types.SimpleNamespace(write=len, flush=list), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    closed, terminal = Output(), Output(True)
    closed.close()
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)  # a clock that stands still
    for count, output in enumerate([None, plain, narrow, closed, terminal, Output(True, BrokenPipeError())]):
        out = shutil.copytree(half, tmp_path / f"h\xe4lf {count}")
        monkeypatch.setattr(sys, "stdout", output)
        module(script).main(["--resume", "--out", str(out)])
        assert same_end(out, whole)
    monkeypatch.undo()
    assert "h\\xe4lf 2: step 2 to 6" in narrow.buffer.getvalue().decode()
    lines = terminal.getvalue().splitlines(True)
    assert [line for line in lines if line[-1] == "\r"] == [f"{step}/6\r" for step in (3, 4, 5, 6)]
    assert re.match(r"6/6  \S+ steps/s  0:00:00 left  .*\n", lines[-2])




@pytest.mark.parametrize("script", ["began"])  # one is enough for the interpreter's own end
def test_the_exit_status_without_a_reader(script, half):
    process = subprocess.Popen(command(script, "--resume", "--out", str(half)), env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait() == 0


def test_files_that_cannot_be_written(script, half, whole, capsys, monkeypatch):
    """Pictures, charts and tables are a warning; a checkpoint ends the run with a line, and the last one stays."""
    names = ["metrics.csv", "curves.png", "samples/real.png", "samples/000004.png", "training.gif"]
    for name in names:
        (half / name).unlink(missing_ok=True)
        (half / name).mkdir()
    module(script).main(["--resume", "--steps", "4", "--out", str(half)])
    errors = capsys.readouterr().err
    assert all(str(half / name) in errors for name in names) and "Traceback" not in errors

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (half / "checkpoint.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        status, text = refusal(script, "--resume", "--steps", "6", "--out", half)
    assert status == 1 and f"cannot write '{half}/checkpoint.pt': " in text and "No space left on device" in text
    assert (half / "checkpoint.pt").read_bytes() == before and not list(half.rglob(".*"))
    module(script).main(["--resume", "--steps", "6", "--out", str(half)])
    assert same_state(load(half / "checkpoint.pt"), load(whole / "checkpoint.pt"))


# ---- ranks ----------------------------------------------------------------------------------------------------------


def two_ranks(script: str, folder: Path, *arguments: object, before: Callable = lambda rank: None) -> list[tuple]:
    """Run a script in two forked processes, as torchrun starts it; the exit status and the output of each."""
    def act(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sys.stdout = sys.stderr = open(folder / f"rank-{rank}", "w", buffering=1)
        module(script).WORLD, module(script).RANK = 2, rank
        before(rank)
        module(script).main([str(argument) for argument in arguments])

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [multiprocessing.get_context("fork").Process(target=act, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [(process.exitcode, (folder / f"rank-{rank}").read_text()) for rank, process in enumerate(processes)]


def test_two_ranks_average_their_gradients(script, flags, tmp_path):
    """They draw different numbers, apply the same gradients, have the same weights, and only rank 0 writes."""
    def before(rank: int) -> None:
        def reduce(tensors: list[Tensor]) -> None:
            own = [tensor.clone() for tensor in tensors]
            all_reduce_mean(tensors)
            calls.append((own, [tensor.clone() for tensor in tensors]))

        def check(step: int, metrics: dict, networks: dict) -> None:
            check_finite(step, metrics, networks)
            weights = [tensor for network in networks.values() for tensor in network.parameters()]
            torch.save((calls, metrics, weights), tmp_path / f"{rank}.pt")

        def replace(source: object, target: object) -> None:
            assert rank == 0, target
            os_replace(source, target)

        calls, os_replace, os.replace = [], os.replace, replace
        all_reduce_mean, check_finite = module(script).all_reduce_mean, module(script).check_finite
        module(script).all_reduce_mean, module(script).check_finite = reduce, check

    out = tmp_path / "run"
    ends = two_ranks(script, tmp_path, *flags, "--steps", "2", "--out", out, before=before)
    assert [status for status, _ in ends] == [0, 0], ends
    assert "the results are in" in ends[0][1] and ends[1][1] == ""
    calls, metrics, weights = load(tmp_path / "0.pt")
    other_calls, other_metrics, other_weights = load(tmp_path / "1.pt")
    assert len(calls) == len(other_calls) > 2 and metrics == other_metrics
    assert all(map(torch.equal, weights, other_weights))
    differ = set()
    for (own, mean), (other_own, other_mean) in zip(calls, other_calls):
        for one, two, mean, other_mean in zip(own, other_own, mean, other_mean, strict=True):
            assert torch.equal(mean, other_mean) and torch.allclose(mean, (one + two) / 2, atol=1e-6)
            if not torch.equal(one, two):
                differ.add(mean.shape)
    trained = {value.shape for name, value in flat(load(out / "checkpoint.pt")["state"]).items() if "exp_avg" in name}
    assert trained <= differ


def test_two_ranks_are_killed_and_go_on(script, flags, tmp_path):
    def die(rank: int) -> None:
        module(script).say = lambda text, end="\n": text.startswith("3/") and os._exit(9)

    whole, half = tmp_path / "whole", tmp_path / "half"
    assert [status for status, _ in two_ranks(script, tmp_path, *flags, "--out", whole)] == [0, 0]
    assert [status for status, _ in two_ranks(script, tmp_path, *flags, "--out", half, before=die)] == [9, 9]
    assert load(half / "checkpoint.pt")["step"] == 2
    ends = two_ranks(script, tmp_path, "--resume", "--out", half)
    assert [status for status, _ in ends] == [0, 0] and same_end(half, whole), ends


@pytest.mark.parametrize("metrics", [True, False])
def test_nan_stops_a_run_and_keeps_the_last_checkpoint(script, metrics, flags, half, tmp_path, monkeypatch):
    def reduce(tensors: list[Tensor]) -> None:
        is_total = len(tensors) == 1 and tensors[0].shape == (len(this.METRICS),)
        if torch.initial_seed() // this.WORLD == 3 and is_total == metrics and this.RANK == 0:  # in the fourth step
            tensors[0][-1] = math.nan
        average(tensors)

    this, average = module(script), module(script).all_reduce_mean
    monkeypatch.setattr(this, "all_reduce_mean", reduce)
    status, text = refusal(script, *flags, "--out", tmp_path / "run")
    assert status == 1 and re.search(r"step 4: .* not finite.*--init-from", text)
    assert same_state(load(tmp_path / "run/checkpoint.pt"), load(half / "checkpoint.pt"))
    for status, text in two_ranks(script, tmp_path, *flags, "--out", tmp_path / "two") if not metrics else ():
        assert status == 1 and "Traceback" not in text and re.search("error: step 4: .* not finite", text), text
        assert load(tmp_path / "two/checkpoint.pt")["step"] == 2


# ---- CUDA graphs without a GPU --------------------------------------------------------------------------------------

HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class Graph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: records a step operation by operation on the CPU, and replays that.

    A graph repeats the device's work alone. What Python does in a step (a counter, an ``if``, a number read back)
    happens once, while it is recorded, and would be wrong in every replay.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        name = operation._schema.name
        if name in HOST_READS:
            raise RuntimeError(f"{name}: the host cannot wait for the device while a graph is captured\nand more")
        outputs = operation(*inputs, **(options or {}))
        self.operations.append((operation, inputs, options or {}, outputs))
        return outputs

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # a capture on CUDA runs nothing; this one has run, so the first replay is done
            return
        for operation, inputs, options, outputs in self.operations:
            with torch._C._AutoDispatchBelowAutograd():  # the operations of backward have been recorded themselves
                again = operation(*inputs, **options)
            if any(result.alias_info for result in operation._schema.returns) or not operation._schema.returns:
                continue  # a view, or a change in place: what it shows has changed already
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.data.copy_(new)


@contextlib.contextmanager
def graphs(script: str, monkeypatch) -> Iterator[tuple[types.ModuleType, list[Graph]]]:
    """A copy of the script that captures its step on the CPU, and the graphs that it captures."""
    @contextlib.contextmanager
    def capture(graph: Graph, **_: object) -> Iterator[None]:
        captured.append(graph)
        with graph, torch.device("meta"):  # a tensor made without ``device=`` would not lie on the GPU, nor here
            yield

    captured = []
    for name, stand_in in dict(CUDAGraph=Graph, graph=capture, current_stream=object).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield changed(script, 'args.graph and device.type == "cuda"', "args.graph"), captured


@pytest.mark.parametrize("script, more", [
    ("began", "--residual-steps 6"), ("began", "--precision bf16 --hflip --lr-patience 1"), ("ebgan", "--d-steps 2"),
    ("ebgan", "--precision bf16 --layers paper"), ("unrolled_gan", "--unroll-steps 0 --data grid"),
    ("unrolled_gan", "--fresh --g-loss saddle"), ("unrolled_gan", "PICTURES HOST --fresh"), ("wgan_gp", "HOST"),
    ("wgan_gp", "--precision bf16 --augment")])
def test_replays_equal_eager_steps(script, more, flags, pictures, tmp_path, monkeypatch):
    if "HOST" in more:  # which fills in the batches before every step
        from_host = functools.partialmethod(common.Batches.__init__, resident=False)
        monkeypatch.setattr(common.Batches, "__init__", from_host)
    more = more.replace("PICTURES", f"--data {pictures} --data-root {tmp_path} --image-size 16 --d-width 2")
    flags = [*flags, "--steps", "7", *more.replace("HOST", "").split(), "--out"]
    with graphs(script, monkeypatch) as (copy, captured):
        copy.main([*flags, str(tmp_path / "eager"), "--no-graph"])
        assert not captured
        copy.main([*flags, str(tmp_path / "replayed")])
    assert [graph.replays for graph in captured] == [4]  # after three steps that warm up
    assert same_end(tmp_path / "eager", tmp_path / "replayed")


def test_a_failed_capture_goes_on_eagerly(script, flags, whole, tmp_path, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with graphs(script, monkeypatch) as (copy, _):
        monkeypatch.setattr(torch.cuda, "graph", fail)
        copy.main([*flags, "--out", str(tmp_path / "failed")])
    assert "no CUDA graph, so the steps run one operation at a time: operation not permitted when stream is cap" in (
        output := capsys.readouterr().out) and "and more" not in output
    assert same_end(tmp_path / "failed", whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_equal_eager_steps_on_a_gpu(script, flags, tmp_path):
    for name, more in dict(replayed=[], eager=["--no-graph"]).items():
        module(script).main([*flags, "--device", "cuda", "--steps", "8", *more, "--out", str(tmp_path / name)])
    one, two = (load(tmp_path / name / "checkpoint.pt")["state"]["generator"] for name in ("replayed", "eager"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-4)  # Adam's eight steps are ten times as far, or more


# ---- the text of the scripts ----------------------------------------------------------------------------------------


def test_what_is_the_same_in_all_scripts_is_the_same_text(script):
    ends = {"# ---- device, ranks, checkpoints": "# ---- sampling", "WORLD = ": "# ---- networks",
            "    elif args.out and": "    args = parser.parse", "    for name, value in vars(args)": "    if args.",
            "def main(": "        action =", '        say(f"the results': "if __name__"}
    texts = [(ROOT / f"{name}.py").read_text() for name in (script, "began")]
    for first, last in ends.items():
        one, two = (text[text.index(first):text.index(last, text.index(first))] for text in texts)
        assert one == two
    if script != "unrolled_gan":
        assert inspect.getsource(module(script).update_ema) == inspect.getsource(module("began").update_ema)


def unknown(table: symtable.SymbolTable, known: set[str]) -> set[str]:
    """The global names that a text uses, without those that are known."""
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced() and symbol.is_global()}
    return (used - known).union(*(unknown(child, known) for child in table.get_children()))


def test_networks_and_losses_can_be_pasted(script):
    """What stands between the two lines needs the imports that README.md names, and nothing else."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    imports, = [block for block in blocks if "import torch.nn.functional as F" in block]
    text, pasted = (ROOT / f"{script}.py").read_text(), {}
    text = imports + text[text.index("# ---- networks"):text.index("# ---- training")]
    exec(text, pasted)
    assert not unknown(symtable.symtable(text, "pasted", "exec"), pasted.keys() | vars(builtins).keys())


def test_the_card():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.split()
    scripts = {f"{script}.py" for script in SCRIPTS}
    assert {name.split("/")[0] for name in tracked if name[0] != "."} <= {
        *scripts, "common.py", "requirements.txt", "README.md", "tests"}
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [line.partition(">=")[0] for line in lines] == ["torch", "torchvision", "numpy", "pillow"]
    for name in *scripts, "common.py":
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        known = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL"}
        assert {name.split(".")[0] for name in names} - known == ({"common"} if name in scripts else set()), name


def test_importing_runs_nothing_and_help_comes_soon(tmp_path):
    def seconds(code: str) -> float:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, "--no-such-flag"], cwd=tmp_path, text=True,
                              env=ENVIRONMENT | {"RANK": "1"}, capture_output=True)  # but no WORLD_SIZE
        assert (done.returncode, done.stdout, done.stderr, os.listdir(tmp_path)) == (0, "", "", [])
        return time.perf_counter() - began

    helps = "".join(f"import {script}; {script}.make_parser().format_help(); assert {script}.RANK == 0; "
                    for script in SCRIPTS)
    assert seconds(helps + "assert 'torchvision' not in sys.modules".replace("sys", "began.sys")) < (
        2 + 2 * seconds("import torch"))
    for script in SCRIPTS:
        flags = re.findall(r'add\("(--[a-z-]+)"', inspect.getsource(module(script).make_parser))
        text = module(script).make_parser().format_help()
        assert len(flags) > 25 and not [flag for flag in flags if f"  {flag}" not in text]


def commands(script: str) -> list[list[str]]:
    """The commands in a script's docstring, as words, without comments."""
    text = module(script).__doc__.replace("\\\n", " ")
    lines = [part.strip() for line in text.splitlines() for part in line.partition("#")[0].split(";")]
    return [shlex.split(line) for line in lines if line.startswith(("python ", "torchrun "))]


def test_the_commands_of_the_docstring(script, pictures, tmp_path, monkeypatch):
    """At toy size, then resumed: a rate above 0, an average whose buffers move, the flags that were given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "photos")
    np.save("points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    parser = module(script).make_parser()
    given, default = (lambda words: vars(parser.parse_args(words))), vars(parser.parse_args([]))
    for launcher, *words in commands(script):
        words, more = words[words.index(f"{script}.py") + 1:], [*TINY[script], "--data-root", "cache"]
        if script != "unrolled_gan" or given(words)["data"] == "stacked-mnist":
            more += ["--data", "photos"]  # instead of downloads, and of pictures that take long to draw
        if script == "wgan_gp":  # which can grow, from 32 pixels on
            more += ["--image-size", "64" if "--init-from" in words else "32"]
        before = set(Path().glob("runs/*"))
        if {"--resume", "--sample", "--interpolate", "--embed"} & set(words):
            module(script).main([*words, *(["--sample", "3"] if "--sample" in words else [])])
            continue
        if launcher == "torchrun":
            done = run(script, *words, *more, cwd=tmp_path, ranks=2)
            assert done.returncode == 0 and done.stdout.count("the results are in") == 1, done.stderr
        else:
            module(script).main([*words, *more])
        folder, = set(Path().glob("runs/*")) - before
        module(script).main(["--resume", "--out", str(folder), "--steps", "8"])
        content, table = load(folder / "checkpoint.pt"), rows(folder)
        wanted = {name: value for name, value in given(words).items() if value == given([*words, *more])[name]}
        wanted = {name: value for name, value in wanted.items() if value != default.get(name) and name in default}
        assert content["step"] == 8 and {name: content["settings"][name] for name in wanted} == wanted
        assert [row["step"] for row in table] == ["2", "4", "6", "8"] and not list(folder.rglob(".*"))
        assert all(float(row.get("lr", 1)) > 0 for row in table)
        generator, settings = module(script).load_generator(folder)
        z, state = torch.zeros(3, settings["latent"]), content["state"]
        assert not generator.training and torch.equal(generator(z), generator(z)) and len(generator(z)) == 3
        if averaged := state.get("averaged"):
            assert all(torch.equal(value, averaged[name]) for name, value in generator.state_dict().items())
            for name, _ in generator.named_buffers():
                assert name not in averaged or torch.allclose(averaged[name], state["generator"][name], atol=0.1), name
    for path in "samples/000002.png", "samples/real.png":
        with Image.open(folder / path) as image:
            low, high = image.convert("L").getextrema()
            assert low < high
