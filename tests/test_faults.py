"""What happens to runs in the wild: kills, full disks, damaged files, signals, races, many nodes. Nothing is lost, and
whatever ends a run says so in one line. GAN_TEST_THOROUGH=1 tries every case; without it a few at random."""

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import pty
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SCRIPTS, TINY, load, module, rows, run, same_state
from PIL import Image

THOROUGH = "GAN_TEST_THOROUGH" in os.environ
ONE, IMAGES = ["began"], [script for script in SCRIPTS if script != "unrolled_gan"]
ENDLESS = ["--steps", "1000000", *(f"--{what}-every={10**6}" for what in ("log", "sample", "save"))]


def some(cases: list, count: int) -> list:
    return cases if THOROUGH else random.sample(cases, min(count, len(cases)))


@contextlib.contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Runs inside end when they come to this step, with nothing saved since the last checkpoint."""
    def add(record, *arguments):
        if arguments[0] == step:
            raise KeyboardInterrupt
        real(record, *arguments)

    real = common.Record.add
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
        patch.setattr(common.Record, "add", add)
        yield


@pytest.fixture(scope="module")
def runs(data_flags, tmp_path_factory) -> Callable[[str], Path]:
    """The folder with a script's run of 6 steps, "whole", and one that was interrupted after 2, "half"."""
    @functools.cache
    def folder(script: str) -> Path:
        made = tmp_path_factory.mktemp(script)
        flags = [*TINY[script], *data_flags[script], "--out"]
        module(script).main([*flags, str(made / "whole")])
        with interrupted_at(3):
            module(script).main([*flags, str(made / "half")])
        return made
    return folder


@pytest.fixture
def whole(script, runs) -> Path:
    return runs(script) / "whole"


@pytest.fixture
def half(script, runs, tmp_path) -> Path:
    """A copy of the half run, which resumed must end as the whole one."""
    return shutil.copytree(runs(script) / "half", tmp_path / "half")


def same_end(one: Path, two: Path) -> bool:
    return same_state(load(one / "checkpoint.pt"), load(two / "checkpoint.pt")) and rows(one) == rows(two)


