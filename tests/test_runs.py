"""What a run of each script does: kills, damage, flags, outputs, ranks, graphs, the commands of the docstrings.

GAN_TEST_THOROUGH=1 kills a run at every file event; without it, at an early one and a random one.
"""

import ast
import builtins
import contextlib
import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
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
from conftest import ENVIRONMENT, ROOT, SCRIPTS, TINY, assert_same, contents, forked, load, module, refusal, rows
from torch import Tensor
from torch.distributed.run import get_args_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Writes empty charts and GIFs, which would take most of the time."""
    for name in "save_chart", "save_gif":
        monkeypatch.setattr(common, name, lambda _, path, *__, **___: Path(path).write_bytes(b""))


@pytest.fixture(scope="module")
def whole(script, flags, tmp_path_factory) -> Path:
    """A run of 6 steps."""
    module(script).main([*flags, "--keep", "--out", str(out := tmp_path_factory.mktemp(script))])
    return out


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A run that was killed after its checkpoint of step 2. Resumed, it must end as the whole one."""
    (tmp_path / "half").mkdir()
    return Path(shutil.copy(whole / "checkpoint-000002.pt", tmp_path / "half/checkpoint.pt")).parent


def changed(script: str, old: str = "import common\n", new: str = "import common\n") -> types.ModuleType:
    """A copy of a script, compiled as with -OO and with a piece of its text replaced, as a module."""
    text, copy = (ROOT / f"{script}.py").read_text(), types.ModuleType("changed")
    assert text.count(old) == 1, f"{script}.py does not hold {old!r} once"
    exec(compile(text.replace(old, new), f"{script}.py", "exec", optimize=2), copy.__dict__)
    return copy


def test_killed_at_any_file_event(script, flags, half, whole, tmp_path):
    """After a death before the first checkpoint, the same command starts the run again."""
    def die() -> None:
        def hook(name: str, details: tuple) -> None:
            if name in ("open", "os.rename", "os.remove", "os.mkdir") and str(details[0]).startswith(str(out)):
                if next(count) == event:
                    os._exit(9)

        count = itertools.count(1)
        sys.addaudithook(hook)
        main(arguments)

    main, out = module(script).main, tmp_path / "run"
    for arguments in [*flags, "--out", str(out)], ["--resume", "--out", str(out)]:
        for event in itertools.count(1) if "GAN_TEST_THOROUGH" in os.environ else (3, random.randrange(4, 50)):
            shutil.rmtree(out, ignore_errors=True)
            if "--resume" in arguments:
                shutil.copytree(half, out)
            if (status := forked(die)) == [0]:
                break
            main(["--resume", "--out", str(out)] if (out / "checkpoint.pt").exists() else arguments)
            names = {path.name for path in out.rglob("*") if path.is_file()}
            assert status == [9] and not [name for name in names if name[0] == "."], event
            assert names >= {"000002.png", "000004.png", "training.gif", "curves.png"}, event
            assert_same(out, whole)
        assert event > 3, "nothing was killed"


def test_every_changes_nothing_in_the_training(script, flags, whole, half, tmp_path):
    """Nor does it when a resumed run has another one. A row holds the means over the steps since the last row."""
    one, five, seed = (tmp_path / name for name in ("1", "5", "seed"))
    for out, flag in (one, "--every=1"), (five, "--every=5"), (seed, "--seed=1"):
        module(script).main([*flags, flag, "--out", str(out)])
    module(script).main(["--resume", "--every", "3", "--out", str(half)])
    each = rows(one)
    for folder, steps in (whole, [2, 4, 6]), (five, [5, 6]), (half, [2, 3, 6]):
        assert_same(folder, one, and_rows=False)
        assert [int(row["step"]) for row in rows(folder)] == steps
        for first, last, row in zip([0, *steps], steps, rows(folder)):
            for metric in module(script).METRICS:
                mean = sum(float(step[metric]) for step in each[first:last]) / (last - first)
                assert float(row[metric]) == pytest.approx(mean, rel=1e-4, abs=1e-6), (row, metric)
    with pytest.raises(AssertionError):
        assert_same(whole, seed)


