"""Do the number formats train to the same loss? One run of equal seed and order in each, on prepared shapes.

python benchmarks/bench_formats.py DATA [--modes inflat_all amp bf16 null] [--seeds 0 1] [--set KEY=VALUE ...]
    [--steps 200] [--json FILE]

The config is that of 512 with the changes given. Prints, and appends to FILE, a row a run: mean loss and band error of
the first and last 20 steps, and the steps skipped for an overflow. Runs of other seeds show what is noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from shell_batch import machine

from trellis.trainers.build import RunOptions, build_trainer
from trellis.utils.dist_utils import Ranks

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "sparse_sdf_vqvae_512.json"
WINDOW = 20


def run(args: argparse.Namespace, mode: str, seed: int, folder: Path) -> dict[str, Any]:
    """One training; its row."""
    own = (f"trainer.args.fp16_mode={mode}", f"trainer.args.seed={seed}", "trainer.args.max_steps=100000")
    options = RunOptions(
        config=str(args.config), output_dir=str(folder), data_dir=args.data, overrides=(*args.overrides, *own),
        device="cuda",
    )
    trainer = build_trainer(options, Ranks(), torch.device("cuda", 0))
    began = time.perf_counter()
    trainer.run(max_steps=args.steps)
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    row = {"mode": mode, "seed": seed, "seconds": round(seconds, 1)}
    row["skipped"] = sum(line["grad_norm"] is None for line in lines)
    for name, part in (("first", lines[:WINDOW]), ("last", lines[-WINDOW:])):
        for key in ("loss", "mse_band"):
            row[f"{name}_{key}"] = round(statistics.fmean(line[key] for line in part if line[key] is not None), 5)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--modes", nargs="+", default=["inflat_all", "amp", "bf16", "null"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {"date": date.today().isoformat(), **machine(), "config": args.config.name, "steps": args.steps}
    results |= {"overrides": args.overrides, "rows": []}
    for mode in args.modes:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                results["rows"].append(run(args, mode, seed, Path(folder)))
            print(json.dumps(results["rows"][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
