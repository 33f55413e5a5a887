"""The loss of a shape against sums written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_cases import RESOLUTION

from trellis.datasets.sparse_sdf import SparseSDF
from trellis.trainers.vae.sparse_sdf_vqvae import collate_with_weights, reconstruction_rows, row_weights


def make_batch(sizes: list[int], seed: int = 0) -> tuple[dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = sum(sizes)
    sdf = (torch.rand(m, 512, generator=generator) * 3 - 1.5).clamp(-1, 1).half()
    counted = torch.rand(m, generator=generator) < 0.7
    counted[0] = counted[-1] = True
    batch = {
        "block_sdf": sdf, "active": sdf.abs() < 1, "loss_blocks": counted, "blocks_per_sample": torch.tensor(sizes),
    }
    return batch, torch.tanh(torch.randn(m, 512, generator=generator))


def of_shapes(predicted: torch.Tensor, batch: dict, **settings) -> list[torch.Tensor]:
    """Loss and errors of each shape: the rows of each, added up."""
    sizes = batch["blocks_per_sample"].tolist()
    weights = row_weights(batch["active"], batch["loss_blocks"], np.array(sizes), settings["lambda_extra"])
    rows = reconstruction_rows(predicted, batch | {"row_weights": weights}, **settings)
    return [torch.stack([part.sum() for part in column.split(sizes)]) for column in rows]


@pytest.mark.parametrize("loss_type", ["mse", "l1", "l1_l2"])
def test_against_float64(loss_type: str):
    sizes = [3, 1, 7]
    batch, predicted = make_batch(sizes)
    got = of_shapes(predicted, batch, loss_type=loss_type, lambda_extra=0.25)
    start = 0
    for i, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        keep = batch["loss_blocks"][rows].numpy()
        active = batch["active"][rows].numpy()[keep]
        e = (predicted[rows].double() - batch["block_sdf"][rows].double()).numpy()[keep]
        f = {"mse": e**2, "l1": np.abs(e), "l1_l2": np.abs(e) + e**2}[loss_type]
        weight = np.where(active, 1.0, 0.25)
        assert float(got[0][i]) == pytest.approx((weight * f).sum() / weight.sum(), rel=1e-6)
        assert float(got[1][i]) == pytest.approx((e[active] ** 2).mean(), rel=1e-6)
        assert float(got[2][i]) == pytest.approx((e[~active] ** 2).mean(), rel=1e-6)


def test_gradient_is_that_of_the_formula_and_stops_at_the_rim():
    batch, predicted = make_batch([4, 2])
    batch["loss_blocks"][1] = False
    predicted.requires_grad_()
    loss, _, _ = of_shapes(predicted, batch, loss_type="mse", lambda_extra=0.1)
    loss.sum().backward()
    weight = torch.where(batch["active"], 1.0, 0.1).double() * batch["loss_blocks"][:, None]
    total = torch.cat([w.sum().expand(len(w)) for w in weight.split([4, 2])])
    wanted = 2 * weight * (predicted.detach().double() - batch["block_sdf"].double()) / total[:, None]
    torch.testing.assert_close(predicted.grad.double(), wanted, rtol=1e-5, atol=1e-9)
    assert (predicted.grad[1] == 0).all() and (predicted.grad[0] != 0).any()


def test_a_shape_weighs_the_same_whatever_its_size():
    batch, predicted = make_batch([5, 1])
    joint = of_shapes(predicted, batch, loss_type="mse", lambda_extra=0.1)[0]
    for i, rows in enumerate((slice(0, 5), slice(5, 6))):
        alone = {key: value[rows] for key, value in batch.items() if key != "blocks_per_sample"}
        alone["blocks_per_sample"] = torch.tensor([rows.stop - rows.start])
        one = of_shapes(predicted[rows], alone, loss_type="mse", lambda_extra=0.1)[0]
        assert torch.equal(one[0], joint[i])


def test_a_shape_without_voxels_outside_the_band():
    batch, predicted = make_batch([2])
    batch["active"][:] = True
    batch["block_sdf"] *= 0.5
    loss, band, extra = of_shapes(predicted, batch, loss_type="mse", lambda_extra=0.1)
    assert torch.equal(loss, band) and float(extra) == 0


def test_means_over_blocks_and_a_shape_that_has_no_block_in_the_loss():
    batch, predicted = make_batch([2, 3, 4])
    batch["loss_blocks"][2:5] = False
    sizes = np.array([2, 3, 4])
    weights = row_weights(batch["active"], batch["loss_blocks"], sizes, 0.1)
    torch.testing.assert_close(weights[:, 3], torch.tensor([1 / 2] * 2 + [1 / 3] * 3 + [1 / 4] * 4))
    assert (weights[2:5, :3] == 0).all() and weights.isfinite().all()
    loss, band, extra = of_shapes(predicted, batch, loss_type="l1", lambda_extra=0.0)
    assert loss[1] == band[1] == extra[1] == 0 and (loss[[0, 2]] > 0).all()


def test_weights_come_with_the_batch(prepared):
    dataset = SparseSDF(prepared, resolution=RESOLUTION, max_points=3000)
    samples = [dataset[0, i] for i in range(3)]
    batch = collate_with_weights(samples, lambda_extra=0.2)
    assert batch["cropped"].any() and not batch["loss_blocks"].all()
    start = 0
    for sample in samples:
        loss = sample["loss_blocks"]
        inside = int(sample["active"][loss].sum())
        outside = sample["active"][loss].numel() - inside
        rows = batch["row_weights"][start : start + len(loss)]
        start += len(loss)
        wanted = torch.tensor([1 / (inside + 0.2 * outside), 1 / inside, 1 / outside, 1 / len(loss)])
        torch.testing.assert_close(rows[loss], wanted.expand(int(loss.sum()), 4), rtol=1e-6, atol=0)
    assert start == len(batch["row_weights"])