def test_bad_checkpoints_are_refused_in_a_line(script, half):
    def pack(item: object) -> bytes:
        torch.save(item, file := io.BytesIO())
        return file.getvalue()

    def edit(*place: str, **new: object) -> bytes:
        """The checkpoint with other entries in one of its dicts."""
        content = load(io.BytesIO(good))
        functools.reduce(dict.get, place, content).update(new)
        return pack(content)

    path = half / "checkpoint.pt"
    good, archive = path.read_bytes(), zipfile.ZipFile(path)
    record = random.choice([item for item in archive.infolist() if item.file_size > 60])
    flip = good.index(archive.read(record)) + random.randrange(60)
    adam = next(name for name in load(path)["state"] if name.startswith("adam"))
    for bad, message in [
            (good[:flip] + bytes([good[flip] ^ 16]) + good[flip + 1:], "it is damaged"),
            (b"", "not a zip file"), (good[:len(good) // 2], "not a zip file"), (pack([1, 2]), "not a checkpoint"),
            (pack(Path("code")), "Weights only load failed"), (edit(settings=3), "not a checkpoint"),
            (edit(script="other"), "it was written by other.py"),
            (edit(settings={}), "it was written by another version, with other settings: "),
            (edit("settings", log_every=1), "it was written by another version, with other settings: log_every"),
            (edit("settings", seed="0"), "its setting seed is '0'"), (edit("state", generator={}), "Missing key"),
            (edit("state", adam, state={}), "Adam's moments do not fit the weights"),
            (edit("state", adam, "state", 0, exp_avg=torch.zeros(2)), "Adam's moments do not fit the weights")]:
        path.write_bytes(bad)
        before = contents(half)
        status, text = refusal(script, "--resume", "--out", half)
        assert status == 1 and message in text and f"'{path}'" in text and contents(half) == before, (message, text)


def test_flags_win_over_the_settings_of_a_resumed_run(script, half, whole, monkeypatch):
    content, groups = load(half / "checkpoint.pt"), []
    for item in content["state"].values():
        if isinstance(item, dict) and "param_groups" in item:
            item["param_groups"][0].update(capturable=True, weight_decay=0.5, betas=(0.0, 0.0))
    torch.save(content, half / "checkpoint.pt")  # as from another device, with values that nobody asks for
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: groups.append(adam.param_groups[0].copy()))
    module(script).main(["--resume", "--out", str(half), "--steps", "8", "--lr", "7e-3", "--betas", "0.3", "0.8"])
    for group in groups:
        assert group["betas"] == (0.3, 0.8) and not group["capturable"] and not group["weight_decay"]
    settings, own = load(half / "checkpoint.pt")["settings"], load(whole / "checkpoint.pt")["settings"]
    assert groups and {name for name in own if settings[name] != own[name]} == {"steps", "lr", "betas"}


def test_init_from_takes_the_weights_and_their_shape_alone(script, data_flags, whole, tmp_path, monkeypatch):
    """From a folder or a file, where ~ is the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(whole, tmp_path / "old")
    old, flags = load(whole / "checkpoint.pt"), [*data_flags[script], *"--device cpu --lr 1e-12 --steps 1".split()]
    for path, out in ("~/old", "1"), ("~/old/checkpoint.pt", "2"):
        module(script).main([*flags, "--init-from", path, "--out", f"~/{out}"])
        new = load(tmp_path / out / "checkpoint.pt")
        for network in new["state"].keys() & {"generator", "discriminator", "critic"}:
            for name, value in new["state"][network].items():
                if name.endswith(("weight", "bias")):
                    torch.testing.assert_close(value, old["state"][network][name])
        assert new["step"] == 1 and new["settings"]["batch_size"] > 4
    module(script).main(["--sample", "2", "--out=~/old"])
    module(script).load_generator("~/old")


REFUSED = {  # what is given beside the usual flags, and what the error says
    **{flags: f"argument {flags.replace('=', ' ').split()[0]}: " for flags in (
        "--steps 0", "--every 0", "--batch-size 0", "--latent 0", "--sample 0", "--lr nan", "--lr -1", "--betas -1 0.9",
        "--betas 0.5", "--seed -1", "--seed 4294967296", "--out=", "--data=", "--data-root=", "--init-from=")},
    "--log-every 5": "unrecognized arguments", "--resume --sample 1": "not allowed with",
    "--out half": "argument --out: 'half' is not empty", "--out half/checkpoint.pt": "is a file, not a folder",
    "--resume --out no": "no checkpoint 'no'", "--init-from no": "no checkpoint 'no'",
    "--resume": "error: there is no runs/", "--sample 1": "error: there is no runs/"}


def test_bad_flags_are_named(script, flags, half, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, settings = contents(half), load(half / "checkpoint.pt")["settings"]
    for bad, message in REFUSED.items():
        assert message in refusal(script, *flags, *bad.split())[1]
    message = f"argument --latent: the saved networks have {settings['latent']}, not 99"
    for use in ["--resume", "--out", "half"], ["--init-from", "half", "--out", "new"]:
        assert message in refusal(script, *use, "--latent", "99")[1]
    if not torch.cuda.is_available():
        assert "argument --device: this machine has no cuda" in refusal(script, *flags, "--device", "cuda")[1]
    monkeypatch.setattr(module(script), "WORLD", 3)
    assert "--batch-size: 4 is not a multiple of the 3 ranks" in refusal(script, *flags)[1]
    assert "torchrun is for training only" in refusal(script, "--sample", "1", "--out", "half")[1]
    assert os.listdir() == ["half"] and contents(half) == before


def test_ctrl_c_says_how_to_go_on(script, flags, half, whole, tmp_path, monkeypatch):
    """A copy under another name, with -OO and in a thread, goes on from the original's checkpoint and from its own."""
    def say(text: str, end: str = "\n") -> None:
        if text.startswith(("2/", "5/")) and end == "\r":
            raise KeyboardInterrupt

    copy, half = changed(script), half.rename(tmp_path / "ha lf")
    with monkeypatch.context() as patch:
        patch.setattr(module(script), "say", say)
        assert refusal(script, *flags, "--out", tmp_path / "new")[1] == (
            "stopped before the first checkpoint, so nothing has been saved")
        command = refusal(script, "--resume", "--out", half)[1].removeprefix("stopped; to continue training: ")
    python, name, *arguments = shlex.split(command)
    assert python == "python" and Path(name).name == f"{script}.py"
    for steps in "5", "6":
        thread = threading.Thread(target=copy.main, args=[[*arguments, "--steps", steps]])
        thread.start()
        thread.join()
    assert_same(half, whole, and_rows=False)


def test_other_ranks_are_silent_and_memory_can_run_out(script, monkeypatch):
    message = f"{script}.py: error: out of memory"
    for error, rank, want in (KeyboardInterrupt, 1, (1, "")), (MemoryError, 0, (1, message)):
        def fail(_: list[str], error: type = error) -> None:
            raise error
        monkeypatch.setattr(module(script), "RANK", rank)
        monkeypatch.setattr(module(script), "read_flags", fail)
        assert refusal(script) == want


@pytest.mark.parametrize("script", ["began"], scope="module")  # the text that this tests is the same in all
def test_whatever_becomes_of_the_output_the_run_goes_on(script, half, whole, tmp_path, monkeypatch):
    def fail(_: str) -> None:
        raise BrokenPipeError

    plain, narrow = types.SimpleNamespace(write=len, flush=list), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    broken, closed, terminal = io.StringIO(), io.StringIO(), io.StringIO()
    broken.write, terminal.isatty = fail, lambda: True
    closed.close()
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)  # a clock that stands still
    for count, output in enumerate([None, plain, narrow, closed, terminal, broken]):
        out = shutil.copytree(half, tmp_path / f"h\xe4lf {count}")
        monkeypatch.setattr(sys, "stdout", output)
        module(script).main(["--resume", "--out", str(out)])
        assert_same(out, whole)
    monkeypatch.undo()
    assert "h\\xe4lf 2: step 2 to 6" in narrow.buffer.getvalue().decode()
    lines = terminal.getvalue().splitlines(True)
    assert [line for line in lines if line[-1] == "\r"] == [f"{step}/6\r" for step in (3, 4, 5, 6)]
    assert re.match(r"6/6  \S+ steps/s  0:00:00 left  .*\n", lines[-2])


