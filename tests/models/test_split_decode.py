"""Decoding in parts: the same values as at once, every block once, and budgets that are kept or refused."""

from __future__ import annotations

import pytest
import torch

from trellis.models.autoencoders.split_decode import PartSizes, split_decode
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.modules.sparse.morton import packed_keys


def random_blocks(counts: tuple[int, ...], extent: int) -> torch.Tensor:
    """[M, 4] distinct blocks of each sample, by sample, then Morton."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for sample, count in enumerate(counts):
        cell = torch.randperm(extent**3, generator=generator)[:count]
        rows.append(
            torch.stack([torch.full_like(cell, sample), cell // extent**2, cell // extent % extent, cell % extent], 1)
        )
    coords = torch.cat(rows)
    return coords[torch.argsort(packed_keys(coords))].int()


def model_of(**changes) -> SparseSDFVQVAE:
    torch.manual_seed(0)
    arguments = {"model_channels": 64, "latent_channels": 4, "num_blocks": 2, "num_embeddings": 16, "window_size": 4}
    return SparseSDFVQVAE(**{**arguments, **changes}).eval().double()


def joined(model, latent, coords, sizes, **options) -> torch.Tensor:
    out = torch.full((len(coords), 512), float("nan"), dtype=torch.float64)
    seen = torch.zeros(len(coords), dtype=torch.long)
    for rows, values in split_decode(model.decoder, latent, coords, torch.float64, sizes, **options):
        out[rows] = values
        seen[rows] += 1
    assert (seen == 1).all()
    return out


@pytest.mark.parametrize("sizes", [(64, 125, 27), (64, 130, 40), (100, 150, 90), (1000, 1000, 1000)])
@pytest.mark.parametrize("fused", [True, False])
def test_parts_have_the_values_of_the_whole(sizes, fused):
    model, coords = model_of(fused=fused), random_blocks((130, 1, 60), extent=6)
    latent = torch.randn(len(coords), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model.decode_blocks(latent, coords)
    parts = joined(model, latent, coords, PartSizes(*sizes), fused=fused)
    # float64: a row missing from a halo would show at 1e-3
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_halos_are_no_wider_and_no_narrower_than_needed():
    """Which blocks one block's values depend on, by gradients, against the two rings that are derived."""
    model = model_of()
    side = torch.arange(9)
    coords = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), side, side, side).int()
    middle = int(((coords[:, 1:] == 4).all(1)).nonzero())
    from trellis.modules.sparse.levels import Topology

    topology, distance = Topology(coords), (coords[:, 1:] - 4).abs().amax(1)
    x = torch.randn(len(coords), 64, dtype=torch.float64, requires_grad=True)
    coarse = model.decoder.coarse(x, topology)
    state = coarse.detach().requires_grad_()
    for given, read, rings in (
        (x, coarse.view(len(coords), -1)[middle].square().sum(), 2),
        (state, model.decoder.fine(state, topology)[middle].square().sum(), 1),
    ):
        (grad,) = torch.autograd.grad(read, given)
        reached = distance[grad.view(len(coords), -1).any(1)]
        assert int(reached.max()) == rings


def test_parts_that_are_too_small_are_refused():
    model, coords = model_of(), random_blocks((400,), extent=8)
    latent = torch.zeros(len(coords), 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="whole attention window"):
        joined(model, latent, coords, PartSizes(8, 500, 500))
    with pytest.raises(ValueError, match="a block with its halo"):
        joined(model, latent, coords, PartSizes(500, 500, 3))


def test_no_block():
    model = model_of()
    assert joined(
        model, torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.int32), PartSizes(1, 1, 1)
    ).shape == (0, 512)
