"""Quantizers: nearest code, gradients, moving averages, re-seeding, ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from trellis.modules import quantizers
from trellis.modules.quantizers import JointRows, VectorQuantizer, gather_rows, kmeans, nearest_code, rotate


def test_nearest_code_in_chunks_equals_all_distances(monkeypatch):
    monkeypatch.setattr(quantizers, "SCORE_BYTES", 4 * 37 * 5)
    rows, codes = torch.randn(101, 6), torch.randn(37, 6)
    assert torch.equal(nearest_code(rows, codes), torch.cdist(rows.double(), codes.double()).argmin(1))
    assert nearest_code(rows[:0], codes).shape == (0,)


def test_straight_through_hands_the_gradient_on_unchanged():
    quantizer = VectorQuantizer(8, 3)
    rows = torch.randn(5, 3, requires_grad=True)
    out = quantizer(rows)
    torch.testing.assert_close(out.values, quantizer.codebook[out.ids])
    weights = torch.randn(5, 3)
    (out.values * weights).sum().backward()
    torch.testing.assert_close(rows.grad, weights)
    assert quantizer.codebook.grad is None


def test_rotation_gradient_is_the_jacobian_of_the_rotation():
    """The output is R row, so grad = R^T w; R is orthogonal up to |code| / |row| and takes the row to the code."""
    rows = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(4, 6, dtype=torch.float64)
    out = rotate(rows, codes)
    torch.testing.assert_close(out, codes)
    jacobian = torch.stack(
        [torch.autograd.grad(out[:, i].sum(), rows, retain_graph=True)[0] for i in range(6)], 1
    )
    scale = (codes.norm(dim=1) / rows.norm(dim=1)).detach() ** 2
    gram = jacobian @ jacobian.transpose(1, 2)
    torch.testing.assert_close(gram, torch.eye(6, dtype=torch.float64) * scale[:, None, None])
    torch.testing.assert_close((jacobian @ rows[..., None])[..., 0], codes)
    assert (torch.linalg.det(jacobian) > 0).all()


def test_row_losses_and_who_gets_their_gradient():
    quantizer = VectorQuantizer(8, 3)
    rows = torch.randn(5, 3, requires_grad=True)
    out = quantizer(rows)
    expected = (quantizer.codebook[out.ids] - rows).square().mean(1)
    torch.testing.assert_close(out.codebook_rows, expected)
    torch.testing.assert_close(out.commitment_rows, expected)
    out.codebook_rows.sum().backward(retain_graph=True)
    assert rows.grad is None and quantizer.codebook.grad is not None
    quantizer.codebook.grad = None
    out.commitment_rows.sum().backward()
    assert rows.grad is not None and quantizer.codebook.grad is None


def test_moving_average_follows_its_formula_over_micro_batches():
    quantizer = VectorQuantizer(4, 2, use_ema_update=True, ema_decay=0.9, reseed_after=0)
    start = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    quantizer.initialize(start.repeat(3, 1))
    before = quantizer.codebook.clone()
    quantizer.ema_sum.copy_(before)
    rows = before[[0, 0, 2]] + torch.tensor([[1.0, 0], [0, 1], [-1, -1]])
    first = quantizer(rows[:1]).ids, quantizer(rows[1:])
    assert torch.equal(quantizer.codebook, before)  # nothing moves before the commit
    assert first[1].codebook_rows is None
    report = quantizer.commit(1)
    assert report.counts.tolist() == [2 if i == 0 else 1 if i == 2 else 0 for i in range(4)]
    count = torch.tensor([0.9 + 0.2, 0.9, 0.9 + 0.1, 0.9])
    total = 0.9 * before
    total[0] += 0.1 * rows[:2].sum(0)
    total[2] += 0.1 * rows[2]
    torch.testing.assert_close(quantizer.codebook, total / count[:, None])


def test_a_code_whose_average_has_faded_stays_and_comes_back():
    """0.5^20 is below the least count: from there on an unused code keeps its place, until a row falls on it again."""
    quantizer = VectorQuantizer(3, 2, use_ema_update=True, ema_decay=0.5, reseed_after=0)
    before = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    quantizer.codebook.copy_(before)
    quantizer.ema_sum.copy_(before)
    for step in range(200):
        quantizer(before[:1] + torch.tensor([[1.0, 1.0]]))
        quantizer.commit(step)
    assert (quantizer.ema_count[1:] < 1e-6).all()
    torch.testing.assert_close(quantizer.codebook[1:], before[1:])
    torch.testing.assert_close(quantizer.codebook[0], torch.ones(2))
    quantizer(torch.tensor([[9.0, 0]]))
    quantizer.commit(200)
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([9.0, 0]))


def test_codes_above_the_least_count_are_the_plain_quotient():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 3, use_ema_update=True, ema_decay=0.7, reseed_after=0)
    for step in range(9):
        quantizer(torch.randn(20, 3))
        quantizer.commit(step)
        assert (quantizer.ema_count >= 1e-6).all()
        assert torch.equal(quantizer.codebook, quantizer.ema_sum / quantizer.ema_count.clamp_min(1e-6)[:, None])


@pytest.mark.parametrize("absent", [("ema_count", "ema_sum"), ("ema_count",), ("ema_sum",)])
def test_a_codebook_without_its_averages_starts_them_from_it(absent):
    """A commit then moves a code by its rows' share, as after k-means, and a code without rows not at all."""
    torch.manual_seed(0)
    source, loaded = (VectorQuantizer(6, 3, use_ema_update=True, ema_decay=0.9, reseed_after=0) for _ in range(2))
    source.initialize(torch.randn(99, 3))
    source(torch.randn(40, 3))
    source.commit(1)
    loaded.unused_steps += 7
    state = {name: value for name, value in source.state_dict().items() if name not in (*absent, "unused_steps")}
    missing = loaded.load_state_dict(state, strict=False).missing_keys
    assert sorted(missing) == sorted([*absent, "unused_steps"])
    assert torch.equal(loaded.codebook, source.codebook) and loaded.initialized and not loaded.unused_steps.any()
    rows = torch.randn(40, 3)
    rows = rows[loaded.quantize(rows).ids > 1]
    ids = loaded(rows).ids
    counts = loaded.commit(2).counts
    assert counts.tolist()[:2] == [0, 0] and (counts[2:] > 0).all()
    sums = torch.zeros(6, 3).index_add_(0, ids, rows)
    torch.testing.assert_close(loaded.codebook, (0.9 * source.codebook + 0.1 * sums) / (0.9 + 0.1 * counts)[:, None])


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_a_whole_state_loads_as_it_is(use_ema_update):
    source, loaded = (VectorQuantizer(6, 3, use_ema_update=use_ema_update, reseed_after=9) for _ in range(2))
    source(torch.randn(40, 3))
    source.commit(1)
    source.unused_steps += 2
    loaded.load_state_dict(source.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in source.state_dict().items())
    assert not loaded.initialized
    with pytest.raises(RuntimeError, match="unused_steps"):
        loaded.load_state_dict({k: v for k, v in source.state_dict().items() if k != "unused_steps"})


