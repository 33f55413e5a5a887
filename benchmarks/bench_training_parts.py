"""Where the host's time goes in a training step, and when the GPU has nothing to do.

python benchmarks/bench_training_parts.py DATA [--config FILE] [--set KEY=VALUE ...] [--warm-up N] [--steps N]
    [--profiled N] [--json FILE] [--device cpu]

DATA is a prepared folder. Prints, and writes to FILE: mean and median milliseconds of the timed steps; the host's
milliseconds in each part of a step, of which some lie within others (waits for the device count where they happen);
passes through a CUDA graph and others. On a GPU also, from a trace of the steps after: milliseconds a step in which it
has nothing to do, by the part in which the work that ends the gap was launched. The trace slows the host down, so that
these are more than in the timed steps. --device cpu tries the command out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from shell_batch import machine
from torch.profiler import ProfilerActivity, profile, record_function

from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.loader import DeviceBatches
from trellis.utils.dist_utils import Ranks

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "sparse_sdf_vqvae_512.json"
PARTS = {
    "trainer": ["_launch_step", "_passes", "_update", "_finish_step", "_log_step"],
    "objective": ["losses", "statistics", "commit"],
    "precision": ["backward", "collect", "unscale", "step"],
    "model": ["_through_graph"],
}
MARK = "part: "
LEAST_GAP_US = 20


class Clock:
    """Seconds spent in functions, which also carry their name into a trace."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, label: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            with record_function(MARK + label):
                result = real(*args, **named)
            self.spent[label] += time.perf_counter() - began
            return result

        setattr(owner, name, timed)


def idle_ms(trace: Path) -> dict[str, float]:
    """Milliseconds without work for the GPU in a Chrome trace, by the innermost part that launched what came next."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    parts = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(MARK)]
    idle: dict[str, float] = defaultdict(float)
    end = None
    for event in sorted(work, key=lambda e: e["ts"]):
        if end is not None and event["ts"] - end > LEAST_GAP_US:
            at = launched.get(event["args"].get("correlation"), event["ts"])
            around = [p for p in parts if p["ts"] <= at <= p["ts"] + p["dur"]]
            name = min(around, key=lambda p: p["dur"])["name"].removeprefix(MARK) if around else "none"
            idle[name] += (event["ts"] - end) / 1e3
        end = max(end or 0, event["ts"] + event["dur"])
    return dict(idle)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cuda = args.device == "cuda"
    device = torch.device(args.device, 0) if cuda else torch.device("cpu")
    options = RunOptions(
        config=str(args.config), output_dir=str(folder / "run"), data_dir=args.data, device=args.device,
        overrides=("trainer.args.max_steps=100000", *args.overrides),
    )
    trainer = build_trainer(options, Ranks(), device)
    clock, graphs = Clock(), trainer.model._graphs
    owners = {"trainer": trainer, **{name: getattr(trainer, name) for name in PARTS if name != "trainer"}}
    for owner, names in PARTS.items():
        for name in names:
            clock.watch(owners[owner], name, f"{owner}.{name}")
    batches = {name: getattr(DeviceBatches, name) for name in ("__next__", "prefetch")}
    for name in batches:
        clock.watch(DeviceBatches, name, f"batches.{name}")
    first, last = trainer.step + args.warm_up, trainer.step + args.warm_up + args.steps
    result: dict[str, Any] = {}
    recorder = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) if cuda else None

    def after_step(step: int) -> None:
        if step in (first, last) and cuda:
            torch.cuda.synchronize()
        if step == first:
            clock.spent.clear()
            result["began"], result["through"] = time.perf_counter(), (graphs.hits, graphs.misses)
        if step == last:
            began, (hits, misses) = result.pop("began"), result.pop("through")
            result["mean_step_ms"] = round(1e3 * (time.perf_counter() - began) / args.steps, 2)
            result["host_ms"] = {k: round(1e3 * v / args.steps, 2) for k, v in clock.spent.items()}
            result.update(passes_through_graphs=graphs.hits - hits, passes_without=graphs.misses - misses)
            if recorder is not None:
                recorder.start()

    try:
        trainer.run(max_steps=args.warm_up + args.steps + (args.profiled if cuda else 0), after_step=after_step)
    finally:
        for name, real in batches.items():
            setattr(DeviceBatches, name, real)
    if recorder is not None:
        torch.cuda.synchronize()
        recorder.stop()
        recorder.export_chrome_trace(str(folder / "trace.json"))
        idle = idle_ms(folder / "trace.json")
        result["profiled"] = args.profiled
        result["idle_ms"] = {part: round(ms / args.profiled, 3) for part, ms in idle.items()}
    lines = [json.loads(line) for line in (folder / "run" / "log.txt").read_text(encoding="utf-8").splitlines()]
    timed = [line["step_s"] for line in lines if first < line["step"] <= last]
    result["median_step_ms"] = round(1e3 * statistics.median(timed), 2)
    return {
        "date": date.today().isoformat(), **machine(), "config": Path(args.config).name,
        "overrides": list(args.overrides), "warm_up": args.warm_up, "steps": args.steps, **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--warm-up", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profiled", type=int, default=6, help="steps in the trace")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = bench(args, Path(folder))
    print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
