"""Do the number formats train to the same loss? One run of equal seed and order in each, on prepared shapes.

python benchmarks/bench_formats.py DATA [--modes inflat_all amp bf16 null] [--seeds 0 1] [--set KEY=VALUE ...]
    [--steps 200] [--json FILE] [--device cpu]

The config is that of 512 with the changes given. Prints, and writes to FILE after each, a row a run: mean loss and band
error of the first and last 20 steps, and the steps skipped for an overflow. The seeds show what is noise: the last line
has, for each format, the mean over its seeds and the widest difference between two of them. On a CPU, to try it out,
the half formats train in float32.
"""

from __future__ import annotations

import argparse
import gc
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
        device=args.device,
    )
    trainer = build_trainer(options, Ranks(), torch.device(args.device, 0))
    began = time.perf_counter()
    trainer.run(max_steps=args.steps)
    seconds = time.perf_counter() - began
    if trainer.step != args.steps:
        raise SystemExit(f"{mode}, seed {seed}: ended after {trainer.step} of {args.steps} steps")
    lines = [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]
    row = {"mode": mode, "seed": seed, "seconds": round(seconds, 1)}
    row["skipped"] = sum(line["grad_norm"] is None for line in lines)
    for name, part in (("first", lines[:WINDOW]), ("last", lines[-WINDOW:])):
        for key in ("loss", "mse_band"):
            row[f"{name}_{key}"] = round(statistics.fmean(line[key] for line in part if line[key] is not None), 5)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{mode: {figure of the last steps: [mean over seeds, widest difference]}}."""
    out: dict[str, dict[str, list[float]]] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for key in ("last_loss", "last_mse_band"):
            values = [row[key] for row in rows if row["mode"] == mode]
            spread = max(values) - min(values)
            out.setdefault(mode, {})[key] = [round(statistics.fmean(values), 5), round(spread, 5)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--modes", nargs="+", default=["inflat_all", "amp", "bf16", "null"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
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
            gc.collect()  # the network and its graphs, before the next one is built
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps(summary(results["rows"])))


if __name__ == "__main__":
    main()