def test_discard_forgets_the_step():
    quantizer = VectorQuantizer(4, 2, use_ema_update=True)
    before = quantizer.codebook.clone()
    quantizer(torch.randn(9, 2))
    quantizer.discard()
    assert torch.equal(quantizer.codebook, before)
    with pytest.raises(RuntimeError, match="commit needs a forward pass"):
        quantizer.commit(1)


def test_evaluation_collects_nothing():
    quantizer = VectorQuantizer(4, 2).eval()
    quantizer(torch.randn(9, 2))
    with pytest.raises(RuntimeError):
        quantizer.commit(1)


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_unused_codes_move_to_data_with_their_averages(use_ema_update):
    quantizer = VectorQuantizer(6, 2, use_ema_update=use_ema_update, reseed_after=3)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.full((6, 2), 100.0))
        quantizer.codebook[0] = 0
    if use_ema_update:
        quantizer.ema_sum.copy_(quantizer.codebook)
    rows = torch.randn(50, 2)
    for step in range(1, 3):
        quantizer(rows)
        assert quantizer.commit(step).reseeded.sum() == 0
    quantizer(rows)
    moved = quantizer.commit(3).reseeded
    assert moved.tolist() == [False] + 5 * [True]
    assert all((code == rows).all(1).any() for code in quantizer.codebook[moved])
    assert quantizer.unused_steps.max() == 0
    if use_ema_update:
        averages = quantizer.ema_sum[moved] / quantizer.ema_count[moved, None]
        torch.testing.assert_close(averages, quantizer.codebook[moved])
    quantizer(rows)
    assert (quantizer.commit(4).counts > 0).sum() > 3


