"""Forward + backward, encode and decode of the published network on a spherical shell.

python benchmarks/bench_network.py --resolution 256 512 1024 [--no-graphs] [--json FILE]
    [--profile FOLDER]

Prints, and writes to FILE, milliseconds (median, fastest, slowest), peak memory of PyTorch's allocator with the region
of CUDA graphs ("peak_gb") and what it had reserved at most while recording them, too ("reserved_gb"), and the
arithmetic floor: multiply-adds with the 8-tap rule and every tap counted, three times the forward ones for forward +
backward, at 790 TFLOP/s. "floor_share" is the floor over the median, and, where calls are timed back to back too,
over that time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path

import torch
from shell_batch import machine, shell_batch, timed

from trellis.models.autoencoders.pass_graphs import SIGHTINGS
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE

RATE = 790e12
LOSS_SCALE = 2.0**16


def multiply_adds(sizes: list[int], c: int = 512, blocks: int = 4) -> tuple[float, float]:
    """Forward multiply-adds of encoder and decoder; sizes as in a batch's level_sizes."""
    _, n1, n2, n3 = sizes
    w = [c // 16, c // 8, c // 4, c]
    encoder = sum(27 * n * b * (a + b) for n, a, b in zip((n1, n2, n3), w, w[1:]))
    layers = blocks * n3 * 12 * c * c
    decoder = 0
    for side, (a, b) in zip((1, 2, 4), zip(w[::-1], w[2::-1])):
        n = n3 * side**3
        decoder += 27 * n * a * b + 8 * 8 * n * b * b
    return encoder + layers, decoder + layers


def row(name: str, times: list[float], peak: int, reserved: int, floor_ms: float) -> dict:
    median = statistics.median(times)
    return {
        "what": name,
        "median_ms": round(median, 2),
        "fastest_ms": round(times[0], 2),
        "slowest_ms": round(times[-1], 2),
        "peak_gb": round(peak / 1e9, 2),
        "reserved_gb": round(reserved / 1e9, 2),
        "floor_ms": round(floor_ms, 2),
        "floor_share": round(floor_ms / median, 3),
    }


def measure(model: SparseSDFVQVAE, function, name: str, floor_ms: float, repeats: int) -> dict:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # as many calls as a cell of sizes needs before it has its graph
    for _ in range(SIGHTINGS[model.training] + 1):
        function()
    torch.cuda.synchronize()
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = timed(function, repeats)
    peak = torch.cuda.max_memory_allocated() + model.graph_bytes
    return row(name, times, peak, max(reserved, torch.cuda.max_memory_reserved()), floor_ms)


def back_to_back(function, repeats: int) -> float:
    """Milliseconds a call when the host runs ahead, as in training."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / repeats


def profile(function, path: Path) -> None:
    """Kernel times of one call as a table."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        function()
        torch.cuda.synchronize()
    table = recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=70, max_name_column_width=110)
    path.write_text(table, encoding="utf-8")


def bench(model: SparseSDFVQVAE, resolution: int, repeats: int, profiles: Path | None) -> list[dict]:
    """The rows of one resolution."""
    model.release_graphs()
    batch = shell_batch(resolution, "cuda")
    target = batch["block_sdf"].float()
    encoder, decoder = (2e3 * x / RATE for x in multiply_adds(batch["level_sizes"]))

    parameters = list(model.parameters())

    def step() -> None:
        out = model(batch)
        loss = (out["sdf"] - target).square().mean()
        loss = loss + out["codebook_rows"].mean() + 0.25 * out["commitment_rows"].mean()
        (LOSS_SCALE * loss).backward()
        for parameter in parameters:
            parameter.grad = None
        model.quantizer.discard()

    @torch.no_grad()
    def encode() -> dict:
        return model.encode(batch)

    model.train()
    rows = [measure(model, step, "forward + backward", 3 * (encoder + decoder), repeats)]
    between = back_to_back(step, repeats)
    rows[0]["back_to_back_ms"] = round(between, 2)
    rows[0]["back_to_back_floor_share"] = round(rows[0]["floor_ms"] / between, 3)
    if profiles:
        profiles.mkdir(parents=True, exist_ok=True)
        profile(step, profiles / f"step_{resolution}.txt")
    model.release_graphs()
    model.eval()
    latent = encode()

    @torch.no_grad()
    def decode() -> None:
        model.decode_blocks(latent["mean"], latent["coords"], window_sizes=batch["window_sizes"])

    rows.append(measure(model, encode, "encode", encoder, repeats))
    rows.append(measure(model, decode, "decode", decoder, repeats))
    sizes = batch["level_sizes"]
    return [{"resolution": resolution, "voxels_in": sizes[0], "voxels_out": 512 * sizes[3], **r} for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--weights", choices=["float16", "bfloat16", "float32"], help="as --dtype")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel from the host")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {"date": date.today().isoformat(), **machine(), "dtype": args.dtype, "rows": []}
    model = SparseSDFVQVAE(model_channels=512, latent_channels=16, num_blocks=4, cuda_graphs=not args.no_graphs).cuda()
    model.set_compute_dtype(getattr(torch, args.dtype))
    results["cuda_graphs"] = not args.no_graphs
    results["weights"] = args.weights or args.dtype
    model.encoder.to(getattr(torch, results["weights"]))
    model.decoder.to(getattr(torch, results["weights"]))
    for resolution in args.resolution:
        for r in bench(model, resolution, args.repeats, args.profile):
            results["rows"].append(r)
            print(json.dumps(r), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
