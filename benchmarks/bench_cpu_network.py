"""Encode and decode of a sphere on the CPU with the published network: time and peak memory.

    python benchmarks/bench_cpu_network.py [--resolution 512] [--threads 2] [--channels 512] [--json FILE]

The weights are random; time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from datetime import date
from pathlib import Path

import torch
from shell_batch import shell_batch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batch = shell_batch(args.resolution, "cpu")
    model = SparseSDFVQVAE(model_channels=args.channels, latent_channels=16, num_blocks=4).eval()
    figures: dict[str, object] = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "resolution": args.resolution,
        "channels": args.channels,
        "blocks": len(batch["block_coords"]),
        "active_voxels": int(batch["active"].sum()),
    }
    with torch.no_grad():
        for name in ("encode", "decode"):
            wall, cpu = time.perf_counter(), time.process_time()
            if name == "encode":
                out = model.encode(batch)
            else:
                model.decode_ids(out["ids"], out["coords"])
            figures[name] = {
                "wall_s": round(time.perf_counter() - wall, 2),
                "cpu_s": round(time.process_time() - cpu, 2),
                "peak_gb": round(peak_gb(), 2),
            }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
