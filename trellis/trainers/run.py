"""One rank's run, and the supervisor that starts a process per rank and restarts a crashed run."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trellis.config import InputError
from trellis.trainers.base import Trainer
from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.checkpoint import CheckpointError, manifest_steps
from trellis.trainers.launch import DEFAULT_PORT, EXIT_FAILED, EXIT_WRONG_INPUT, configure_logging
from trellis.trainers.logs import OutputError
from trellis.trainers.memory import OutOfDeviceMemory
from trellis.utils.dist_utils import Ranks, ranks_from_environment, start_process_group, stop_process_group

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long the other ranks may go on after one has failed; they may wait for it in a collective forever."""
CONNECTION_LOST = "by peer"
"""What gloo's errors say, closed or reset, where another rank has ended."""
NEVER_RETRIED = (0, EXIT_WRONG_INPUT, 130, 143)


def available_device(name: str | None) -> str:
    """ "cuda" or "cpu": the one asked for, or CUDA where there is a GPU. InputError for CUDA without a GPU."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise InputError("--device cuda: PyTorch sees no CUDA device")
    return name or ("cuda" if cuda else "cpu")


def train_rank(options: RunOptions) -> int:
    """Train as the rank that the environment names; problems are logged.

    Returns the exit code; with several ranks, the process ends with it.
    """
    ranks = ranks_from_environment()
    try:
        code = _train(options, ranks)
    except (Exception, KeyboardInterrupt) as error:
        code = _log_failure(error, ranks)
        if ranks.world_size > 1:
            _end_process(code)  # here, while the error still holds on to everything: nothing is taken down any more
        return code
    stop_process_group()
    if ranks.world_size > 1:
        # an interpreter that ends while gloo's threads do is at times aborted by them, with everything saved
        _end_process(code)
    return code


def _train(options: RunOptions, ranks: Ranks) -> int:
    device = torch.device("cpu")
    if options.device == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {ranks.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    start_process_group(ranks, device)
    trainer = build_trainer(options, ranks, device)
    if options.tryrun:
        logger.info("tryrun: everything is built, nothing is run")
        return 0
    return _profile(trainer, ranks) if options.profile else trainer.run()


def _log_failure(error: BaseException, ranks: Ranks) -> int:
    """Say what ended a rank; returns its exit code."""
    if isinstance(error, InputError):
        logger.error("%s", error)
        return EXIT_WRONG_INPUT
    if isinstance(error, (CheckpointError, OutputError, OutOfDeviceMemory)):
        logger.error("%s", error)
    elif isinstance(error, KeyboardInterrupt):
        logger.error("interrupted, nothing more was saved")
        return 130
    elif ranks.world_size > 1 and CONNECTION_LOST in str(error):
        logger.error("rank %d ends, since another one did", ranks.rank)
    else:
        logger.error("rank %d failed", ranks.rank, exc_info=error)
    return EXIT_FAILED


def _end_process(code: int) -> None:
    """End this rank at once.

    The others may be in a collective that this rank will not join. Leaving the group in order would wait for them, with
    NCCL forever, and so would what an interpreter does at its end; an ended process is what supervisors can see.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _profile(trainer: Trainer, ranks: Ranks) -> int:
    """Ten steps, the last five in a trace under output_dir/profile; no checkpoint."""
    from torch.profiler import ProfilerActivity, profile, schedule

    folder = trainer.output_dir / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / f"trace_rank{ranks.rank}.json"))
        key = "cuda_time_total" if trainer.device.type == "cuda" else "cpu_time_total"
        table = profiler.key_averages().table(sort_by=key, row_limit=40)
        (folder / f"summary_rank{ranks.rank}.txt").write_text(table, encoding="utf-8")

    with profile(
        activities=activities, schedule=schedule(wait=2, warmup=3, active=5), on_trace_ready=write, profile_memory=True
    ) as profiler:
        code = trainer.run(max_steps=10, after_step=lambda step: profiler.step())
    logger.info("the trace is in %s", folder)
    return code


