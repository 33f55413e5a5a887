"""A whole training step on prepared shapes: loading, network, optimizer, averages, log.

python benchmarks/bench_training.py DATA [--config FILE] [--set KEY=VALUE ...] [--steps N] [--json FILE] [--ranks 2]
    [--warm-up N] [--profiled N] [--cold] [--device cpu]

DATA is a prepared folder. Prints, and appends to FILE: seconds to the end of the first step (building and the codebook
included), and whether kernels were compiled for it ("cold": Triton's cache was empty; --cold gives it an empty one);
milliseconds a step, and two floors: what the GPU is busy in it (union of kernels and copies in a profile of the steps
after), and the arithmetic of an average step as bench_network.py counts it; wait for data, calls that wait for the
device in one step (an event that figures are read through is none), peak memory, and what the trainer estimated for its
largest micro-batch. "recordings" are the CUDA graphs recorded before, in the timed and in the profiled steps: each
takes as long as some fifty steps save, and a training of some hundred steps has seen all sizes it will meet, so figures
of a long run want a warm-up that leaves none in the others.

With --ranks it starts that many processes through torchrun, one GPU each. Then there are also the bound that the sizes
of shapes set for scaling, and, where FILE has a row of one rank with the same settings, the throughput over that one.

--device cpu tries the command out: no figure of it is about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_network import RATE, multiply_adds
from bench_rank_balance import bound
from shell_batch import machine
from torch.profiler import ProfilerActivity, profile

from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.launch import configure_logging
from trellis.utils.dist_utils import barrier, ranks_from_environment, start_process_group, stop_process_group

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "sparse_sdf_vqvae_512.json"
AIM_BUSY = 0.9
AIM_TWO_RANKS = 1.85


def cached_kernels() -> int:
    """Entries of Triton's cache."""
    home = Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"
    folder = Path(os.environ.get("TRITON_CACHE_DIR", home))
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def busy_ms(trace: Path) -> tuple[float, int]:
    """Milliseconds that kernels and copies cover together, and the number of kernels, of a Chrome trace."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    on_gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    covered, end = 0.0, float("-inf")
    for start, duration in sorted((e["ts"], e["dur"]) for e in on_gpu):
        covered += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return covered / 1e3, sum(e["cat"] == "kernel" for e in on_gpu)


class Watch:
    """Follows a run step by step: warm-up, timed steps, one step whose waits are counted, profiled steps."""

    def __init__(self, warm_up: int, steps: int, profiled: int, first_step: int, *, graphs: Any) -> None:
        """`graphs`: of the model on a GPU, else None."""
        self.cuda, self.graphs = graphs is not None, graphs
        self.timed = (first_step + warm_up, first_step + warm_up + steps)
        self.last = self.timed[1] + (1 + profiled if self.cuda else 0)
        self.recorded: list[int] = []
        self.first = first_step + 1
        self.times: dict[str, float] = {}
        self.peak = 0
        self.waits: list[str] = []
        self.recorder = profile(activities=[ProfilerActivity.CUDA])
        self._caught = warnings.catch_warnings(record=True)

    def after_step(self, step: int) -> None:
        if step in (self.first, *self.timed, self.last):
            if self.cuda:
                torch.cuda.synchronize()
            self.times[str(step)] = time.perf_counter()
            if self.cuda and step != self.first:
                self.recorded.append(sum(self.graphs._made.values()))
        if step == self.timed[0]:
            barrier()
        if not self.cuda:
            return
        if step == self.timed[0]:
            torch.cuda.reset_peak_memory_stats()
        if step == self.timed[1]:
            self.peak = torch.cuda.max_memory_allocated()
            self._list = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if step == self.timed[1] + 1:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            # turning the mode on warns, too, that it does not see everything
            found = [w for w in self._list if "called a synchronizing" in str(w.message)]
            self.waits = [f"{Path(w.filename).name}:{w.lineno}" for w in found]
            torch.cuda.synchronize()
            self.recorder.start()
        if step == self.last:
            self.recorder.stop()


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one configuration."""
    ranks = ranks_from_environment()
    cuda = args.device == "cuda"
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    kernels_before = cached_kernels()
    start_process_group(ranks, device)
    options = RunOptions(
        config=str(args.config), output_dir=str(folder), data_dir=args.data,
        overrides=("trainer.args.max_steps=100000", *args.overrides), device=args.device,
    )
    began = time.perf_counter()
    trainer = build_trainer(options, ranks, device)
    built = time.perf_counter()
    graphs = trainer.model._graphs if cuda else None
    watch = Watch(args.warm_up, args.steps, args.profiled, trainer.step, graphs=graphs)
    trainer.run(max_steps=watch.last, after_step=watch.after_step)
    seconds = watch.times[str(watch.timed[1])] - watch.times[str(watch.timed[0])]
    step_ms = 1e3 * seconds / args.steps
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()] if ranks.is_first else []
    timed = [r for r in lines if watch.timed[0] < r["step"] <= watch.timed[1]]
    median = median_ms(timed, "step_s")
    on_gpu: dict[str, Any] = {}
    if cuda:
        folder.mkdir(parents=True, exist_ok=True)  # the first rank alone writes there
        trace = folder / f"trace{ranks.rank}.json"
        watch.recorder.export_chrome_trace(str(trace))
        busy, kernels = busy_ms(trace)
        on_gpu = {
            "profiled": args.profiled, "recordings": [b - a for a, b in zip([0, *watch.recorded], watch.recorded)],
            "gpu_busy_ms": round(busy / args.profiled, 2), "gpu_busy_share": round(busy / args.profiled / step_ms, 4),
            "gpu_busy_share_of_median": round(busy / args.profiled / median, 4) if median else None,
            "aim_busy_share": AIM_BUSY, "kernels_per_step": round(kernels / args.profiled),
            "waits_for_device": watch.waits, "peak_gb": round(watch.peak / 1e9, 2),
        }
    limit = trainer.memory_limit()
    samples = (trainer.dataset[0, i] for i in range(len(trainer.dataset)))
    cost, level_sizes = zip(*((limit.cost(sample), sample["level_sizes"]) for sample in samples))
    each = trainer.sampler.batch_size
    average = [each * statistics.fmean(sizes) for sizes in zip(*level_sizes)]
    model = trainer.objective.model_config
    work = 3 * sum(multiply_adds(average, model["model_channels"], model["num_blocks"]))
    scaling = {}
    sizes = trainer.sampler.sizes
    if ranks.world_size > 1 and sizes is not None:
        scaling["bound_over_one_rank_by_sizes"] = round(bound(sizes, ranks.world_size, each, 2000, shared_out=True), 3)
    held = sum(t.numel() * t.element_size() for t in held_tensors(trainer))
    stop_process_group()
    return {
        "date": date.today().isoformat(), **machine(), "ranks": ranks.world_size, "config": Path(args.config).name,
        "overrides": list(args.overrides), "fp16_mode": trainer.precision.mode,
        "warm_up": args.warm_up, "steps": args.steps,
        "parameters": trainer.precision.gradient.numel(), "shapes_per_step": trainer.sampler.global_batch,
        "start": "cold" if kernels_before == 0 else "kernels cached", "cached_kernels": kernels_before,
        "build_s": round(built - began, 2), "first_step_s": round(watch.times[str(watch.first)] - built, 2),
        "start_s": round(watch.times[str(watch.first)] - began, 2),
        "step_ms": round(step_ms, 2), "median_step_ms": median,
        "arithmetic_floor_ms": round(2e3 * work / RATE, 2),
        "shapes_per_s": round(1e3 * trainer.sampler.global_batch / step_ms, 2), **scaling,
        "slowest_steps_ms": slowest(timed), "data_wait_ms": median_ms(timed, "data_s"), **on_gpu,
        "weights_and_optimizer_gb": round(held / 1e9, 2), "estimated_largest_shape_gb": round(max(cost) / 1e9, 2),
        "last_loss": lines[-1]["loss"] if lines else None,
    }


