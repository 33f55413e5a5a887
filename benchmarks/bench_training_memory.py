"""Memory that training takes per latent voxel, beside the trainer's estimate.

python benchmarks/bench_training_memory.py DATA [--config FILE] [--set KEY=VALUE ...] [--json FILE]

Prints, and appends to FILE, for the smallest and the largest shape (uncropped unless the config says otherwise) the
peak over forward and backward beyond what was held before, and the estimate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

import torch
from shell_batch import machine

from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.loader import to_device
from trellis.utils.dist_utils import Ranks

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "sparse_sdf_vqvae_512.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(
            config=str(args.config), output_dir=folder, data_dir=args.data, overrides=tuple(args.overrides)
        )
        trainer = build_trainer(options, Ranks(), device)
    trainer.model.train()
    trainer.model.cuda_graphs = False  # passes as they are: recordings take memory of their own where there is room
    cost = trainer.objective.cost(trainer.precision.mode)
    samples = sorted((trainer.dataset[0, i] for i in range(len(trainer.dataset))), key=cost)
    results = {"date": date.today().isoformat(), **machine(), "overrides": args.overrides, "rows": []}
    # The largest goes first and last: the first time, buffers that stay are made.
    for sample in (samples[-1], samples[0], samples[-1]):
        batch = to_device(trainer.objective.collate([sample]), device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss, logged = trainer.objective.losses(trainer.model, batch)
        trainer.precision.backward(loss)
        peak = torch.cuda.max_memory_allocated() - before
        trainer.objective.discard()
        trainer.precision.drop()
        del loss, logged
        row = {"blocks": len(sample["block_coords"]), "level_sizes": sample["level_sizes"]}
        results["rows"].append({**row, "measured_gb": peak / 1e9, "estimated_gb": cost(sample) / 1e9})
        print(json.dumps({"overrides": args.overrides, **results["rows"][-1]}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
