"""CUDA graphs of whole passes on a card: the recorded kernels against the same kernels launched one by one."""

from __future__ import annotations

import pytest
import torch
from pass_cases import Repeater, loss_of, model_of, spheres

from trellis.models.autoencoders import pass_graphs
from trellis.models.autoencoders.pass_graphs import PassGraphs
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE

GPU_MODES = {"half": (torch.float16, True), "amp": (torch.float16, False), "bf16": (torch.bfloat16, False)}


def on_the_card(mode, device="cuda", **changes):
    dtype, narrow = GPU_MODES[mode]
    model = model_of(model_channels=128, **changes).to(device).train()
    model.set_compute_dtype(dtype)
    if narrow:
        model.encoder.to(dtype)
        model.decoder.to(dtype)
    return model


def scaled_loss(out, batch):
    loss = (out["sdf"] - batch["block_sdf"].float()).square().mean() + out["codebook_rows"].mean()
    return 256 * (loss + 0.25 * out["commitment_rows"].mean())


def distance(got, good):
    """||got - good|| / ||good||, wherever the two are."""
    got, good = (t.detach().double().cpu() for t in (got, good))
    return float((got - good).norm() / good.norm())


def compare_steps(model, plain, radii, tolerance):
    """Steps of both with the same weights and gradients kept over some steps: errors by each tensor's own size.

    A bias before a norm has no gradient but rounding: its error counts against all gradients.
    """
    worst = {}
    for step, radius in enumerate(radii):
        batch = spheres(radius, 128, "cuda")
        outputs = []
        for m in (model, plain):
            m.zero_grad(set_to_none=step % 3 > 0)
            out = m(batch)
            scaled_loss(out, batch).backward()
            outputs.append(out)
        got, out = outputs
        pairs = {name: (got[name], out[name]) for name in ("sdf", "latent", "commitment_rows")}
        pairs |= {name: (a.grad, b.grad) for (name, a), b in zip(model.named_parameters(), plain.parameters())}
        whole = torch.stack([b.detach().double().norm() for name, (_, b) in pairs.items() if name not in got]).norm()
        for name, (a, b) in pairs.items():
            a, b = a.detach().double(), b.detach().double()
            error = float((a - b).norm() / (b.norm() + (0 if name in got else 1e-2 * whole)))
            worst[name] = max(worst.get(name, 0), error)
        print(step, radius, max((e, name) for name, e in worst.items()))
        assert float((got["ids"] == out["ids"]).float().mean()) > 0.99
        with torch.no_grad():
            for a, b in zip(model.parameters(), plain.parameters()):
                change = b.grad.clamp(-1, 1) * 1e-4
                a.sub_(change)
                b.sub_(change)
        for m in (model, plain):
            m.quantizer.discard()
    assert max(worst.values()) < tolerance, sorted(worst.items(), key=lambda item: -item[1])[:5]


RADII = [[0.4], [0.4], [0.398], [0.4], [0.402], [0.401], [0.3, 0.42], [0.3, 0.42], [0.42, 0.3], [0.4], [0.401]]


@pytest.mark.gpu
def test_filling_up_on_the_kernels(cuda_device, monkeypatch):
    """Float32, no graph: batches filled up against batches as they are."""
    monkeypatch.setattr(SparseSDFVQVAE, "_may_graph", lambda self: self.cuda_graphs)
    model = model_of(model_channels=128).cuda().train()
    model._graphs = PassGraphs(Repeater)
    compare_steps(model, model_of(model_channels=128, cuda_graphs=False).cuda().train(), RADII, 1e-3)
    assert model._graphs.hits >= 4


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*GPU_MODES, "checkpoint"])
def test_graphs_on_the_card(mode, cuda_device):
    """The recorded kernels against the same kernels launched one by one."""
    changes = {"use_checkpoint": True} if mode == "checkpoint" else {}
    model, plain = (on_the_card("half" if changes else mode, **changes) for _ in range(2))
    plain._graphs = PassGraphs(Repeater)
    # the same bits but for the attention's backward pass, which adds in any order
    compare_steps(model, plain, RADII, 8 * torch.finfo(model.compute_dtype).eps)
    # recording a larger pass gives up the graphs of smaller ones, of which one would have been used once more
    assert 3 <= model._graphs.hits <= plain._graphs.hits
    batch = spheres([0.4], 128, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    loss_of(model(batch)).backward()
    torch.cuda.set_sync_debug_mode("default")
    first, second = model(batch), model(batch)
    with pytest.raises(RuntimeError, match="before the model's next forward pass"):
        first["sdf"].sum().backward()
    second["sdf"].sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["half", "bf16"])