def median_ms(records: list[dict[str, Any]], key: str) -> float | None:
    return round(1e3 * statistics.median(r[key] for r in records), 2) if records else None


def slowest(records: list[dict[str, Any]]) -> list[list[float]]:
    """[step, milliseconds] of the six longest steps."""
    return sorted(([r["step"], round(1e3 * r["step_s"], 1)] for r in records), key=lambda pair: -pair[1])[:6]


def held_tensors(trainer: Any) -> list[torch.Tensor]:
    """All that stays on the device between steps."""
    kept = {t.data_ptr(): t for t in [*trainer.model.state_dict().values(), *trainer.precision.weights().values()]}
    tensors = [*kept.values(), trainer.precision.gradient]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return tensors + [ema.average for ema in trainer.ema.values()]


def over_one_rank(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Throughput over the last of `rows` that differs in the number of ranks alone, of which it has one."""
    same = ("gpu", "config", "overrides", "fp16_mode")
    alone = [r for r in rows if r["ranks"] == 1 and all(r.get(key) == row[key] for key in same)]
    if row["ranks"] == 1 or not alone:
        return {}
    figures = {"over_one_rank": round(row["shapes_per_s"] / alone[-1]["shapes_per_s"], 3)}
    return figures | ({"aim_over_one_rank": AIM_TWO_RANKS} if row["ranks"] == 2 else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=40, help="steps before; passes are recorded as graphs in them")
    parser.add_argument("--profiled", type=int, default=12, help="steps under the profiler")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="give Triton an empty cache")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()
    if args.ranks > 1 and "RANK" not in os.environ:
        if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
            parser.error(f"--ranks {args.ranks} needs as many GPUs, there are {torch.cuda.device_count()}")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        os.execv(sys.executable, [*launcher, str(Path(__file__).resolve()), *sys.argv[1:]])
    configure_logging()
    with tempfile.TemporaryDirectory() as folder:
        if args.cold:
            os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "kernels")
        row = bench(args, Path(folder) / f"rank{os.environ.get('RANK', 0)}")
    if os.environ.get("RANK", "0") != "0":
        return
    rows = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else []
    row |= over_one_rank(row, rows)
    print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
