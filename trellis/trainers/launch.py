"""The training command: options, processes for the ranks, restarts, exit codes. torch is imported only to train."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trellis.config import InputError

if TYPE_CHECKING:
    from trellis.trainers.build import RunOptions

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_WRONG_INPUT = 1, 2
DEFAULT_PORT = 12345


def parser(prog: str) -> argparse.ArgumentParser:
    """The options of train.py: TRELLIS's, and --set and --device. `prog` is what the user calls the command."""
    made = argparse.ArgumentParser(
        prog=prog,
        description="Train a model from a config.",
        epilog=f"example: {prog} --config configs/vae/sparse_sdf_vqvae_64.json --data_dir DATA --output_dir OUT "
        "--set trainer.args.max_steps=20000",
    )
    made.add_argument("--config", required=True, help="config file (JSON)")
    made.add_argument("--output_dir", required=True, help="folder of the run: ckpts/, tb_logs/, samples/, log.txt")
    made.add_argument("--load_dir", default=None, help="run folder to load from (default: output_dir)")
    made.add_argument(
        "--ckpt", default="latest", help="latest (default: go on where there is something), none, or a step"
    )
    made.add_argument("--data_dir", required=True, help="prepared dataset, or several with commas between")
    made.add_argument("--auto_retry", type=int, default=0, metavar="N", help="restart after a crash, N times at most")
    made.add_argument("--tryrun", action="store_true", help="build everything, run nothing")
    made.add_argument("--profile", action="store_true", help="run 10 steps, write a trace to output_dir/profile")
    made.add_argument("--num_nodes", type=int, default=1, help="machines that train together")
    made.add_argument("--node_rank", type=int, default=0, help="number of this machine")
    made.add_argument(
        "--num_gpus", type=int, default=-1, help="processes on this machine (default: one per GPU; one without CUDA)"
    )
    made.add_argument("--master_addr", default="localhost", help="address of machine 0")
    made.add_argument(
        "--master_port", type=int, default=None,
        help=f"port on machine 0 (default: a free one; {DEFAULT_PORT} with several machines)",
    )
    made.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a config key, as in trainer.args.max_steps=40; repeatable; values are JSON",
    )
    made.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: cuda where there is a GPU")
    return made


def main(argv: Sequence[str] | None = None, *, prog: str = "python train.py") -> int:
    """Run the training command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser(prog).parse_args(arguments)
    configure_logging()
    try:
        return _launch(options, arguments, prog)
    except InputError as error:
        logger.error("%s", error)
        return EXIT_WRONG_INPUT


def configure_logging() -> None:
    """Log lines to stderr; ranks other than the first only speak up when something is wrong."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def _launch(options: argparse.Namespace, arguments: list[str], prog: str) -> int:
    from trellis.trainers.build import RunOptions, read_config
    from trellis.trainers.run import available_device, supervise, train_rank

    problems = []
    if options.num_nodes < 1 or not 0 <= options.node_rank < max(1, options.num_nodes):
        problems.append(f"--node_rank must be in [0, {options.num_nodes}), got {options.node_rank}")
    if options.num_gpus == 0 or options.num_gpus < -1:
        problems.append(f"--num_gpus must be at least 1, got {options.num_gpus}")
    if options.auto_retry < 0:
        problems.append(f"--auto_retry must be at least 0, got {options.auto_retry}")
    if not Path(options.data_dir).is_dir() and "," not in options.data_dir:
        problems.append(f"--data_dir: no such folder: {options.data_dir}")
    if problems:
        raise InputError("; ".join(problems))
    device = available_device(options.device)
    run = RunOptions(
        config=options.config, output_dir=options.output_dir, data_dir=options.data_dir, load_dir=options.load_dir,
        ckpt=options.ckpt, overrides=tuple(options.overrides), device=device, tryrun=options.tryrun,
        profile=options.profile,
    )
    read_config(run.config, run.overrides)  # once, before any process is started
    under_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not under_torchrun or os.environ["RANK"] == "0":
        _write_command(run, f"{prog} {shlex.join(arguments)}")
    if under_torchrun:
        if options.auto_retry:
            logger.warning("--auto_retry does nothing under torchrun: use its --max-restarts")
        return train_rank(run)
    return supervise(
        run, num_nodes=options.num_nodes, node_rank=options.node_rank, processes=options.num_gpus,
        master_addr=options.master_addr, master_port=options.master_port, auto_retry=options.auto_retry,
    )


def _write_command(run: RunOptions, command: str) -> None:
    output = Path(run.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "command.txt").write_text(command + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir {output}: {error}") from None
