"""The step loop: micro-batches, gradients summed over ranks, one optimizer step, and what happens now and then."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis.config import InputError, TrainerArgs, wrong_input
from trellis.trainers.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_misc,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
)
from trellis.trainers.ema import EMA
from trellis.trainers.grad_clip import build_grad_clipper
from trellis.trainers.launch import EXIT_FAILED
from trellis.trainers.launched_step import LaunchedStep
from trellis.trainers.loader import DeviceBatches, batch_size_per_rank, endless_batches
from trellis.trainers.logs import RunLog
from trellis.trainers.memory import WORKSPACE_BYTES, MemoryLimit, available_bytes, out_of_memory
from trellis.trainers.objective import Batch, Objective
from trellis.trainers.optim import build_optimizer, build_scheduler, load_optimizer, load_scheduler
from trellis.trainers.precision import Precision, mode_on_device
from trellis.trainers.random_state import random_state, seed_everything, set_random_state
from trellis.trainers.sampler import ResumableSampler
from trellis.trainers.stop import NUM_FLAGS, StopSignals, agreed_exit_code
from trellis.trainers.transfer import OnTheWay
from trellis.utils.dist_utils import Ranks, broadcast_from_first_, gather_objects, sum_over_ranks_

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = {True: 50, False: 10}
"""Steps in a row without a finite gradient before training gives up: with a loss scale, which has to find its level
first, and without one."""
LAST_STEPS_S = 3.0
"""How long a run that breaks off waits for the figures of steps that the device is at work on; with several ranks it
may be waiting for one that will not come."""


class Trainer:
    """Trains one model.

    Ranks hold equal weights because they start equal, sum one flat gradient and take the same step; no wrapper module
    is involved. A loss is a sum over shapes divided by the shapes of the whole step, so that neither `batch_split` nor
    the number of ranks changes more than rounding.

    The host does not wait for a step before it starts the next: whether a gradient is finite, how far it is clipped and
    what follows for weights, averages and codebook is decided on the device. The figures of a step are read while the
    device works on the next one, except where something is due that needs them.

    Args:
        model_name: name of the checkpoints' files.
        model: on `device`, its weights as training shall start.
        dataset: `len`, samples by (epoch, index), and `expected_blocks`, their sizes.
        metadata: plain values for the weights files.
    """

    def __init__(
        self,
        args: TrainerArgs,
        objective: Objective,
        model_name: str,
        model: nn.Module,
        dataset: Any,
        output_dir: Path,
        *,
        ranks: Ranks,
        device: torch.device,
        metadata: Mapping[str, Any],
    ) -> None:
        self.args, self.objective, self.dataset = args, objective, dataset
        self.model_name, self.model = model_name, model
        self.output_dir, self.ranks, self.device, self.metadata = output_dir, ranks, device, dict(metadata)
        per_rank = batch_size_per_rank(args, ranks.world_size)
        self.micro_batches = min(args.batch_split, per_rank)
        if args.batch_split > per_rank:
            logger.warning(
                "batch_split %d exceeds the %d shapes of a step on a rank: %d micro-batches of one shape",
                args.batch_split, per_rank, per_rank,
            )
        self.sampler = ResumableSampler(
            len(dataset), per_rank, seed=args.seed, rank=ranks.rank, world_size=ranks.world_size,
            sizes=dataset.expected_blocks(),
        )
        for tensor in model.state_dict().values():
            broadcast_from_first_(tensor)
        self.precision = Precision(
            model,
            mode_on_device(args.fp16_mode, device),
            scale_growth=args.fp16_scale_growth,
            apart=objective.holds_current_value,
        )
        model.use_flat_weights(self.precision.flat_weights)
        self.optimizer = build_optimizer(args.optimizer, self.precision.flat, ["apart"])
        self.scheduler = build_scheduler(args.lr_scheduler, self.optimizer)
        self.clipper = build_grad_clipper(args.grad_clip)
        self.ema = {rate: self._new_ema(rate) for rate in args.ema_rates} if ranks.is_first else {}
        self.step = 0
        self._saved_step: int | None = None
        self._skipped = 0
        self.reads_late = device.type == "cuda"
        by_epochs = math.inf
        if args.max_epoch is not None:
            by_epochs = math.ceil(args.max_epoch * len(dataset) / self.sampler.global_batch)
        self.total_steps = int(min(by_epochs, args.max_steps or math.inf))
        seed_everything(args.seed + 1_000_003 * (ranks.rank + 1))

    def _new_ema(self, rate: float) -> EMA:
        return EMA(rate, self.precision.flat["weights"])

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, *, max_steps: int | None = None, after_step: Callable[[int], None] | None = None) -> int:
        """Train to the end, until a signal, or until the log cannot be written; returns the exit code (0, 1, 130, 143).

        Args:
            max_steps: stop after this many steps without saving (profiling); None for the whole training.
            after_step: called with the number of each finished step.

        Raises:
            InputError: the data are not as they must be.
            CheckpointError, OutputError: a checkpoint could not be written; the run's log could not be opened.
        """
        last = self.total_steps if max_steps is None else min(self.total_steps, self.step + max_steps)
        log = RunLog(
            self.output_dir, step=self.step, total_steps=self.total_steps, samples_per_step=self.sampler.global_batch,
            boards=self.args.i_log is not None, enabled=self.ranks.is_first,
        )
        launched: deque[LaunchedStep] = deque()
        try:
            with StopSignals() as stop:
                try:
                    if self.step == 0:
                        with wrong_input("data"):
                            self.objective.prepare(self.model, self.dataset, self.sampler, self._workers())
                        self.ema = {rate: self._new_ema(rate) for rate in self.ema}
                    exit_code = self._loop(last, launched, log, stop, max_steps=max_steps, after_step=after_step)
                    if max_steps is None:
                        self.save()
                        if exit_code is None and self.args.i_sample and self.step % self.args.i_sample:
                            self._write_samples(log)
                finally:
                    self._log_what_has_come(launched, log)
        finally:
            log.close()
        return exit_code or (EXIT_FAILED if log.failed else 0)

    def _loop(
        self,
        last: int,
        launched: deque[LaunchedStep],
        log: RunLog,
        stop: StopSignals,
        *,
        max_steps: int | None,
        after_step: Callable[[int], None] | None,
    ) -> int | None:
        """Steps up to number `last`, or until there is a reason to stop; returns its exit code.

        Args:
            launched: takes the steps that the device may still be at work on; empty at the end.
        """
        self.model.train()
        limit = self.memory_limit()
        with wrong_input("data"):
            self.objective.check_sizes(self.dataset, limit)
        loaded = endless_batches(
            self.dataset, self.sampler, self.objective, self.micro_batches, self._workers(), self.device, limit
        )
        batches = DeviceBatches(loaded, self.device)
        exit_code = None
        log.restart_clock(self.step)
        self._finished_at = time.perf_counter()
        while self.step < last and exit_code is None:
            stop.log_failed = log.failed
            waited = batches.waited_s
            micro_batches, number = next(batches), self.step + 1
            try:
                launched.append(self._launch_step(micro_batches, stop))
                launched[-1].record["data_s"] = batches.waited_s - waited  # should what follows break the run off
                batches.prefetch()
            except torch.OutOfMemoryError as error:
                raise out_of_memory(number, micro_batches, self.device, str(error)) from error
            launched[-1].record["data_s"] = batches.waited_s - waited
            all_of_them = not self.reads_late or self.step == last or self._due_now()
            while len(launched) > (0 if all_of_them else 1):
                reason = self._finish_step(launched, log, give_up=exit_code is None)
                exit_code = exit_code or reason
            if log.failed and self.ranks.world_size == 1:  # several agree on it with the next step
                exit_code = exit_code or EXIT_FAILED
            if max_steps is None:
                self._every_so_many_steps(log)
            if after_step is not None:
                after_step(self.step)
        while launched:
            self._finish_step(launched, log, give_up=False)
        return exit_code

    def _launch_step(self, micro_batches: list[Batch], stop: StopSignals) -> LaunchedStep:
        """Hand a step's work to the device."""
        terms = self.objective.terms
        sums = self._passes_in_memory(micro_batches)
        sum_over_ranks_(self.precision.gradient)
        for place, flag in enumerate(stop.flags(), start=len(terms)):
            if flag:  # filled on the device: copying it there would wait for it
                sums[place].fill_(flag)
        sum_over_ranks_(sums)
        figures = dict(self.objective.statistics())
        if self.precision.scale is not None:
            figures["loss_scale"] = self.precision.scale.factor()
        norm = self.precision.unscale()
        own = torch.stack([value.double() for value in (*figures.values(), norm)])
        on_the_way = OnTheWay(torch.cat([sums.double(), own]))
        self._update(norm, micro_batches)
        record: dict[str, Any] = {"step": self.step + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        with warnings.catch_warnings():
            # The schedule counts steps, those skipped for an overflow too; torch takes that for a wrong order of calls.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.step += 1
        epoch, epoch_figures = self.sampler.epoch, dict
        self.sampler.advance()
        if self.sampler.epoch > epoch:
            record["epoch"], epoch_figures = self.sampler.epoch, self.objective.finish_epoch()
        shapes = [name for batch in micro_batches for name in batch["sha256"]]
        return LaunchedStep(record, list(figures), on_the_way, epoch_figures, shapes)

    def _finish_step(self, launched: deque[LaunchedStep], log: RunLog, *, give_up: bool) -> int | None:
        """Wait for the first of the steps and log it; returns the exit code where a rank has a reason to stop.

        Args:
            give_up: raise where too many steps in a row had no finite gradient, unless there is such a reason.
        """
        record, flags = self._read(launched[0])
        record |= launched[0].epoch_figures()
        self._finished_at = time.perf_counter()
        exit_code = agreed_exit_code(flags)
        finite = math.isfinite(record["grad_norm"])
        self._skipped = 0 if finite else self._skipped + 1
        if not finite and not self.precision.scales_loss:
            shapes = launched[0].shapes
            logger.warning("step %d: the gradient is not finite, no update; shapes %s", record["step"], shapes)
        launched.popleft()
        self._log_step(log, record)
        if give_up and exit_code is None and self._skipped >= MAX_SKIPPED_STEPS[self.precision.scales_loss]:
            raise FloatingPointError(
                f"step {record['step']}: no finite gradient in {self._skipped} steps in a row; lower the learning "
                "rate, clip gradients, or train in float32 (fp16_mode null)"
            )
        return exit_code

    def _read(self, launched: LaunchedStep) -> tuple[dict[str, Any], list[float]]:
        """The line of a step in the log, but for an epoch's figures, and the reasons to stop, summed over ranks."""
        record, flags = launched.read(self.objective.terms, self.sampler.global_batch)
        record["step_s"] = time.perf_counter() - self._finished_at
        return record, flags

    def _log_what_has_come(self, launched: deque[LaunchedStep], log: RunLog) -> None:
        """When a run breaks off: the lines of its last steps, unless the device does not come to their end soon."""
        deadline = time.monotonic() + LAST_STEPS_S
        try:
            while launched and log.enabled:
                while not launched[0].figures.arrived():
                    if time.monotonic() > deadline:
                        return
                    time.sleep(0.01)
                log.write(self._read(launched.popleft())[0])
        except RuntimeError as error:  # of the device
            logger.debug("the figures of the last steps were lost: %s", error)

    def _passes_in_memory(self, micro_batches: list[Batch]) -> Tensor:
        """`_passes`; where memory runs out, once more with what the model holds for speed alone given back."""
        try:
            return self._passes(micro_batches)
        except torch.OutOfMemoryError:
            if not self.objective.spare_bytes(self.model):
                raise
        # Outside of the handler, which keeps what the failed pass held. All micro-batches again: gradients and
        # statistics of the codebook hold some of the failed one, and cannot be told apart.
        self.precision.drop()
        self.objective.discard()
        self.objective.release_spare(self.model)
        return self._passes(micro_batches)

    def _passes(self, micro_batches: list[Batch]) -> Tensor:
        """Forward and backward; returns what ranks sum beside the gradient: losses, and zeros for reasons to stop."""
        terms = len(self.objective.terms)
        sums = torch.zeros(terms + NUM_FLAGS, device=self.device)
        for number, batch in enumerate(micro_batches):
            loss, logged = self.objective.losses(self.model, batch)
            self.precision.backward(loss / self.sampler.global_batch)
            del loss  # while its graph lives, gradients are tied to this stream and no pass can be recorded
            self.precision.collect(first=number == 0)
            sums[:terms] += logged
        return sums

    def _update(self, norm: Tensor, micro_batches: list[Batch]) -> None:
        """One optimizer step, or none where the gradient is not finite; all ranks have the same norm and agree."""
        counts = self.precision.step(self.optimizer, norm, self.clipper.limit())
        self.clipper.add(norm, counts)
        share = {"batches": micro_batches, "places": self.sampler.places, "num_places": self.sampler.global_batch}
        overwritten = self.objective.commit(self.step + 1, counts, **share)
        for name, rows in overwritten.items():
            self._forget_moments(name, rows)
        for ema in self.ema.values():
            ema.update(self.precision.flat["weights"], counts)

    def _forget_moments(self, name: str, rows: Tensor) -> None:
        """Rows of a mask, which were overwritten, start without the optimizer's memory of what was there."""
        if name not in self.precision.parameters:
            return
        flat = self.precision.flat[self.precision.group_of(name)]
        for value in self.optimizer.state.get(flat, {}).values():
            if isinstance(value, Tensor) and value.shape == flat.shape:
                self.precision.view(name, value).masked_fill_(rows[:, None], 0)

    def memory_limit(self) -> MemoryLimit:
        """What a micro-batch may take: `max_memory_gb`, or what is free on the device once all else is there."""
        cost = self.objective.cost(self.precision.mode)
        if self.args.max_memory_gb is not None:
            return MemoryLimit(cost, int(self.args.max_memory_gb * 1e9))
        still_to_come = WORKSPACE_BYTES + self.precision.bytes_of_a_step()
        if not self.optimizer.state:
            still_to_come += 2 * 4 * self.precision.gradient.numel()  # Adam's two moments
        return MemoryLimit(cost, available_bytes(self.device, still_to_come=still_to_come))

    def _workers(self) -> int:
        if self.args.num_workers is not None:
            return self.args.num_workers
        cores = len(os.sched_getaffinity(0)) // self.ranks.local_world_size
        return 0 if self.device.type == "cpu" else min(8, max(1, cores - 1))

    # -- every so many steps ------------------------------------------------------------------------------------------

    def _log_step(self, log: RunLog, record: dict[str, Any]) -> None:
        log.write(record)
        if is_due(record["step"], self.args.i_log):
            extra = self._weight_statistics() if self.args.log_param_stats and self.ranks.is_first else {}
            log.board(extra)
        if is_due(record["step"], self.args.i_print):
            log.progress(record)

    def _due_now(self) -> bool:
        """Whether something follows this step that needs it to be finished."""
        args = self.args
        return any(is_due(self.step, every) for every in (args.i_log, args.i_ddpcheck, args.i_save, args.i_sample))

    def _every_so_many_steps(self, log: RunLog) -> None:
        if not self._due_now():
            return
        if is_due(self.step, self.args.i_ddpcheck):
            self.check_ranks_agree()
        if is_due(self.step, self.args.i_save):
            self.save()
        if is_due(self.step, self.args.i_sample):
            self._write_samples(log)
        self._finished_at = time.perf_counter()  # what took time here is not the next step's

    def _weight_statistics(self) -> dict[str, float]:
        figures = {}
        for name, parameter in self.precision.parameters.items():
            figures[f"weight_rms/{name}"] = float(parameter.detach().square().mean().sqrt())
            figures[f"grad_rms/{name}"] = float(self.precision.gradients[name].square().mean().sqrt())
        return figures

    def _write_samples(self, log: RunLog) -> None:
        """Pictures on the first rank. They draw no random numbers from training, and a failed picture ends nothing."""
        if not self.ranks.is_first:
            return
        state = random_state()
        try:
            folder = self.output_dir / "samples" / f"step{self.step:07d}"
            png = self.objective.write_samples(self.model, self.dataset, folder)
            if png is not None:
                log.picture(png)
        except OSError as error:
            logger.error("the samples of step %d could not be written: %s; training goes on", self.step, error)
        except Exception:
            logger.exception("the samples of step %d could not be made; training goes on", self.step)
        finally:
            set_random_state(state)

    def check_ranks_agree(self) -> None:
        """RuntimeError unless all ranks hold the weights and the codebook of the first, bit for bit."""
        differing = []
        for name, tensor in self.precision.weights().items():
            reference = broadcast_from_first_(tensor.clone())
            if not torch.equal(reference, tensor):
                differing.append(name)
        everywhere = sorted({name for names in gather_objects(differing) for name in names})
        if everywhere:
            raise RuntimeError(f"step {self.step}: ranks differ in {', '.join(everywhere[:8])}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is there.

        Raises:
            CheckpointError: on every rank, when the first could not write.
        """
        if self._saved_step == self.step:
            return
        generators = gather_objects(random_state())
        error = None
        if self.ranks.is_first:
            misc = {
                "step": self.step,
                "parameters": list(self.precision.parameters),
                "kinds": self._kinds(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "sampler": self.sampler.state_dict(),
                "precision": self.precision.state_dict(),
                "grad_clip": self.clipper.state_dict(),
                "ema": [ema.state_dict() for ema in self.ema.values()],
                "objective": self.objective.state_dict(),
                "generators": generators,
            }
            folder = self.output_dir / "ckpts"
            weights = self.precision.weights()
            averages = {rate: self.precision.weights(ema.average) for rate, ema in self.ema.items()}
            try:
                save_checkpoint(folder, self.model_name, self.step, weights, averages, misc, self.metadata)
                logger.info("saved the checkpoint of step %d", self.step)
                if self.args.keep_last is not None:
                    prune_checkpoints(folder, self.args.keep_last, self.step)
            except CheckpointError as caught:
                error = str(caught)
        errors = [e for e in gather_objects(error) if e is not None]
        if errors:
            raise CheckpointError(errors[0])
        self._saved_step = self.step

    def _kinds(self) -> dict[str, str]:
        """Names of what cannot go on from the state of another kind."""
        schedule = self.args.lr_scheduler
        return {"optimizer": self.args.optimizer.name, "lr_scheduler": "none" if schedule is None else schedule.name}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on exactly where a checkpoint stopped, with the optimizer's settings that the config has now.

        Raises:
            InputError: the checkpoint is of another model or optimizer.
        """
        misc = load_misc(checkpoint)
        try:
            self.precision.load_weights(load_weights(checkpoint.model))
            if misc["parameters"] != list(self.precision.parameters):
                raise ValueError("it was trained with other parameters")
            for name, kind in self._kinds().items():
                before = misc.get("kinds", {}).get(name, kind)
                if before != kind:
                    raise ValueError(
                        f"it was trained with {name} {before}, and trainer.args.{name} is {kind}: to change that, "
                        "start another run from its weights (finetune_ckpt)"
                    )
            changes = load_optimizer(self.optimizer, misc["optimizer"])
            changes += load_scheduler(self.scheduler, misc["scheduler"])
            if changes:
                logger.warning("settings that change from this step on: %s", ", ".join(changes))
            self.precision.load_state_dict(misc["precision"])
            self.clipper.load_state_dict(misc["grad_clip"])
            self.sampler.load_state_dict(misc["sampler"])
            self.objective.load_state_dict(misc["objective"])
            updates = {state["rate"]: state["updates"] for state in misc["ema"]}
            for rate, ema in self.ema.items():
                if rate in updates:
                    self.precision.load_weights(load_weights(checkpoint.ema[str(rate)]), ema.average)
                    ema.updates.fill_(updates[rate])
                else:
                    logger.warning("ema_rate %s is new: its average starts from the weights of this step", rate)
                    self.ema[rate] = self._new_ema(rate)
        except (ValueError, KeyError) as error:
            raise InputError(f"{checkpoint.model.parent}, step {checkpoint.step}: {error}") from error
        if self.ranks.rank < len(misc["generators"]):
            set_random_state(misc["generators"][self.ranks.rank])
        else:
            logger.warning("the checkpoint has no random state of rank %d: it starts from the seed", self.ranks.rank)
        self.step = int(misc["step"])
        if checkpoint.model.parent.resolve() == (self.output_dir / "ckpts").resolve():
            self._saved_step = self.step


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps, or never (None), happens after this one."""
    return every is not None and step % every == 0
