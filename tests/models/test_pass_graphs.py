"""CUDA graphs of whole passes: filling up changes no value, and the graphs stand in for the plain passes."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
from pass_cases import Repeater, loss_of, model_of, spheres

from trellis.datasets import sparse_sdf
from trellis.datasets.sparse_sdf import window_sizes
from trellis.models.autoencoders import pass_graphs, ss_vqvae
from trellis.models.autoencoders.pass_graphs import PassGraphs, Recording
from trellis.models.autoencoders.pass_sizes import Sizes, capacity, cell_width, filling_coords, make_filling
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.modules.sparse import attention, levels
from trellis.modules.sparse.kernels import support
from trellis.modules.sparse.levels import build_pyramid
from trellis.modules.sparse.morton import packed_keys


@pytest.fixture
def repeated(monkeypatch):
    """A model on the CPU whose passes go through `PassGraphs`, and its twin without."""
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    monkeypatch.setattr(SparseSDFVQVAE, "_may_graph", lambda self: self.cuda_graphs)
    model, plain = model_of(backend="cpu"), model_of(backend="cpu", cuda_graphs=False)
    model._graphs = PassGraphs(Repeater)
    return model.train(), plain.train()


@pytest.mark.parametrize("fused", [True, False])
def test_filling_up_changes_no_value_and_no_gradient(fused):
    model = model_of(fused=fused, backend="cpu").double()
    batch = spheres([0.42, 0.3])
    sizes, samples, extent = batch["level_sizes"], 2, 4
    coords, values, active = batch["block_coords"], batch["block_sdf"].double(), batch["active"]
    more = Sizes(sizes[3] + 7, sizes[1] + 500, sizes[2] + 3)
    filling = filling_coords(7, samples, extent)
    full = [torch.cat([coords, filling])]
    full.append(torch.cat([values, values.new_full((7, 512), float("nan"))]))  # nobody may read it
    full.append(torch.cat([active, active.new_zeros(7, 512)]))
    plain = build_pyramid(coords, values, active, sizes, samples, extent)
    level_sizes = [sizes[0] if not fused else 512 * more.blocks, *more.level_sizes[1:]]
    if not fused:  # reads the values at stride 1 where a voxel exists, and the rows that fill up too
        full[1][-1, -1] = 0
        level_sizes[0] = sizes[0] + 1000
    padded = build_pyramid(*full, level_sizes, samples + 1, extent, padded=True)
    results = []
    for pyramid in (plain, padded):
        latent, _ = model.encoder(pyramid, torch.float64, fused=fused, backend="cpu")
        sdf = model.decoder(latent, pyramid.topology, torch.float64, fused=fused, backend="cpu")
        kept, latent = sdf[: sizes[3]], latent[: sizes[3]]
        loss = (kept * torch.linspace(-1, 2, 512)).sum() + latent.square().sum()
        trained = [*model.encoder.parameters(), *model.decoder.parameters()]
        results.append([kept, latent, *torch.autograd.grad(loss, trained)])
    for good, got in zip(*results):
        torch.testing.assert_close(got, good, rtol=1e-9, atol=1e-10)


def test_cells_and_sizes():
    assert [cell_width(n) for n in (1, 100, 400, 4095, 4096, 30000)] == [16, 16, 32, 256, 512, 512]
    filling = make_filling(1, 32, [], torch.device("cpu"))
    seen = [Sizes(6688, 220000, 36000), Sizes(6700, 221000, 35000)]
    assert capacity(seen, False, filling) == Sizes(6720, 221056, 36032)
    whole = capacity(seen, True, filling)
    assert 7168 < whole.blocks <= 7200 and 221000 < whole.rows2 < 1.2 * 221000
    coords = filling_coords(100, 3, 32)
    assert coords.shape == (100, 4) and bool((coords[:, 0] == 3).all()) and int(coords[:, 1:].max()) < 32
    assert len(torch.unique(packed_keys(coords))) == 100 and bool((packed_keys(coords).diff() > 0).all())
    assert filling_coords(100, 0, 4) is None and make_filling(0, 2, [], torch.device("cpu")) is None


@pytest.mark.parametrize("extent", [4, 16, 128])
def test_windows_of_the_filling(extent):
    kinds = [(8, 0), (8, 4)]
    filling = make_filling(2, extent, kinds, torch.device("cpu"))
    for blocks in (1, 9, 40, len(filling.coords)):
        counted = window_sizes(filling.coords[:blocks, 1:].numpy())
        assert {kind: filling.windows(kind, blocks) for kind in kinds} == counted
    assert filling.windows((8, 4), 0) == (0, 0)


@pytest.mark.parametrize("whole_cell", [False, True])
def test_capacity_has_room_for_windows(whole_cell):
    """Of the batches seen, filled up; a recording takes no batch whose windows it has no room for."""
    kind = (8, 4)
    filling = make_filling(1, 64, [kind], torch.device("cpu"))
    seen = [Sizes(26888, 9, 9, {kind: (362, 187)}), Sizes(26700, 9, 9, {kind: (370, 120)})]
    recording = Recording(capacity(seen, whole_cell, filling), filling)
    assert all(recording.takes(size) for size in seen)
    number, longest = recording.size.windows[kind]
    assert 370 < number < (500 if whole_cell else 425) + filling.windows(kind, 545)[0] and longest == 256
    for windows in ((number, 187), (300, 257)):
        assert not recording.takes(Sizes(26888, 9, 9, {kind: windows}))


def test_passes_through_graphs_equal_plain_ones(repeated):
    model, plain = repeated
    cases = [[0.42], [0.42], [0.41], [0.42], [0.4], [0.42, 0.3], [0.3, 0.42], [0.41, 0.31]]
    for radii in cases:
        batch = spheres(radii)
        for m in (model, plain):
            m.zero_grad(set_to_none=radii != [0.4])  # one step adds to the gradient before
            loss_of(m(batch)).backward()
        got, good = model(batch), plain(batch)
        for name, value in good.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
        for a, b in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-4, atol=2e-5 * float(b.grad.abs().max() + 1))
        assert torch.equal(model.quantizer.reduce(), plain.quantizer.reduce())
        model.quantizer.discard()
        plain.quantizer.discard()
    assert model._graphs.hits >= 8
    with torch.no_grad():
        for _ in range(3):
            got, good = model.encode(batch), plain.encode(batch)
            for name, value in good.items():
                torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
            values = [m.decode_blocks(good["mean"], good["coords"]) for m in (model, plain)]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_have_their_gradients(repeated):
    """With checkpoints a block runs again in the backward pass, where the model has its own weights back."""
    model = model_of(backend="cpu", use_checkpoint=True).train()
    model._graphs = PassGraphs(Repeater)
    batch = spheres([0.42])
    for m in (model, model, repeated[1]):
        m.zero_grad()
        loss_of(m(batch)).backward()
    assert model._graphs._recordings
    for a, b in zip(model.parameters(), repeated[1].parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-4, atol=2e-5 * float(b.grad.abs().max() + 1))


def test_backward_after_another_pass_is_an_error(repeated):
    model, _ = repeated
    batch = spheres([0.42])
    for _ in range(2):
        loss_of(model(batch)).backward()
    first, second = loss_of(model(batch)), loss_of(model(batch))
    with pytest.raises(RuntimeError, match="before the model's next forward pass"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before the model's next forward pass"):
        second.backward()


def test_outputs_and_gradients_are_the_callers_own(repeated):
    model, _ = repeated
    batches = [spheres([0.42]), spheres([0.42])]
    batches[1]["block_sdf"] = -batches[1]["block_sdf"]
    for batch in batches:
        loss_of(model(batch)).backward()
    model.zero_grad()
    out = model(batches[0])
    loss_of(out).backward()
    kept = [out["sdf"].detach().clone(), model.decoder.out_layer.weight.grad.clone()]
    held = model.decoder.out_layer.weight.grad
    model.zero_grad()
    loss_of(model(batches[1])).backward()
    assert torch.equal(out["sdf"], kept[0]) and torch.equal(held, kept[1])
    assert not torch.equal(model.decoder.out_layer.weight.grad, kept[1])


def test_graphs_follow_the_weights(repeated):
    model, plain = repeated
    batch = spheres([0.42])
    for _ in range(2):
        loss_of(model(batch)).backward()
    for m in (model, plain):
        with torch.no_grad():
            m.decoder.out_layer.bias.fill_(0.25)
    torch.testing.assert_close(model(batch)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert model._graphs.hits == 1
    model.decoder.out_layer.bias = torch.nn.Parameter(torch.full((1,), -0.25))
    plain.decoder.out_layer.bias.data.fill_(-0.25)
    torch.testing.assert_close(model(batch)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert model._graphs.hits == 0  # what was recorded read the old tensor
    assert not copy.deepcopy(model)._graphs._recordings


def test_number_of_graphs_is_bounded(repeated):
    model, _ = repeated
    model._graphs.max_graphs = 2
    for radii in ([0.42], [0.42, 0.3], [0.42, 0.3, 0.2]) * 2:
        model(spheres(radii))
    assert len(model._graphs._recordings) == 2
    model._graphs.max_blocks = 8
    misses = model._graphs.misses
    model(spheres([0.42]))
    assert model._graphs.misses == misses


def test_graphs_make_room_for_a_larger_batch(repeated):
    model, plain = repeated
    for _ in range(2):
        loss_of(model(spheres([0.42]))).backward()
    model._graphs._recorder.bytes, model._graphs._recorder.free = 1000, 2000
    waiting = loss_of(model(spheres([0.42])))
    model(spheres([0.42, 0.3]))  # needs 1500 of them
    assert model._graphs._recordings and model._graphs.reserved_bytes == 1000
    batch = spheres([0.42, 0.42, 0.3])
    torch.testing.assert_close(model(batch)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert not model._graphs._recordings and model._graphs.reserved_bytes == 0
    with pytest.raises(RuntimeError, match="before the model's next forward pass"):
        waiting.backward()


def test_graphs_have_room_for_the_windows_of_every_batch(repeated, monkeypatch):
    """The windows of a recorded pass as a GPU sees them: a fixed number, those of the blocks that fill up included."""
    tables = pytest.importorskip("trellis.modules.sparse.kernels.tables", reason="Triton is not installed")
    monkeypatch.setattr(sparse_sdf, "WINDOWS", ((2, 0), (2, 1)))
    model, plain = (model_of(backend="cpu", window_size=2, cuda_graphs=graphs).train() for graphs in (True, False))
    model._graphs = PassGraphs(Repeater)
    batches = [spheres(radii) for radii in ([0.42], [0.42], [0.41], [0.4], [0.38], [0.42], [0.34, 0.4], [0.34, 0.4])]
    expected = [plain(batch)["sdf"] for batch in batches]
    made, bounded = [], levels.bounded_windows

    def spy(coords, size, shift, number, longest):
        plan, exact = bounded(coords, size, shift, number, longest), levels.counted_windows(coords, size, shift)
        assert exact.num_windows <= number == plan.num_windows and exact.max_length <= longest <= 8
        made.append((number, exact.num_windows))
        return plan

    def keys(coords, size, shift):
        return packed_keys(torch.cat([coords[:, :1], (coords[:, 1:] + shift) // size], 1))

    def neighbours(topology):
        return levels._find_block_neighbours(topology.coords)

    monkeypatch.setattr(tables, "cell_keys", keys)
    monkeypatch.setattr(levels, "has_kernels", lambda device: True)
    monkeypatch.setattr(levels, "bounded_windows", spy)
    monkeypatch.setattr(levels.Topology, "block_neighbours", property(neighbours))
    for batch, good in zip(batches, expected):
        torch.testing.assert_close(model(batch)["sdf"], good, rtol=1e-4, atol=1e-5)
    assert model._graphs.hits >= 4
    bounds, counts = zip(*made)
    assert max(counts) > 27 and len(set(bounds)) < len(set(counts))


def test_batches_without_counted_windows_have_graphs_of_their_own(repeated):
    model, plain = repeated
    batch = spheres([0.42])
    uncounted = {key: value for key, value in batch.items() if key != "window_sizes"}
    for given in (batch, batch, uncounted, uncounted, batch, uncounted):
        torch.testing.assert_close(model(given)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert [len(r.size.windows) for r in model._graphs._recordings.values()] == [2, 0] and model._graphs.hits == 2


def test_passes_follow_those_of_other_streams(repeated):
    """The recorder orders them, before a batch or a gradient is copied in."""
    model, _ = repeated
    batch = spheres([0.42])
    for _ in range(2):
        loss_of(model(batch)).backward()
    graphs = model._graphs
    calls = graphs._recorder.calls
    (recording,) = graphs._recordings.values()
    load, run, back = graphs._load, recording.forward, recording.backward
    graphs._load = lambda *given: calls.append("load") or load(*given)
    recording.forward = lambda: calls.append("forward") or run()
    recording.backward = lambda: calls.append("backward") or back()
    calls.clear()
    loss = loss_of(model(batch))
    assert calls == ["follow", "load", "forward"]
    loss.backward()
    assert calls == ["follow", "load", "forward", "follow", "backward"]


def test_every_pass_runs_on_the_models_own_device(repeated, monkeypatch):
    model, _ = repeated
    entered = []

    @contextmanager
    def on_device(device):
        entered.append(device)
        yield

    for module in (support, pass_graphs):
        monkeypatch.setattr(module, "on_device", on_device)
    batch = spheres([0.42])
    for _ in range(2):
        loss = loss_of(model(batch))
    loss.backward()
    assert entered == [model.device] * 3
    with torch.no_grad():
        encoded = model.encode(batch)
        model.decode_blocks(encoded["mean"], encoded["coords"])
        model.initialize_codebook([batch])
    assert entered == [model.device] * 6


@pytest.mark.parametrize("heads, capability, may", [(1, (8, 9), True), (16, (8, 9), False), (1, (7, 5), False)])
def test_nothing_is_recorded_without_variable_length_attention(heads, capability, may, monkeypatch):
    """Heads of 4 channels, or a card before 8.0: windows are padded, and the host asks for their lengths."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(SparseSDFVQVAE, "device", property(lambda self: card))
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    monkeypatch.setattr(attention, "has_varlen", lambda: True)
    monkeypatch.setattr(ss_vqvae, "has_kernels", lambda *given: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    model = model_of(num_heads=heads)
    model.set_compute_dtype(torch.float16)
    assert model._may_graph() == may


def test_buffers_made_in_inference_mode_serve_later_passes(repeated):
    model, plain = repeated
    batch = spheres([0.42])
    with torch.inference_mode():
        for _ in range(3):
            got = model.encode(batch)["mean"]
    assert model._graphs.hits == 1 and got.is_inference()
    with torch.no_grad():
        torch.testing.assert_close(model.encode(batch)["mean"], plain.encode(batch)["mean"], rtol=1e-4, atol=1e-5)
    assert model._graphs.hits == 2


@pytest.mark.parametrize("stage", ["rehearse", "record", "ended badly"])
def test_no_room_to_record(repeated, stage, caplog):
    """The step runs as it is, and so do all later ones; what the attempt held is gone."""
    model, plain = repeated
    tried = []

    class Full(Repeater):
        def rehearse(self, function):
            if stage == "rehearse":
                self.fail(function)
            return super().rehearse(function)

        def record(self, function):
            self.fail(function)

        def fail(self, function):
            function()
            tried.append(weakref.ref(function))
            try:
                raise torch.OutOfMemoryError("no room")
            finally:
                if stage == "ended badly":
                    raise RuntimeError("the recording cannot be ended")

    model._graphs = PassGraphs(Full)
    batch = spheres([0.42])
    for _ in range(4):
        for m in (model, plain):
            m.zero_grad()
            loss_of(m(batch)).backward()
        gradients = [[p.grad for p in m.parameters()] for m in (model, plain)]
        for got, good in zip(*gradients):
            torch.testing.assert_close(got, good, rtol=2e-4, atol=2e-5 * float(good.abs().max() + 1))
    assert len(tried) == 1 and tried[0]() is None and not model._graphs._recordings
    assert [r.message for r in caplog.records if "no CUDA graphs" in r.message] == [
        "no CUDA graphs: there is no room to record one"
    ]


def test_other_errors_of_a_recording_are_raised(repeated):
    class Broken(Repeater):
        def record(self, function):
            raise RuntimeError("a bug")

    model, _ = repeated
    model._graphs = PassGraphs(Broken)
    model(spheres([0.42]))
    with pytest.raises(RuntimeError, match="a bug"):
        model(spheres([0.42]))


def test_nothing_is_rehearsed_where_the_batch_alone_would_not_fit(repeated):
    """A second recording, whose rehearsal needs as much as the batch as it is, beside what the first holds."""
    model, plain = repeated
    for _ in range(2):
        model(spheres([0.42]))
    recorder = model._graphs._recorder
    batch = spheres([0.42, 0.3])
    recorder.bytes, recorder.free = 1000, 1 << 40
    model(batch)
    recorder.free = 1000
    recorder.rehearse = lambda function: pytest.fail("rehearsed")
    torch.testing.assert_close(model(batch)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert model._graphs._refused and not model._graphs._recordings


def test_a_replay_that_runs_out_of_memory_gives_the_graphs_up(repeated):
    model, plain = repeated
    batch = spheres([0.42])
    for _ in range(2):
        loss_of(model(batch)).backward()
    (recording,) = model._graphs._recordings.values()
    model._graphs._recorder.bytes = 1000

    def full():
        raise torch.OutOfMemoryError("no room for the outputs")

    recording.forward = full
    torch.testing.assert_close(model(batch)["sdf"], plain(batch)["sdf"], rtol=1e-4, atol=1e-5)
    assert model._graphs._refused and not model._graphs.reserved_bytes
