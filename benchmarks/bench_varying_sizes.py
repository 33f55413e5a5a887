"""Training steps on shapes of varying size, with and without CUDA graphs.

python benchmarks/bench_varying_sizes.py --resolution 256 [--shapes 60] [--steps 240] [--json FILE]

The shapes are ellipsoids whose three half-axes are drawn from [0.4, 1] and scaled so that the longest is 0.475 of the
grid, one a step, in random order. Prints milliseconds a step back to back over the second half of the steps, the share
of steps that a graph ran in each quarter of the run, the number of graphs, and memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from shell_batch import BAND, machine

from trellis.datasets.sparse_sdf import window_sizes
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.modules.sparse.morton import packed_keys, slot_positions

LOSS_SCALE = 2.0**16


def ellipsoid_batch(resolution: int, half_axes: torch.Tensor, device: str) -> dict:
    """The batch that collate makes of one ellipsoid; distances to first order, f / |grad f|."""
    side = resolution // 8
    axes = half_axes.to(device)

    def distance(points: torch.Tensor) -> torch.Tensor:
        scaled = points / axes
        f = scaled.norm(dim=-1)
        return f * (f - 1) / (scaled / axes).norm(dim=-1).clamp_min(1e-6)

    axis = torch.arange(side, device=device)
    blocks = torch.cartesian_prod(axis, axis, axis)
    near = distance((blocks * 8 + 4) / resolution - 0.5).abs() * resolution < BAND + 14
    coords = torch.cat([torch.zeros_like(blocks[near][:, :1]), blocks[near]], 1)
    coords = coords[torch.argsort(packed_keys(coords))].int()
    voxels = coords[:, None, 1:] * 8 + slot_positions(8).to(device)
    sdf = (distance((voxels + 0.5) / resolution - 0.5) * resolution / BAND).clamp(-1, 1).half()
    active = sdf.abs() < 1
    kept = active.any(1)
    coords, sdf, active = coords[kept], sdf[kept], active[kept]
    sizes = [active, active.view(-1, 64, 8).any(2), active.view(-1, 8, 64).any(2)]
    return {
        "block_coords": coords,
        "block_sdf": sdf,
        "active": active,
        "blocks_per_sample": torch.tensor([len(coords)]),
        "level_sizes": [int(s.sum()) for s in sizes] + [len(coords)],
        "window_sizes": window_sizes(coords[:, 1:].cpu().numpy()),
        "resolution": resolution,
    }


def run(batches: list[dict], order: list[int], graphs: bool) -> dict:
    """One run over the batches in that order."""
    torch.manual_seed(0)
    model = SparseSDFVQVAE(model_channels=512, latent_channels=16, num_blocks=4, cuda_graphs=graphs).cuda().train()
    model.encoder.half()
    model.decoder.half()
    model.set_compute_dtype(torch.float16)
    parameters = list(model.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    hits, reserved = [], []
    for step, number in enumerate(order):
        if step == len(order) // 2:
            start.record()
        batch = batches[number]
        before = model._graphs.hits
        out = model(batch)
        loss = (out["sdf"] - batch["block_sdf"].float()).square().mean()
        loss = loss + out["codebook_rows"].mean() + 0.25 * out["commitment_rows"].mean()
        (LOSS_SCALE * loss).backward()
        for parameter in parameters:
            parameter.grad = None
        model.quantizer.discard()
        hits.append(model._graphs.hits - before)
        if (step + 1) % (len(order) // 4) == 0:
            reserved.append(round(torch.cuda.memory_reserved() / 1e9, 2))
    stop.record()
    stop.synchronize()
    quarter = len(order) // 4
    return {
        "cuda_graphs": graphs,
        "ms_a_step": round(start.elapsed_time(stop) / (len(order) - len(order) // 2), 2),
        "hit_rate": [round(sum(hits[i * quarter : (i + 1) * quarter]) / quarter, 2) for i in range(4)],
        "graphs": len(model._graphs._recordings),
        "reserved_gb": reserved,
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--shapes", type=int, default=60)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(args.shapes):
        axes = 0.4 + 0.6 * torch.rand(3, generator=generator)
        batches.append(ellipsoid_batch(args.resolution, 0.475 * axes / axes.max(), "cuda"))
    blocks = sorted(b["level_sizes"][3] for b in batches)
    order = torch.randint(args.shapes, (args.steps,), generator=generator).tolist()
    results = {**machine(), "resolution": args.resolution, "blocks": [blocks[0], blocks[-1]], "rows": []}
    for graphs in (False, True):
        results["rows"].append(run(batches, order, graphs))
        print(json.dumps({key: results[key] for key in ("resolution", "blocks")} | results["rows"][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