def test_encoding_and_decoding_through_graphs(mode, cuda_device, monkeypatch):
    """Against plain passes: the kernels of passes that keep nothing (GELU inside its product), batches filled up."""
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    model, plain = on_the_card(mode).eval(), on_the_card(mode, cuda_graphs=False).eval()
    tolerance = 8 * torch.finfo(model.compute_dtype).eps
    with torch.no_grad():
        for radius in ([0.4], [0.4], [0.398], [0.4], [0.402], [0.3, 0.42], [0.42, 0.3], [0.3, 0.42]):
            batch = spheres(radius, 128, "cuda")
            got, good = model.encode(batch), plain.encode(batch)
            assert torch.equal(got["coords"], good["coords"])
            assert distance(got["mean"], good["mean"]) < tolerance
            assert float((got["ids"] == good["ids"]).float().mean()) > 0.99
            for windows in (None, batch["window_sizes"]):
                decoded = [m.decode_blocks(good["mean"], good["coords"], window_sizes=windows) for m in (model, plain)]
                assert distance(*decoded) < tolerance
    assert model._graphs.hits >= 9


@pytest.mark.gpu
def test_passes_from_two_streams(cuda_device, monkeypatch):
    """They share buffers: each waits for the other's, and its outputs are those of its own batch."""
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    model, plain = on_the_card("half").eval(), on_the_card("half", cuda_graphs=False).eval()
    batches = [spheres([0.4], 128, "cuda") for _ in range(2)]
    batches[1]["block_sdf"] = -batches[1]["block_sdf"]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        good = [plain.encode(batch)["mean"] for batch in batches]
        for _ in range(3):
            model.encode(batches[0])
        torch.cuda.synchronize()
        got = []
        for i in range(20):
            with torch.cuda.stream(streams[i % 2]):
                got.append(model.encode(batches[i % 2])["mean"])
        torch.cuda.synchronize()
    assert model._graphs.hits >= 20
    assert all(distance(mean, good[i % 2]) < 8 * torch.finfo(torch.float16).eps for i, mean in enumerate(got))


@pytest.mark.gpu
def test_a_float32_step_asks_the_card_nothing(cuda_device):
    """Its attention pads windows, whose number and length the batch tells, unless that is more than MAX_PADDING."""
    model, batch = model_of(model_channels=128).cuda().train(), spheres([0.4, 0.4], 128, "cuda")
    try:
        for mode in ("default", "error"):  # the first step compiles
            torch.cuda.set_sync_debug_mode(mode)
            scaled_loss(model(batch), batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_two_gpus_and_a_model_on_the_second(cuda_device, monkeypatch):
    """While the first is the current one: the values and gradients of the same model on the first, graphs included."""
    if torch.cuda.device_count() < 2:
        pytest.fail(f"this test needs two GPUs, there are {torch.cuda.device_count()} (-k 'not two_gpus' skips it)")
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    devices = ["cuda:0", "cuda:1"]
    models = [on_the_card("half", device) for device in devices]
    tolerance = 8 * torch.finfo(torch.float16).eps
    for radius in ([0.4], [0.4], [0.398], [0.4]):
        results = []
        for model, device in zip(models, devices):
            batch = spheres(radius, 128, device)
            model.zero_grad()
            out = model(batch)
            scaled_loss(out, batch).backward()
            model.quantizer.discard()
            gradient = torch.cat([p.grad.float().view(-1) for p in model.parameters()])
            results.append([out["sdf"], out["latent"], gradient])
        assert all(distance(got, good) < tolerance for good, got in zip(*results))
    for radius in ([0.4], [0.4], [0.4]):
        with torch.no_grad():
            encoded = [m.eval().encode(spheres(radius, 128, device)) for m, device in zip(models, devices)]
            decoded = [m.decode_blocks(e["mean"], e["coords"]) for m, e in zip(models, encoded)]
        assert distance(encoded[1]["mean"], encoded[0]["mean"]) < tolerance and distance(*decoded) < tolerance
    assert torch.cuda.current_device() == 0 and models[0]._graphs.hits == models[1]._graphs.hits >= 3


@pytest.mark.gpu
def test_memory_of_graphs_does_not_creep(cuda_device):
    model = on_the_card("half")
    generator = torch.Generator().manual_seed(0)
    batches = [spheres([0.3 + 0.12 * float(torch.rand(1, generator=generator))], 128, "cuda") for _ in range(20)]
    seen = []
    for step in range(160):
        out = model(batches[step % 20])
        (out["sdf"].square().mean() + out["codebook_rows"].mean()).backward()
        model.zero_grad()
        model.quantizer.discard()
        del out
        if step % 20 == 19:
            torch.cuda.empty_cache()
            seen.append(torch.cuda.memory_reserved())
    graphs = model._graphs
    print("reserved", seen, "graphs", len(graphs._recordings), "hits", graphs.hits, "misses", graphs.misses)
    assert graphs.hits > 100
    assert seen[-1] <= seen[-3]
