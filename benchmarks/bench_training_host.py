"""What the host starts in a training step beside the network's forward and backward passes; runs on a CPU.

python benchmarks/bench_training_host.py DATA [--set KEY=VALUE ...] [--json FILE]

DATA is a prepared folder. The network has as many tensors as that of the shipped 512 config, but 64 channels and 64
codes. Prints, and writes to FILE, for one step of one micro-batch: PyTorch's operations (one on a list of tensors
counts once), how many of them the loss takes, and the tensors that are handed over in lists.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trellis.trainers import base
from trellis.trainers.build import RunOptions, build_trainer
from trellis.utils.dist_utils import Ranks

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vae" / "sparse_sdf_vqvae_512.json"
SMALL = (
    "models.vqvae.args.model_channels=64", "models.vqvae.args.num_embeddings=64",
    "trainer.args.codebook_init_samples=1", "trainer.args.batch_split=1", "trainer.args.num_workers=0",
    "trainer.args.optimizer.args.fused=true",  # the default on CUDA
)
WARM_UP = 8
"""Steps before the one that is counted: the loss scale is found in them, and the optimizer makes its moments."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for what happens inside of functions that are `left_out`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = True
        self.counts: Counter[str] = Counter()
        self.listed = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watching:
            self.counts[function.overloadpacket.__name__] += 1
            self.listed += sum(len(a) for a in args if isinstance(a, (list, tuple)) and a and torch.is_tensor(a[0]))
        return function(*args, **kwargs or {})

    def left_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.watching = False
            try:
                return function(*args)
            finally:
                self.watching = True

        return call


def count(trainer: base.Trainer) -> tuple[Operations, int]:
    """What the next step dispatches, and the operations of it that the loss takes.

    Steps that are skipped or end an epoch are passed over.
    """
    operations = Operations()
    step, losses = trainer._launch_step, trainer.objective.losses
    of_loss = 0

    def counted_step(*args: Any) -> Any:
        operations.counts.clear()
        operations.listed = 0
        with operations:
            return step(*args)

    def marked_losses(*args: Any) -> Any:
        nonlocal of_loss
        before = operations.counts.total()
        result = losses(*args)
        of_loss = operations.counts.total() - before
        return result

    trainer._launch_step = counted_step  # type: ignore[method-assign]
    trainer.objective.losses = marked_losses  # type: ignore[method-assign]
    trainer.model.forward = operations.left_out(trainer.model.forward)
    trainer.precision.backward = operations.left_out(trainer.precision.backward)  # type: ignore[method-assign]
    while True:
        epoch = trainer.sampler.epoch
        trainer.run(max_steps=1)
        if trainer._skipped == 0 and trainer.sampler.epoch == epoch:
            return operations, of_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base.mode_on_device = lambda mode, device: mode  # the half modes, too, which a CPU run would replace by float32
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(
            config=str(args.config), output_dir=folder, data_dir=args.data, device="cpu",
            overrides=(*SMALL, "trainer.args.max_steps=100000", *args.overrides),
        )
        trainer = build_trainer(options, Ranks(), torch.device("cpu"))
        trainer.run(max_steps=WARM_UP)
        operations, of_loss = count(trainer)
    result = {
        "fp16_mode": trainer.precision.mode, "trained_tensors": len(trainer.precision.parameters),
        "operations": operations.counts.total(), "operations_of_loss": of_loss,
        "tensors_in_lists": operations.listed, "by_name": dict(operations.counts.most_common()),
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