def test_files_that_cannot_be_written(script, half, whole, capsys):
    """Pictures, charts and tables are a warning; a checkpoint ends the run with a line, and the last one stays."""
    names = ["metrics.csv", "curves.png", "samples/real.png", "samples/000004.png", "training.gif"]
    for name in *names, ".checkpoint.tmp.pt":
        (half / name).mkdir(parents=True)
    status, text = refusal(script, "--resume", "--out", half)
    assert status == 1 and f"cannot write '{half}/checkpoint.pt': IsADirectoryError: " in text
    assert load(half / "checkpoint.pt")["step"] == 2
    (half / ".checkpoint.tmp.pt").rmdir()
    module(script).main(["--resume", "--out", str(half)])
    errors = capsys.readouterr().err
    assert all(str(half / name) in errors for name in names) and "Traceback" not in errors
    (half / "metrics.csv").rmdir()
    module(script).main(["--resume", "--out", str(half)])  # writes what is missing
    assert_same(half, whole)


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
    statuses = forked(functools.partial(act, 0), functools.partial(act, 1))
    return [(status, (folder / f"rank-{rank}").read_text()) for rank, status in enumerate(statuses)]


def test_two_ranks(script, flags, tmp_path):
    """They draw different numbers and apply the means of their gradients; only rank 0 writes; they can be resumed."""
    def watch(rank: int) -> None:
        def spy(tensors: list[Tensor]) -> None:
            own = [tensor.clone() for tensor in tensors]
            reduce(tensors)
            calls.append((own, [tensor.clone() for tensor in tensors]))

        def check(_: int, metrics: dict, networks: dict) -> None:
            weights = [tensor for network in networks.values() for tensor in network.parameters()]
            torch.save((calls, metrics, weights), tmp_path / f"{rank}.pt")

        calls, this, reduce = [], module(script), module(script).all_reduce_mean
        this.all_reduce_mean, this.check_finite = spy, check
        if rank > 0:
            common.atomic_write = None

    whole, half = tmp_path / "whole", tmp_path / "half"
    (status, text), other = two_ranks(script, tmp_path, *flags, "--keep", "--out", whole, before=watch)
    assert status == 0 and "the results are in" in text and other == (0, ""), other
    (calls, *end), (other_calls, *other_end) = load(tmp_path / "0.pt"), load(tmp_path / "1.pt")
    torch.testing.assert_close(end, other_end, rtol=0, atol=0)
    differ = set()
    for (own, means), (other_own, other_means) in zip(calls, other_calls, strict=True):
        torch.testing.assert_close([means, means], [other_means, [(a + b) / 2 for a, b in zip(own, other_own)]])
        differ |= {one.shape for one, two in zip(own, other_own) if not torch.equal(one, two)}
    assert {weight.shape for weight in end[1]} <= differ
    half.mkdir()
    shutil.copy(whole / "checkpoint-000002.pt", half / "checkpoint.pt")
    assert [status for status, _ in two_ranks(script, tmp_path, "--resume", "--out", half)] == [0, 0]
    assert_same(half, whole)