def last_step(folder: Path) -> int:
    return int(load(folder / "checkpoint.pt")["state"]["step"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Child:
    """A call in a forked process, which may be killed or die without harm to the others, and need not import torch."""

    def __init__(self, folder: Path, act: Callable, *arguments: object):
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        self.log.touch()
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(act, *arguments))
        self.process.start()

    def _run(self, act: Callable, *arguments: object) -> None:
        sys.stdout = sys.stderr = open(self.log, "w", buffering=1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.cuda.is_available = bool  # a GPU that the parent uses cannot be used here
        act(*arguments)

    def wait_for(self, path: Path) -> None:
        while self.process.is_alive() and not path.exists():
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        """The exit status and all that it printed."""
        self.process.join(None if THOROUGH else 200)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self.log.read_text()


def endless(script: str, flags: list[str], out: Path, before: Callable = list) -> Child:
    """A run that will not end or save by itself, some steps after its beginning."""
    def act():
        before()
        module(script).main([*flags, *ENDLESS, "--out", str(out)])

    child = Child(out.parent, act)
    child.wait_for(out / "samples/000000.png")
    time.sleep(0.5)
    return child


def line(script: str, *arguments: object) -> str:
    """The one line with which the script refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        module(script).main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code.strip()
    return stop.value.code


# ---- files and checkpoints ------------------------------------------------------------------------------------------

TABLES = {  # what may have become of metrics.csv
    "gone": None, "empty": lambda old: b"", "binary": lambda old: bytes(range(256)),
    "BOM": lambda old: b"\xef\xbb\xbf" + old, "torn header": lambda old: old[:8],
    "CRLF": lambda old: old.replace(b"\n", b"\r\n"), "torn row": lambda old: old[:-5], "torn end": lambda old: old[:-1],
    "other columns": lambda old: b"a,b\n1,2\n", "semicolons": lambda old: old.replace(b",", b";"),
    "no numbers": lambda old: old.replace(b"\n2,", b"\nx,"), "no clock": lambda old: old[:-2] + b"x\n",
    "later rows": lambda old: old + old.split(b"\n")[1].replace(b"2,", b"4,", 1) + b"\n"}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("script", ONE)
def test_side_files_never_stand_in_the_way(script, table, half, whole, capsys):
    change, old = TABLES[table], (half / "metrics.csv").read_bytes()
    (half / "metrics.csv").unlink() if change is None else (half / "metrics.csv").write_bytes(change(old))
    picture = half / "samples/000000.png"
    picture.write_bytes(picture.read_bytes()[:-100])
    shutil.copy(half / "samples/real.png", half / "samples/000002 copy.png")
    (half / "samples/000001.png").mkdir()
    module(script).main(["--resume", "--out", str(half)])
    assert same_state(load(half / "checkpoint.pt"), load(whole / "checkpoint.pt"))
    kept = rows(whole) if table in ("BOM", "CRLF", "later rows") else rows(whole)[1:]
    assert rows(half) == kept
    aside = table not in ("gone", "BOM", "CRLF", "torn row", "torn end", "later rows")
    assert (half / "metrics-unreadable.csv").exists() == aside == ("metrics-unreadable" in capsys.readouterr().err)
    with Image.open(half / "training.gif") as gif:
        assert gif.n_frames == 2  # steps 3 and 6


def test_frames_of_long_runs(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    for name in ("000500", "099500", "100000", "1000000", "2000000", "real", "000002 copy"):
        (tmp_path / f"samples/{name}.png").touch()
    record = common.Record("x", {"out": str(tmp_path), "steps": 10**6}, [], torch.device("cpu"), torch.zeros(1))
    record.state["step"].fill_(10**6)
    with record:
        assert [path.stem for path in record.frames()] == ["000500", "099500", "100000", "1000000"]


def killed_at(event: int, folder: Path, act: Callable, *arguments: object) -> None:
    """Call act, but die at this file event in the folder; without one, print how many there are."""
    count = itertools.count(1)

    def hook(name: str, details: tuple) -> None:
        if name in ("open", "os.rename", "os.remove", "os.mkdir") and str(details[0]).startswith(str(folder)):
            if next(count) == event:
                os._exit(9)

    sys.addaudithook(hook)
    act(*arguments)
    print("events:", next(count) - 1)


def test_killed_at_any_file_event(script, flags, tmp_path):
    """Resumed, or begun again, it ends to the bit with whole rows and the same files: nothing lost, no leftovers."""
    main, whole, out = module(script).main, tmp_path / "whole", tmp_path / "run"
    every = "--log-every 1 --save-every 2 --sample-every 2 --keep".split()
    begin, resume = [*flags, *every, "--steps", "4", "--out"], ["--resume", "--out"]
    main([*begin, str(whole)])
    with interrupted_at(3):
        main([*begin, str(tmp_path / "two")])
    for first in begin, resume:
        def prepare():
            shutil.rmtree(out, ignore_errors=True)
            if first is resume:
                shutil.copytree(tmp_path / "two", out)

        prepare()
        _, text = Child(tmp_path, killed_at, 0, out, main, [*first, str(out)]).end()
        events = int(text.rpartition("events:")[2])
        for event in some(range(1, events + 1), 4):
            prepare()
            status, text = Child(tmp_path, killed_at, event, out, main, [*first, str(out)]).end()
            assert status == 9, text
            again = resume if (out / "checkpoint.pt").exists() else begin
            status, text = Child(tmp_path, main, [*again, str(out)]).end()
            assert status == 0, (event, text)
            assert same_end(out, whole), event
            assert contents(out).keys() == contents(whole).keys(), event
        print(f"{script}: {events} file events")


def test_a_full_disk_is_one_line_and_loses_nothing(script, half, tmp_path):
    def act():
        resource.setrlimit(resource.RLIMIT_FSIZE, ((half / "checkpoint.pt").stat().st_size // 2, -1))
        module(script).main(["--resume", "--out", str(half), "--keep"])

    before = (half / "checkpoint.pt").read_bytes()
    status, text = Child(tmp_path, act).end()
    assert status == 1 and "Traceback" not in text
    assert f"error: cannot write '{half}/checkpoint-" in text and text.endswith("OSError: File too large\n")
    assert (half / "checkpoint.pt").read_bytes() == before and not list(half.rglob("*.tmp*"))
    assert not list(half.glob("checkpoint-*"))


@pytest.mark.parametrize("script", ONE)
def test_a_folder_belongs_to_one_process(script, flags, half, whole, tmp_path):
    main, begin, resume = module(script).main, [*flags, "--out"], ["--resume", "--out"]
    child = endless(script, flags, tmp_path / "endless")
    assert "another process is using" in line(script, "--resume", "--out", tmp_path / "endless")
    child.process.kill()
    for arguments in [*begin, str(tmp_path / "new")], [*resume, str(half)]:  # at once
        ends = [child.end() for child in [Child(tmp_path, main, arguments) for _ in range(3)]]
        assert 0 in [status for status, _ in ends] and not any("Traceback" in text for _, text in ends)
        assert same_end(Path(arguments[-1]), whole)


@pytest.mark.parametrize("script", ONE)
def test_eight_starts_at_once_take_eight_folders(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    children = [Child(tmp_path, module(script).main, [*flags, "--steps", "1"]) for _ in range(8)]
    assert [child.end()[0] for child in children] == [0] * 8
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/checkpoint.pt")) == [
        f"{script}-00{count}" for count in range(1, 9)]


def leaves(item: dict, path: str = "") -> Iterator[tuple[dict, object, str]]:
    """Every dict in nested dicts, with each of its keys and the path of what it holds there."""
    for key, value in item.items():
        yield item, key, f"{path}/{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{key}")


def others(value: object) -> list:
    """What does not belong in the place of this value in a checkpoint."""
    odd = [None, [value], {}, {"x": value}, "x\ny", -1, math.nan, 1e99, torch.tensor(3).int(), str(value)]
    if not isinstance(value, torch.Tensor):
        return odd
    dtypes = {torch.float64, torch.float16, torch.complex64, torch.int64, torch.uint8, torch.bool} - {value.dtype}
    odd += [value.to(dtype) for dtype in dtypes] + [value[None], value[..., None], value.to("meta"), value.to_sparse()]
    odd += [value[:0], value[:1] if len(value) > 1 else value[[0, 0]], value.flatten()[0]] if value.ndim else []
    if value.is_floating_point():
        odd += [torch.where(torch.arange(value.numel()).view(value.shape) == value.numel() - 1, bad, value)
                for bad in (math.nan, math.inf)]
    elif value.dtype == torch.int64:
        odd += [-value - 1]
    return odd


def changed(content: dict, path: Path) -> Iterator[str]:
    """Write a checkpoint changed in one place, again and again: each time what was changed."""
    for holder, key, name in some(list(leaves(content)), 8):
        value = holder.pop(key)
        torch.save(content, path)
        yield f"{name} dropped"
        for odd in some(others(value), 2):
            holder[key] = odd
            torch.save(content, path)
            yield f"{name} is {odd!r:.60}"
        holder[key] = value
        holder["new"] = value
        torch.save(content, path)
        yield f"{name} doubled"
        del holder["new"]
    for odd in [], {}, None, 3, "x", torch.zeros(3), [content]:
        torch.save(odd, path)
        yield f"all is {odd!r:.60}"
    torch.save(content, path)
    whole = path.read_bytes()
    for bit in random.sample(range(len(whole) * 8), 2000 if THOROUGH else 15):
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1:])
        yield f"bit {bit} of {len(whole) * 8} flipped"


def test_changed_checkpoints_are_refused(script, half, whole, tmp_path, monkeypatch):
    """One line each, and nothing is touched; or else the change does not matter, and the run ends as ever."""
    content, file, before = load(half / "checkpoint.pt"), half / "changed.pt", contents(half)
    known = common.load_images(content["config"]["data"], 16) if script in IMAGES else None
    monkeypatch.setattr(common, "load_images", lambda *_: known)  # as fast as can be
    monkeypatch.setattr(common.Record, "show", lambda *_: None)

    def act():
        count = 0
        for count, change in enumerate(changed(content, file), 1):
            print(change)
            with contextlib.suppress(ValueError, OSError):
                module(script).load_generator(file)
            try:
                module(script).main(["--resume", "--checkpoint", str(file)])
            except SystemExit as stop:
                assert isinstance(stop.code, str) and "\n" not in stop.code and len(stop.code) < 400, stop.code
                assert {name: part for name, part in contents(half).items() if name != file.name} == before
            else:
                assert same_state(load(half / "checkpoint.pt"), load(whole / "checkpoint.pt")), "taken"
                shutil.rmtree(half)
                shutil.copytree(whole.with_name("half"), half)
        print("cases:", count)

    status, text = Child(tmp_path, act).end()
    assert status == 0, text[-3000:]
    print(script, text[text.rindex("cases"):])


# ---- stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("script", ONE)
def test_signals_stop_after_the_step_in_hand(script, kind, flags, tmp_path):
    """Far from any row or checkpoint, and told more than once: saved, and the open interval of the table too."""
    out = tmp_path / "run"
    child = endless(script, flags, out)
    began = time.monotonic()
    for _ in range(3):
        os.kill(child.process.pid, getattr(signal, kind))
    status, text = child.end()
    step = last_step(out)
    assert status == 1 and step > 0 and time.monotonic() - began < 10
    assert text.count("stopping after this step\n") == 1
    assert text.endswith(f"{script}.py: stopped at step {step}; to continue: --resume --out {out}\n")
    every = [f"--save-every={step + 3}", f"--log-every={step + 3}", "--out"]
    for arguments in ["--resume", *every, str(out)], [*flags, *ENDLESS, *every, str(tmp_path / "whole")]:
        with interrupted_at(step + 4):
            module(script).main(arguments)
    assert same_end(out, tmp_path / "whole")


@pytest.mark.parametrize("script", ONE)
def test_nohup_stays_in_force(script, flags, tmp_path):
    child = endless(script, flags, tmp_path / "run", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(child.process.pid, signal.SIGHUP)
    time.sleep(1)
    assert child.process.is_alive() and "stopping" not in child.log.read_text()
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.end()[0] == 1 and last_step(tmp_path / "run") > 0


@pytest.mark.parametrize("script", ONE)
def test_interrupted_outside_the_loop_it_ends_in_a_line(script, flags, tmp_path, monkeypatch):
    def slow(*_):
        (tmp_path / "loading").touch()
        time.sleep(60)

    monkeypatch.setattr(common, "load_images", slow)
    child = Child(tmp_path, module(script).main, [*flags, "--out", str(tmp_path / "run")])
    child.wait_for(tmp_path / "loading")
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.end() == (1, f"{script}.py: interrupted\n") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ONE)
def test_a_terminal_shows_life_and_may_be_closed(script, flags, tmp_path):
    process, terminal = pty.fork()
    if process == 0:
        try:
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            torch.cuda.is_available = bool
            module(script).main([*flags, *ENDLESS, "--log-every", "1", "--out", str(tmp_path / "run")])
        finally:
            os._exit(1)
    text = b""
    while text.count(b"steps/s") < 3:
        text += os.read(terminal, 1000)
    os.close(terminal)  # SIGHUP, and nothing can be printed any more
    os.waitpid(process, 0)
    assert b"\r" in text.partition(b"steps/s")[0].rpartition(b"\n")[2]
    assert last_step(tmp_path / "run") > 0


@pytest.mark.parametrize("script", IMAGES)
def test_the_data_may_move(script, half, whole, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative folder, seen from elsewhere
    moved, fewer = shutil.copytree(pictures, "moved"), shutil.copytree(half, "fewer")
    resume = ["--resume", "--data", moved, "--data-root", "data", "--out"]
    module(script).main([*resume, str(half)])
    assert same_end(half, whole) and "are not the" not in capsys.readouterr().err
    os.remove("moved/00.png")
    module(script).main([*resume, fewer])
    assert "the data have changed: 23 pictures now, 24 before" in capsys.readouterr().err


def test_init_from_begins_a_new_run_with_old_weights(script, flags, whole, tmp_path):
    arguments = [*flags, "--batch-size", "2", "--seed", "7", "--init-from", str(whole / "checkpoint.pt"), "--out"]
    with interrupted_at(1):
        module(script).main([*arguments, str(tmp_path / "new")])
    old, new = load(whole / "checkpoint.pt")["state"], load(tmp_path / "new/checkpoint.pt")["state"]
    for network in {"generator", "ema", "discriminator", "critic"} & old.keys():
        assert all(torch.equal(value, new[network][name]) for name, value in old[network].items())
    assert int(new["step"]) == 0 and not torch.equal(new["fixed_z"], old["fixed_z"])
    assert "accepted here is" in line(script, *arguments, tmp_path / "no", "--latent", "9")
    assert not (tmp_path / "no").exists()  # no empty folder is left behind


def test_a_collapse_is_told():
    well = {"step": 100, "loss": 1.0, "diversity": 0.8}
    assert common.collapse([well, well | {"step": 200}]) is None
    assert "becoming one image" in common.collapse([well, well | {"step": 200, "diversity": 0.1}])
    assert "becoming one image" in common.collapse([well | {"step": 300, "diversity": 0.0}])
    assert "loss explodes" in common.collapse([well, well | {"step": 200, "loss": -1e12}])


@pytest.mark.parametrize("script", ONE)
def test_contradictions_and_traps_are_refused(script, flags, whole, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, old = contents(half), half / "checkpoint.pt"
    assert "--out: a run resumes in the folder of" in line(script, "--resume", "--checkpoint", old, "--out", "new")
    assert "--init-from" in line(script, "--resume", "--checkpoint", old, "--init-from", whole / "checkpoint.pt")
    assert "--init-from" in line(script, "--sample", 1, "--checkpoint", old, "--init-from", old)
    assert "--lr-min: 0.5 is above --lr" in line(script, *flags, "--lr-min", "0.5")
    assert "not allowed with" in line(script, "--resume", "--sample", "1", "--checkpoint", old)
    for flag in "--out", "--checkpoint", "--init-from", "--embed", "--data", "--data-root":
        assert f"argument {flag}: must not be empty" in line(script, *flags, flag, "")
    os.mkfifo("pipe")
    for use in ["--resume"], ["--sample", "1"]:
        assert "no checkpoint 'pipe'" in line(script, *use, "--checkpoint", "pipe")
    assert "no checkpoint 'pipe'" in line(script, *flags, "--init-from", "pipe")
    os.symlink("nowhere", "runs")
    assert "File exists: 'runs'" in line(script, *flags)
    assert "no runs/" in line(script, "--resume")
    assert "Read-only" in (message := line(script, *flags, "--out", "/sys/run")) or "not permitted" in message
    assert contents(half) == before and sorted(os.listdir()) == ["half", "pipe", "runs"]


BAD = ["", " ", "x", "nan", "inf", "-inf", "-1", "0", "1e99", "9" * 5000, "1e-320", "1_0", "\0", "\n", "\udcff", "٣",
       "%s", "a/b", "--", "-", "1,2", "1:1", "1~2:3", "x" * 300]


def test_bad_values_of_every_flag_are_one_line(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in ("train", "sample", "interpolate", "embed", "walk", "grow"):
        monkeypatch.setattr(module(script), use, lambda args: tmp_path, raising=False)
    count = 0
    for action in module(script).parser()._actions:
        flag, values = action.option_strings[-1], action.nargs if isinstance(action.nargs, int) else 1
        for value in BAD if flag not in ("--help", "--version") else []:
            for form in [[flag, *[value] * values]] if values else [[flag, value], [f"{flag}={value}"]]:
                count += 1
                with contextlib.suppress(SystemExit):
                    module(script).main([*flags, *form])
                    continue
                assert "\n" not in line(script, *flags, *form).strip(), form
    assert list(tmp_path.iterdir()) == [] and count > 500
    print(script, count, "bad flags")


@pytest.mark.parametrize("flag", [["--batch-size", "1000000"], ["--width", "4096"]])
@pytest.mark.parametrize("script", ONE)
def test_out_of_memory_is_one_line(script, flag, flags, tmp_path):
    def act():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, -1))
        module(script).main([*flags, *flag, "--out", str(tmp_path / "run")])

    status, text = Child(tmp_path, act).end()
    assert status == 1 and "Traceback" not in text
    assert "error: out of memory; lower --batch-size, --image-size or" in text.splitlines()[-1]


# ---- as a library, on several nodes ---------------------------------------------------------------------------------


def test_a_pasted_copy_goes_on_in_a_thread(script, half, whole):
    """Without __file__, as in a notebook; under any name; in a thread, where Python allows no signal handlers."""
    cell, handler = {"__name__": "mine"}, signal.getsignal(signal.SIGTERM)
    exec(compile((ROOT / f"{script}.py").read_text(), "<cell>", "exec"), cell)
    thread = threading.Thread(target=cell["main"], args=[["--resume", "--out", str(half)]])
    thread.start()
    thread.join()
    assert same_end(half, whole) and signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("script", ONE)
def test_sampling_under_torchrun_writes_one_folder(script, half, tmp_path):
    done = run(script, "--sample", "3", "--checkpoint", str(half / "checkpoint.pt"), cwd=tmp_path, ranks=2)
    assert done.returncode == 0 and done.stdout.count("results are in") == 1
    assert [len(list(folder.iterdir())) for folder in half.glob("sample-*")] == [3]


def nodes(script: str, *arguments: str, folders: list[Path]) -> list[subprocess.Popen]:
    """Two torchrun agents on one machine, each in its own folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"--nnodes 2 --master_addr 127.0.0.1 --master_port {port} --nproc_per_node 1 --node_rank".split()
    return [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *launch, str(rank),
                              str(ROOT / f"{script}.py"), *arguments], cwd=folder, env=ENVIRONMENT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
            for rank, folder in enumerate(folders)]


@pytest.mark.parametrize("script", ONE)
def test_two_nodes_equal_one_process_and_end_with_their_launchers(script, flags, whole, tmp_path):
    """Rank 0 alone writes the run, and its checkpoint is sent to the others."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    for arguments in [*flags, "--steps", "2", "--out", "run"], ["--resume", "--out", "run", "--steps", "6"]:
        agents = nodes(script, *arguments, folders=folders)
        texts = [agent.communicate(timeout=500)[0] for agent in agents]
        assert [agent.returncode for agent in agents] == [0, 0] and not (folders[1] / "run").exists(), texts
    one, two = load(whole / "checkpoint.pt")["state"], load(folders[0] / "run/checkpoint.pt")["state"]
    for network in ("generator", "discriminator"):
        assert all(torch.allclose(value, two[network][name], atol=1e-5) for name, value in one[network].items())
    for ours, theirs in zip(rows(whole), rows(folders[0] / "run"), strict=True):
        assert list(map(float, theirs.values())) == pytest.approx(list(map(float, ours.values())), rel=1e-3, abs=1e-5)

    for kind in signal.SIGINT, signal.SIGKILL:  # Ctrl-C at one of the nodes; both launchers killed
        step = last_step(folders[0] / "run")
        agents = nodes(script, "--resume", "--out", "run", *ENDLESS, folders=folders)
        while f"step {step} to" not in agents[0].stdout.readline():
            assert agents[0].poll() is None
        time.sleep(1)
        ranks = subprocess.run(["pgrep", "-P", f"{agents[0].pid},{agents[1].pid}"], text=True, capture_output=True)
        if kind == signal.SIGINT:
            os.killpg(agents[1].pid, kind)
        else:
            agents[0].kill()
            agents[1].kill()
        deadline = time.monotonic() + 120
        while any(Path(f"/proc/{rank}").exists() for rank in ranks.stdout.split()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(ranks.stdout.split()) == 2 and last_step(folders[0] / "run") > step
        texts = [agent.communicate()[0] for agent in agents]
        assert kind == signal.SIGKILL or f"stopped at step {last_step(folders[0] / 'run')}" in texts[0]
