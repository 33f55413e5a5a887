"""Tokens in, binary PLY out: time and memory of each stage for a spherical shell, within several memory budgets.

    python benchmarks/bench_decode.py [--resolution 1024] [--budgets none 4 2] [--repeats 5] [--json FILE]

Input: one random token for each block of the shell of radius 0.475 R, in a token file. The network has the published
size and random weights, so what it makes of them is no surface. Its values are therefore made and timed, and then
replaced, outside the clock, by those of the sphere's exact distance at the same blocks, in the same place in memory;
extraction and writing are timed on these. --noise adds normal noise to the distance (in units of the band), since a
trained network's values are not quite a distance, which the extraction has more work with.

Stages: read the token file; network; surface; packing and writing (written beside its place, synced to disk, renamed).
Memory: the largest that PyTorch's allocator had allocated, and reserved, from reading to writing, weights included.
Before anything is timed, meshes made on the device are compared with the numpy ones of `extract_mesh`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from shell_batch import RADIUS, machine, shell_batch

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.isosurface_torch import extract_mesh_on
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.pipelines.mesh_output import write_ply_tensors
from trellis.pipelines.token_files import Tokens, load_tokens, save_tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer
from trellis.utils.blocks import SparseSDFBlocks, c_to_morton_permutation

NOTE = (
    "The network has random weights: its values are timed, then replaced outside the clock by the "
    "sphere's exact distance at the same blocks, on which surface and writing are timed."
)
STAGES = ("read", "network", "surface", "write")


def shell(resolution: int, noise: float, device: str) -> tuple[np.ndarray, torch.Tensor]:
    """Blocks [M, 3] int16 of the shell and their values float16 [M, 8, 8, 8] in host memory."""
    batch = shell_batch(resolution, device)
    to_c_order = torch.argsort(torch.from_numpy(c_to_morton_permutation())).to(device)
    values = batch["block_sdf"][:, to_c_order]
    if noise:
        generator = torch.Generator(device).manual_seed(0)
        added = torch.randn(values.shape, generator=generator, device=device) * noise
        values = (values + added).clamp(-1, 1).half()
    return batch["block_coords"][:, 1:].short().cpu().numpy(), values.view(-1, 8, 8, 8).cpu()


def compare_with_numpy(resolution: int, noise: float, device: str) -> str:
    """One line: whether the device's mesh is numpy's."""
    index, values = shell(resolution, noise, device)
    blocks = SparseSDFBlocks(index, values.numpy(), None, resolution)
    want, got = extract_mesh(blocks), extract_mesh_on(blocks, device)
    rows = [faces[np.lexsort(faces.T)] for _, faces in (want, got)]
    same = want[0].shape == got[0].shape and np.array_equal(*rows)
    error = float(np.abs(want[0] - got[0]).max()) * resolution if want[0].shape == got[0].shape else None
    return f"R {resolution}, noise {noise}: {len(want[1])} triangles, same faces {same}, vertices within {error} voxel"


def bench(tokenizer: SparseSDFTokenizer, path: Path, field: torch.Tensor, target: Path, repeats: int) -> dict:
    """Medians of the stages, in milliseconds, and the peak of memory in GB."""
    on_card = tokenizer.device.type == "cuda"
    wait = torch.cuda.synchronize if on_card else lambda: None
    times: dict[str, list[float]] = {name: [] for name in STAGES}
    peaks: list[tuple[float, float]] = []
    for _ in range(repeats + 1):  # the first one warms up
        if on_card:
            wait()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        marks = [time.perf_counter()]
        tokens = load_tokens(path)
        tokenizer.check(tokens)
        marks.append(time.perf_counter())
        values = tokenizer.decode_values(tokens)
        wait()
        marks.append(time.perf_counter())
        values.copy_(field)
        wait()
        pause = time.perf_counter() - marks[-1]
        vertices, faces = tokenizer.surface_of(tokens, values)
        wait()
        marks.append(time.perf_counter() - pause)
        write_ply_tensors(target, vertices, faces)
        marks.append(time.perf_counter() - pause)
        for name, first, second in zip(STAGES, marks, marks[1:]):
            times[name].append(1000 * (second - first))
        if on_card:
            peaks.append((torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9))
        counts, off = (len(vertices), len(faces)), (vertices.norm(dim=1) - RADIUS).abs().max()
        del values, vertices, faces
    totals = [sum(parts) for parts in zip(*times.values())]
    row = {f"{name}_ms": round(statistics.median(times[name][1:]), 1) for name in STAGES}
    row |= {
        "total_ms": round(statistics.median(totals[1:]), 1),
        "total_fastest_ms": round(min(totals[1:]), 1),
        "total_slowest_ms": round(max(totals[1:]), 1),
        "first_call_ms": round(totals[0], 1),
        "vertices": counts[0],
        "triangles": counts[1],
        "file_mb": round(os.path.getsize(target) / 1e6, 1),
        "farthest_vertex_voxels": round(float(off) * tokens.resolution, 4),
    }
    if peaks:
        row |= {"allocated_gb": round(max(p[0] for p in peaks), 2), "reserved_gb": round(max(p[1] for p in peaks), 2)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--budgets", nargs="+", default=["none", "4", "2"], help="GB, or none")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compare", type=int, default=192, help="resolution of the comparison with numpy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where files are written; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {"date": date.today().isoformat(), "torch": torch.__version__, "resolution": args.resolution}
    results["note"] = NOTE
    if args.device == "cuda":
        results |= machine()
    results["compared"] = [compare_with_numpy(args.compare, noise, args.device) for noise in (0.0, 0.01)]
    print("\n".join([NOTE, *results["compared"]]), flush=True)
    model = SparseSDFVQVAE(model_channels=args.channels, latent_channels=16, num_blocks=4)
    results["rows"] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, target = Path(folder) / "shell.safetensors", Path(folder) / "shell.ply"
        for noise in args.noise:
            index, field = shell(args.resolution, noise, args.device)
            for budget in args.budgets:
                limit = None if budget == "none" else float(budget)
                tokenizer = SparseSDFTokenizer(model, device=args.device, max_memory_gb=limit)
                ids = np.random.default_rng(0).integers(0, tokenizer.codebook_size, len(index)).astype(np.int32)
                save_tokens(
                    path,
                    Tokens(
                        ids=ids,
                        block_index=index,
                        to_world=None,
                        resolution=args.resolution,
                        band_voxels=4,
                        quantizer=tokenizer.quantizer_name,
                        codebook_size=tokenizer.codebook_size,
                        model_hash=tokenizer.model_hash,
                    ),
                )
                row = {"noise": noise, "budget_gb": limit, "blocks": len(index)}
                row |= bench(tokenizer, path, field, target, args.repeats)
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