@pytest.mark.parametrize("metrics", [True, False])
def test_nan_stops_all_ranks_and_keeps_the_last_checkpoint(script, metrics, flags, tmp_path):
    """NaN in the metrics of rank 0, or in its gradients and so in all weights."""
    def spoil(rank: int) -> None:
        def spy(tensors: list[Tensor]) -> None:
            is_total = len(tensors) == 1 and tensors[0].shape == (len(this.METRICS),)
            if torch.initial_seed() // 2 == 3 and is_total == metrics and rank == 0:  # in the fourth step
                tensors[-1].fill_(math.nan)
            reduce(tensors)

        this, reduce = module(script), module(script).all_reduce_mean
        this.all_reduce_mean = spy

    for status, text in two_ranks(script, tmp_path, *flags, "--out", tmp_path / "run", before=spoil):
        assert status == 1 and "Traceback" not in text
        assert re.search("error: step 4: .* not finite.*--init-from", text), text
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 2


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
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"):
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


@pytest.mark.parametrize("script, more", [
    ("began", "--residual-steps 6"), ("began", "--precision bf16 --hflip --lr-patience 1"), ("ebgan", "--d-steps 2"),
    ("ebgan", "--precision bf16 --layers paper"), ("unrolled_gan", "--unroll-steps 0 --data grid"),
    ("unrolled_gan", "--fresh --g-loss saddle"), ("unrolled_gan", "PICTURES HOST --fresh"), ("wgan_gp", "HOST"),
    ("wgan_gp", "--precision bf16 --augment")], scope="module")