POOL = 11
SHAPES = [torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (3, 4, 2, 5)]


def _codes_of(places: list[int] | None, rows: torch.Tensor, num_codes: int) -> torch.Tensor:
    """The codes that unused ones move to, with rows of shapes at these places among four, or rank after rank."""
    quantizer = VectorQuantizer(num_codes, 2, reseed_after=1).to(rows.device)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.full((num_codes, 2), 100.0))
    quantizer(rows)
    joint = None
    if places is not None:
        joint = JointRows(torch.tensor(places), torch.tensor([len(SHAPES[i]) for i in places]), len(SHAPES))
    with waits_forbidden(rows.device):
        moved = quantizer.commit(1, joint=joint).reseeded
    assert not moved[0] and moved.sum() == min(num_codes - 1, POOL)
    return quantizer.codebook.detach()[moved].cpu()


@contextmanager
def waits_forbidden(device: torch.device) -> Iterator[None]:
    """Context in which a call that waits for a GPU raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def _reseeding_rank(rank: int, folder: str, backend: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    quantizers.MAX_POOL_ROWS = POOL
    mine, after = ([0, 3], [1, 2])[rank], ([0, 1], [2, 3])[rank]
    dist.all_reduce(torch.zeros(1, device=device))  # the first one makes the connection, and may wait
    books = [
        _codes_of(places, torch.cat([SHAPES[i] for i in shapes]).to(device), num_codes)
        for num_codes in (6, 20)
        for places, shapes in ((mine, mine), (None, after))
    ]
    torch.save(books, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def assert_ranks_draw_as_one(tmp_path, monkeypatch, backend: str) -> None:
    """Shapes 0 and 3 on one rank, 1 and 2 on the other, or 0, 1 and 2, 3 rank after rank: what one rank would draw.

    More rows than are drawn from, and fewer and more codes than these.
    """
    monkeypatch.setattr(quantizers, "MAX_POOL_ROWS", POOL)
    mp.spawn(_reseeding_rank, (str(tmp_path), backend), nprocs=2)
    books = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for i, num_codes in enumerate((6, 20)):
        alone = _codes_of([0, 1, 2, 3], torch.cat(SHAPES), num_codes)
        assert torch.equal(alone, _codes_of(None, torch.cat(SHAPES), num_codes))
        for of_rank in books:
            assert torch.equal(of_rank[2 * i], alone) and torch.equal(of_rank[2 * i + 1], alone)
        pool = torch.cat(SHAPES)[:POOL]
        assert ((alone[:, None] == pool).all(2).sum(1) == 1).all() and len(alone.unique(dim=0)) == len(alone)


def test_the_rows_that_codes_move_to_do_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    assert_ranks_draw_as_one(tmp_path, monkeypatch, "gloo")


@pytest.mark.gpu
@pytest.mark.timeout(150)
def test_two_gpus_draw_the_rows_of_one_without_a_wait(tmp_path, monkeypatch):
    if torch.cuda.device_count() < 2:
        pytest.fail(f"this test needs two GPUs, there are {torch.cuda.device_count()} (-k 'not two_gpus' skips it)")
    assert_ranks_draw_as_one(tmp_path, monkeypatch, "nccl")


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_a_skipped_step_leaves_no_trace_and_codes_move_only_when_told(use_ema_update):
    quantizer = VectorQuantizer(6, 2, use_ema_update=use_ema_update, reseed_after=2)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.full((6, 2), 100.0))
        quantizer.codebook[0] = 0
    if use_ema_update:
        quantizer.ema_sum.copy_(quantizer.codebook)
    rows = torch.randn(3, 2)
    for step in (1, 2):
        quantizer(rows)
        assert quantizer.commit(step, reseed=False).reseeded.sum() == 0
    assert quantizer.unused_steps.tolist() == [0, 2, 2, 2, 2, 2]  # at their limit, and waiting for leave
    before = {name: t.clone() for name, t in quantizer.state_dict().items()}
    quantizer(rows)
    report = quantizer.commit(3, counts_if=torch.tensor(False))
    assert report.reseeded.sum() == 0 and report.counts.sum() == 0
    assert all(torch.equal(t, before[name]) for name, t in quantizer.state_dict().items())
    quantizer(rows)
    report = quantizer.commit(4, counts_if=torch.tensor(True))
    assert report.reseeded.tolist() == [False, True, True, True, False, False]  # three rows, each for one code
    assert sorted(quantizer.codebook[1:4].tolist()) == sorted(rows.tolist())
    assert quantizer.unused_steps.tolist() == [0, 0, 0, 0, 3, 3] and report.counts.sum() == 3


def test_kmeans_finds_separated_clusters_and_uses_every_code():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [50, 0], [0, 50], [50, 50]])
    rows = centres.repeat_interleave(30, 0) + 0.1 * torch.randn(120, 2)
    found = kmeans(rows, 4, seed=0)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2
    assert len(torch.unique(nearest_code(rows, kmeans(rows, 40, seed=1)))) == 40
    assert kmeans(rows[:3], 10, seed=0).shape == (10, 2)
    assert torch.equal(kmeans(rows, 7, seed=3), kmeans(rows, 7, seed=3))
    with pytest.raises(ValueError, match="at least one row"):
        kmeans(rows[:0], 4, seed=0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="gradient must be one of"):
        VectorQuantizer(4, 2, gradient="gumbel")
    with pytest.raises(ValueError, match="num_embeddings"):
        VectorQuantizer(1, 2)
    with pytest.raises(ValueError, match="reseed_after must be at least 0"):
        VectorQuantizer(4, 2, reseed_after=-1)
    with pytest.raises(ValueError, match=r"rows must be \[N, 2\]"):
        VectorQuantizer(4, 2)(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 4\)"):
        VectorQuantizer(4, 2).lookup(torch.tensor([0, 4]))


def _rank(rank: int, folder: str, use_ema_update: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # ranks start apart on purpose
    quantizer = VectorQuantizer(16, 3, use_ema_update=use_ema_update, reseed_after=2, ema_decay=0.5)
    generator = torch.Generator().manual_seed(10 + rank)
    quantizer.initialize(torch.randn(20 + 5 * rank, 3, generator=generator))
    reports = []
    for step in range(1, 6):
        quantizer(torch.randn(4 + rank, 3, generator=generator))
        reports.append(quantizer.commit(step))
    gathered = gather_rows(torch.full((rank + 1, 2), float(rank)))
    torch.save(
        {
            "codebook": quantizer.codebook.detach(),
            "counts": torch.stack([r.counts for r in reports]),
            "reseeded": [r.reseeded for r in reports],
            "gathered": gathered,
        },
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_two_ranks_hold_bit_identical_codebooks(tmp_path, use_ema_update):
    mp.spawn(_rank, (str(tmp_path), use_ema_update), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(a["codebook"], b["codebook"])
    assert torch.equal(a["counts"], b["counts"]) and (a["counts"].sum(1) == 9).all()
    assert all(torch.equal(x, y) for x, y in zip(a["reseeded"], b["reseeded"]))
    assert sum(x.sum() for x in a["reseeded"]) > 0
    assert a["gathered"][:, 0].tolist() == [0, 1, 1]
