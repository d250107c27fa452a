"""CUDA graphs without a GPU: a step is recorded operation by operation on the CPU, and replayed as a graph would be.

A graph repeats the device's work alone. What Python does in a step (a counter, an ``if``, a number read back) happens
once, while it is recorded, and would be wrong in every replay.
"""

import contextlib
import functools

import common
import pytest
import torch
from conftest import load, module, rows, same_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2"}


class Graph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph; as a context manager, for the capture."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        name = operation._schema.name
        if name in HOST_READS:
            raise RuntimeError(f"{name}: the host cannot wait for the device while a graph is captured")
        outputs = operation(*inputs, **(options or {}))
        self.operations.append((operation, inputs, options or {}, outputs))
        return outputs

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # a capture on CUDA runs nothing; this one has, so the first replay is done
            return
        for operation, inputs, options, outputs in self.operations:
            with torch._C._AutoDispatchBelowAutograd():  # the gradients' operations have been recorded themselves
                again = operation(*inputs, **options)
            if any(result.alias_info for result in operation._schema.returns) or not operation._schema.returns:
                continue  # a view, or a change in place: what it shows has changed already
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.data.copy_(new)


@pytest.fixture
def graphs(script, monkeypatch) -> list[Graph]:
    """Makes the script capture its step on the CPU; the graphs that it captured."""
    captured = []

    @contextlib.contextmanager
    def capture(graph, **_):
        captured.append(graph)
        with graph, torch.device("meta"):  # a tensor made without ``device=`` would not lie on the GPU, nor here
            yield

    repeat = module(script).repeat
    for name, stands_in in dict(CUDAGraph=Graph, graph=capture, current_stream=object).items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    monkeypatch.setattr(module(script), "repeat", lambda update, graph: repeat(update, True))
    return captured


@pytest.mark.parametrize("script, more", [
    ("began", ""), ("began", "--precision bf16 --hflip"), ("ebgan", ""), ("ebgan", "--precision bf16 --layers paper"),
    ("unrolled_gan", ""), ("unrolled_gan", "--unroll-steps 0 --data grid"), ("unrolled_gan", "--fresh --g-loss saddle"),
    ("unrolled_gan", "PICTURES"), ("unrolled_gan", "PICTURES --fresh --hflip"), ("wgan_gp", ""),
    ("wgan_gp", "--precision bf16 --augment")])
def test_replays_equal_eager_steps(script, more, flags, pictures, tmp_path, request):
    more = more.replace("PICTURES", f"--data {pictures} --data-root {tmp_path} --image-size 16 --d-width 2")
    flags = [*flags, "--steps", "8", "--log-every", "1", *more.split()]
    module(script).main([*flags, "--out", str(tmp_path / "eager")])
    graphs = request.getfixturevalue("graphs")
    module(script).main([*flags, "--out", str(tmp_path / "replayed")])
    assert [graph.replays for graph in graphs] == [5]  # three steps warm up
    assert rows(tmp_path / "eager") == rows(tmp_path / "replayed")
    assert same_state(load(tmp_path / "eager/checkpoint.pt"), load(tmp_path / "replayed/checkpoint.pt"))


@pytest.mark.parametrize("script, more", [("wgan_gp", ""), ("unrolled_gan", "PICTURES --fresh")])  # several a step
def test_replays_take_what_the_host_has_filled_in(script, more, flags, pictures, tmp_path, request, monkeypatch):
    from_host = functools.partialmethod(common.Batches.__init__, resident=False)
    refill, calls = common.Batches.refill, []
    monkeypatch.setattr(common.Batches, "__init__", from_host)
    monkeypatch.setattr(common.Batches, "refill", lambda batches: calls.append(refill(batches)))
    test_replays_equal_eager_steps(script, more, flags, pictures, tmp_path, request)
    assert len(calls) == 2 * 8  # before every step, eager and replayed


def test_a_failed_capture_goes_on_eagerly(script, flags, tmp_path, graphs, monkeypatch, capsys):
    def fails(_, stream, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    module(script).main([*flags, "--steps", "5", "--out", str(tmp_path / "failed")])
    assert f"{script}: no CUDA graph, running eagerly: operation not permitted when" in capsys.readouterr().err
    monkeypatch.undo()
    module(script).main([*flags, "--steps", "5", "--out", str(tmp_path / "eager")])
    assert same_state(load(tmp_path / "eager/checkpoint.pt"), load(tmp_path / "failed/checkpoint.pt"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_equal_eager_steps_on_a_gpu(script, flags, tmp_path):
    flags = [*flags, "--device", "cuda", "--steps", "8", "--log-every", "1"]
    module(script).main([*flags, "--out", str(tmp_path / "replayed")])
    module(script).main([*flags, "--out", str(tmp_path / "eager"), "--no-graph"])
    one, two = (load(tmp_path / name / "checkpoint.pt")["state"]["generator"] for name in ("replayed", "eager"))
    torch.testing.assert_close(one, two, rtol=0, atol=2e-4)  # Adam's eight steps are ten times as far, or more