def test_replays_equal_eager_steps(script, more, flags, pictures, tmp_path, monkeypatch, capsys):
    """So do the steps after a capture that failed."""
    @contextlib.contextmanager
    def capture(graph: Graph, **_: object) -> Iterator[None]:
        captured.append(graph)
        with graph, torch.device("meta"):  # a tensor made without ``device=`` would not lie on the GPU, nor here
            yield

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    if "HOST" in more:  # which fills in the batches before every step
        from_host = functools.partialmethod(common.Batches.__init__, resident=False)
        monkeypatch.setattr(common.Batches, "__init__", from_host)
    more = more.replace("PICTURES", f"--data {pictures} --data-root {tmp_path} --image-size 16 --d-width 2")
    for name, stand_in in dict(CUDAGraph=Graph, graph=capture, current_stream=object).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    copy, captured = changed(script, 'args.graph and device.type == "cuda"', "args.graph"), []
    flags = [*flags, *more.replace("HOST", "").split(), "--out"]
    copy.main([*flags, str(tmp_path / "eager"), "--no-graph"])
    assert not captured
    copy.main([*flags, str(tmp_path / "replayed")])
    assert [graph.replays for graph in captured] == [3]  # after three steps that warm up
    assert_same(tmp_path / "eager", tmp_path / "replayed")
    monkeypatch.setattr(torch.cuda, "graph", fail)
    copy.main([*flags, str(tmp_path / "failed")])
    message = "no CUDA graph could be captured, so training runs without: operation not permitted when stream is cap"
    assert message in (output := capsys.readouterr().out) and "and more" not in output
    assert_same(tmp_path / "eager", tmp_path / "failed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_equal_eager_steps_on_a_gpu(script, flags, tmp_path):
    for name, more in dict(replayed=[], eager=["--no-graph"]).items():
        module(script).main([*flags, "--device", "cuda", "--steps", "8", *more, "--out", str(tmp_path / name)])
    one, two = (load(tmp_path / name / "checkpoint.pt")["state"]["generator"] for name in ("replayed", "eager"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-4)  # Adam's eight steps are ten times as far, or more


def test_what_is_the_same_in_all_scripts_is_the_same_text(script):
    ends = {"# ---- device, ranks, checkpoints": "# ---- sampling", "WORLD = ": "# ---- networks",
            "    elif args.out and": "    args = parser.parse", "    for name, value in vars(args)": "    if args.",
            "def main(": "        action =", '        say(f"the results': "if __name__"}
    texts = [(ROOT / f"{name}.py").read_text() for name in (script, "began")]
    for first, last in ends.items():
        one, two = (text[text.index(first):text.index(last, text.index(first))] for text in texts)
        assert one == two
    for name in "update_ema", "pull_away_term", "UpConv":
        if hasattr(module(script), name):
            assert inspect.getsource(getattr(module(script), name)) == inspect.getsource(getattr(module("began"), name))


def test_networks_and_losses_can_be_pasted(script):
    """What stands between the two lines needs the imports that README.md names, and nothing else."""
    blocks = (ROOT / "README.md").read_text().replace("```python", "```").split("```")
    imports, = [block for block in blocks if block.startswith("\nimport itertools")]
    text, pasted = (ROOT / f"{script}.py").read_text(), vars(builtins).copy()
    text = imports + text[text.index("# ---- networks"):text.index("# ---- training")]
    exec(text, pasted)
    nodes = list(ast.walk(ast.parse(text)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {node.arg for node in nodes if isinstance(node, ast.arg)} | pasted.keys()
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {node.id for node in names} - {node.id for node in names if isinstance(node.ctx, ast.Store)} <= known


def test_the_card():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, capture_output=True).stdout.split()
    scripts = {f"{script}.py" for script in SCRIPTS}
    assert {name.split("/")[0] for name in tracked if name[0] != "."} <= {
        *scripts, "common.py", "requirements.txt", "README.md", "tests"}
    lines = (ROOT / "requirements.txt").read_text().split()
    for script in SCRIPTS:  # `uv run` reads them there
        assert f"# dependencies = {json.dumps(lines)}\n" in (ROOT / f"{script}.py").read_text()
    assert [line.partition(">=")[0] for line in lines] == ["torch", "torchvision", "numpy", "pillow"]
    for name in *scripts, "common.py":
        names = re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: as \w+| import .*)?$", (ROOT / name).read_text(), re.M)
        foreign = set(names) - {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "PIL"}
        assert "torch" in names and foreign == ({"common"} if name in scripts else set()), name


@pytest.mark.parametrize("script", ["began"], scope="module")
def test_importing_runs_nothing_and_a_run_needs_no_reader(script, half, tmp_path):
    """With RANK but without WORLD_SIZE, a script is alone. torchvision would make --help slow."""
    code = "".join(f"import {name}; assert {name}.RANK == 0; {name}.make_parser(); " for name in SCRIPTS)
    code += f"import os, sys; assert 'torchvision' not in sys.modules and os.listdir() == ['half']; {script}.main()"
    process = subprocess.Popen([sys.executable, "-c", code, "--resume", "--out", half], cwd=tmp_path, text=True,
                               env=ENVIRONMENT | {"RANK": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert "Error" not in process.stderr.read() and process.wait() == 0
    assert load(half / "checkpoint.pt")["step"] == 6


def test_the_commands_of_the_docstring(script, pictures, tmp_path, monkeypatch):
    """At toy size, then resumed: a rate above 0, an average whose buffers move, the flags that were given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "photos")
    np.save("points.npy", np.random.default_rng(0).normal(size=(50, 2)))
    this, parser, torchrun_parser = module(script), module(script).make_parser(), get_args_parser()
    for flag in re.findall(r'add\("(--[a-z-]+)"', inspect.getsource(this.make_parser)):
        assert f"  {flag}" in parser.format_help()
        assert torchrun_parser.parse_args(["x.py", flag])  # which exits if one of its own flags begins so
    lines = re.findall(r"^ +(python|torchrun)(.*)", this.__doc__.replace("\\\n", " ").replace("; ", "\n "), re.M)
    assert len(lines) > 6
    for launcher, line in lines:
        words = shlex.split(line.partition(f"{script}.py")[2], comments=True)
        given = vars(parser.parse_args(words))
        if given.keys() & {"resume", "sample", "interpolate", "embed"}:
            this.main([*words, *(["--sample", "3"] if "sample" in given else [])])
            continue
        more = [*TINY[script], *"--data-root cache --steps 2 --every 1".split()]
        if script != "unrolled_gan" or given["data"] == "stacked-mnist":
            more += ["--data", "photos"]  # instead of downloads, and of pictures that take long to draw
        if script == "wgan_gp":  # which can grow, from 32 pixels on
            more += ["--image-size", "64" if "init_from" in given else "32"]
        before = set(Path().glob("runs/*"))
        if launcher == "torchrun" and script == "began":  # one is enough: the others share its text about ranks
            torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
            subprocess.run([*torchrun, ROOT / f"{script}.py", *words, *more], env=ENVIRONMENT, check=True)
        else:
            this.main([*words, *more])
        folder, = set(Path().glob("runs/*")) - before
        this.main(["--resume", "--out", str(folder), "--steps", "3"])
        content, toy, default = load(folder / "checkpoint.pt"), *(
            vars(parser.parse_args(flags)) for flags in ([*words, *more], []))
        kept = {name for name in default if toy[name] == given[name] != default[name]}
        assert all(content["settings"][name] == given[name] for name in kept)
        assert [row["step"] for row in rows(folder)] == ["1", "2", "3"] and not list(folder.rglob(".*"))
        assert all(float(row.get("lr", 1)) > 0 for row in rows(folder))
        generator, averaged = this.load_generator(folder)[0], content["state"].get("averaged", {})
        assert not generator.training and all(torch.equal(generator.state_dict()[name], averaged[name])
                                              for name in averaged)