def supervise(
    options: RunOptions,
    *,
    num_nodes: int = 1,
    node_rank: int = 0,
    processes: int = -1,
    master_addr: str = "localhost",
    master_port: int | None = None,
    auto_retry: int = 0,
) -> int:
    """Start this machine's ranks, wait for them, and restart after a crash; returns the exit code.

    A crash is any exit code but 0, 2 (wrong input) and 130/143 (a signal): after it the run goes on from its newest
    valid checkpoint, at most `auto_retry` times.
    """
    if processes == -1:
        processes = max(1, torch.cuda.device_count()) if options.device == "cuda" else 1
    if options.device == "cuda" and processes > torch.cuda.device_count():
        raise InputError(f"--num_gpus must be at most {torch.cuda.device_count()}, the GPUs here, got {processes}")
    if processes * num_nodes == 1 and auto_retry == 0:
        return train_rank(options)
    code = EXIT_FAILED
    for attempt in range(auto_retry + 1):
        port = master_port or (DEFAULT_PORT if num_nodes > 1 else _free_port())
        code, told_to_stop = _run_processes(options, num_nodes, node_rank, processes, master_addr, port)
        if code in NEVER_RETRIED or told_to_stop:
            break
        if attempt < auto_retry:
            logger.warning("the run ended with exit code %d: restart %d of %d", code, attempt + 1, auto_retry)
            if manifest_steps(Path(options.output_dir) / "ckpts"):
                options = replace(options, load_dir=None, ckpt="latest")
    return code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _run_processes(
    options: RunOptions, num_nodes: int, node_rank: int, processes: int, master_addr: str, master_port: int
) -> tuple[int, bool]:
    """One attempt: a fresh interpreter per rank; returns the exit code, and whether a signal asked to stop.

    The first rank to fail decides the exit code and ends the others.
    """
    context = multiprocessing.get_context("spawn")
    environments = [
        {
            "RANK": str(node_rank * processes + local),
            "WORLD_SIZE": str(num_nodes * processes),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": str(master_port),
        }
        for local in range(processes)
    ]
    asked = context.RawValue(ctypes.c_int, 0)  # to stop, by this signal: for ranks that do not hear signals yet
    children = [context.Process(target=_child, args=(options, env, os.getpid(), asked)) for env in environments]
    forwarded: list[int] = []

    def forward(number: int, frame: Any) -> None:
        forwarded.append(number)
        asked.value = number
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    # Ranks leave the terminal's process group and ignore Ctrl-C until they have, so that one Ctrl-C reaches them once,
    # through `forward`: a second one means to stop without saving.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for child in children:
            child.start()
        for number in previous:
            signal.signal(number, forward)
        return _wait(children), bool(forwarded)
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            if child.pid is not None:
                child.join()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[Any]) -> int:
    """Exit code of the first child that fails, 0 when none does; after a failure the others get `GRACE_S`."""
    failed: int | None = None
    deadline = float("inf")
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
        for number, child in enumerate(children):
            if failed is None and child.exitcode not in (None, 0):
                failed = child.exitcode
                logger.error("process %d of %d ended with exit code %d", number + 1, len(children), failed)
                deadline = time.monotonic() + GRACE_S
    codes = [child.exitcode for child in children if child.exitcode not in (None, 0)]
    code = failed if failed is not None else (codes[0] if codes else 0)
    # A rank that found the input wrong explains the failure of those that lost it; a signal is reported as shells do.
    code = EXIT_WRONG_INPUT if EXIT_WRONG_INPUT in codes else code
    return 128 - code if code < 0 else code


def _child(options: RunOptions, environment: dict[str, str], parent: int, asked: Any) -> None:
    """A rank in a process of its own, which is told to save and end when its supervisor dies.

    `asked.value`: the signal that asked to stop before this process could hear it, or 0.
    """
    os.environ.update(environment)
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # forwarded: the terminal's no longer reaches this group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        logger.debug("no prctl here: ranks outlive a killed supervisor")
    if os.getppid() != parent:
        raise SystemExit(143)
    if asked.value:
        raise SystemExit(128 + asked.value)
    configure_logging()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(environment["LOCAL_WORLD_SIZE"])))
    raise SystemExit(train_rank(options))
