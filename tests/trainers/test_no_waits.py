"""What surrounds the passes of a training step asks the device for nothing: tensors without numbers go through it."""

from __future__ import annotations

import pytest
import torch

from trellis.modules.quantizers import JointRows, VectorQuantizer
from trellis.trainers.ema import EMA
from trellis.trainers.grad_clip import AdaptiveGradClipper
from trellis.trainers.loss_scale import LossScale
from trellis.trainers.vae.codebook_usage import PERIOD_STEPS, CodebookUsage
from trellis.trainers.vae.sparse_sdf_vqvae import reconstruction_rows

META = torch.device("meta")
COUNTS = torch.ones((), dtype=torch.bool, device=META)


def test_tensors_without_numbers_cannot_be_asked():
    for ask in (bool, torch.Tensor.item, torch.nonzero, lambda t: t[t]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask(COUNTS)


@pytest.mark.parametrize("use_ema_update", [False, True])
@pytest.mark.parametrize("reseed_after", [0, 5])
def test_the_codebook_takes_in_a_step(use_ema_update: bool, reseed_after: int):
    quantizer = VectorQuantizer(64, 8, use_ema_update=use_ema_update, reseed_after=reseed_after).to(META)
    usage = CodebookUsage(64, META, reseed_after=reseed_after)
    for rows in (60, 40):
        quantizer.collect(torch.empty(rows, 8, device=META), torch.empty(rows, dtype=torch.int64, device=META))
    counts = quantizer.reduce()
    joint = JointRows(torch.tensor([0, 2]), torch.tensor([60, 40]), 4)
    report = quantizer.commit(3, joint=joint, counts_if=COUNTS)
    assert counts.device == report.counts.device == report.reseeded.device == META
    for _ in range(PERIOD_STEPS):  # an ended period is read with the step that follows
        usage.add(report.counts)
    usage.finish_epoch()


def test_the_loss_and_its_gradient():
    predicted = torch.empty(50, 512, device=META, requires_grad=True)
    batch = {
        "block_sdf": torch.empty(50, 512, dtype=torch.float16, device=META),
        "active": torch.empty(50, 512, dtype=torch.bool, device=META),
        "row_weights": torch.empty(50, 4, device=META),
    }
    for loss_type in ("mse", "l1", "l1_l2"):
        reconstruction_rows(predicted, batch, loss_type=loss_type, lambda_extra=0.1)[0].sum().backward()
    assert predicted.grad.device == META


def test_clipping_scaling_and_averaging():
    norm, clipper = torch.empty((), device=META), AdaptiveGradClipper(1.0, buffer_size=3)
    for _ in range(4):
        assert (clipper.limit() / norm).device == META
        clipper.add(norm, COUNTS)
    scale = LossScale(16.0, growth=1.0, interval=3, device=META)
    scale.update(COUNTS)
    ema = EMA(0.9, torch.empty(10, device=META))
    ema.update(torch.empty(10, device=META), COUNTS)
    assert {t.device for t in (clipper.limit(), scale.factor(), ema.average, ema.updates)} == {META}
