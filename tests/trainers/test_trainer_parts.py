"""The trainer's small parts against closed forms: averages, clipping, order of shapes, schedules, loss scaling."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from trellis.config import InputError, Named
from trellis.trainers.ema import EMA
from trellis.trainers.grad_clip import AdaptiveGradClipper, build_grad_clipper
from trellis.trainers.loader import read_batches, split_and_collate
from trellis.trainers.loss_scale import LossScale
from trellis.trainers.optim import build_optimizer, build_scheduler, load_optimizer, skips_on_device
from trellis.trainers.precision import ALIGNMENT, INITIAL_LOG_SCALE, Precision, mode_on_device
from trellis.trainers.random_state import random_state, set_random_state
from trellis.trainers.sampler import ResumableSampler, share_out
from trellis.trainers.vae.codebook_usage import CodebookUsage, perplexity
from trellis.utils.io_utils import UnreadableFile

YES, NO = torch.tensor(True), torch.tensor(False)

# -- averages ---------------------------------------------------------------------------------------------------------


def test_ema_follows_its_warm_up_formula():
    weights = torch.tensor([1.0, -2.0])
    ema = EMA(0.9, weights)
    expected = weights.double()
    for n in range(100):
        new = torch.tensor([float(n), n * 0.5])
        rate = min(0.9, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * new.double()
        ema.update(new, YES)
        ema.update(new + 100, NO)  # of a step that was skipped
    torch.testing.assert_close(ema.average.double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.updates == 100 and ema.state_dict() == {"rate": 0.9, "updates": 100} and weights.tolist() == [1, -2]


def test_averages_go_by_the_names_of_the_model_and_the_codebook_is_the_current_one():
    precision = Precision(Halves(), "inflat_all", apart=lambda name: name == "codebook")
    ema = EMA(0.5, precision.flat["weights"])
    before = {name: t.clone() for name, t in precision.weights().items()}
    with torch.no_grad():
        for flat in precision.flat.values():
            flat += 1
    named = precision.weights(ema.average)
    assert list(named) == list(before) and {t.dtype for t in named.values()} == {torch.float32}
    assert all(torch.equal(named[name], before[name]) for name in ("trunk.weight", "trunk.bias"))
    assert torch.equal(named["codebook"], before["codebook"] + 1)
    saved = {name: t.clone() + 5 for name, t in named.items()}
    precision.load_weights(saved, ema.average)
    named = precision.weights(ema.average)
    assert all(torch.equal(named[name], saved[name]) for name in ("trunk.weight", "trunk.bias"))
    assert all(torch.equal(t, before[name] + 1) for name, t in precision.weights().items())
    with pytest.raises(ValueError, match="missing trunk.bias"):
        precision.load_weights({"trunk.weight": saved["trunk.weight"], "codebook": saved["codebook"]}, ema.average)


# -- clipping ---------------------------------------------------------------------------------------------------------


def test_adaptive_clipper_uses_the_percentile_of_past_norms_once_the_buffer_is_full():
    clipper = AdaptiveGradClipper(max_norm=50.0, clip_percentile=75, buffer_size=4)
    norms = [1.0, 100.0, 3.0, 2.0]

    def limit_then_add(clipper, norm):
        limit = float(clipper.limit())
        clipper.add(torch.tensor(norm), YES)
        clipper.add(torch.tensor(math.nan), NO)
        return limit

    assert [limit_then_add(clipper, norm) for norm in norms] == [50.0] * 4
    assert limit_then_add(clipper, 9.0) == pytest.approx(np.percentile(norms, 75))
    again = AdaptiveGradClipper(max_norm=50.0, clip_percentile=75, buffer_size=4)
    again.load_state_dict(clipper.state_dict())
    assert float(again.limit()) == limit_then_add(clipper, 1.0) == pytest.approx(np.percentile([100, 3, 2, 9], 75))
    assert float(clipper.limit()) == pytest.approx(np.percentile([3, 2, 9, 1], 75))
    assert clipper.state_dict() == {"norms": [3, 2, 9, 1]}
    again.load_state_dict({"norms": [5.0, 6.0]})
    assert float(again.limit()) == 50 and again.state_dict() == {"norms": [5, 6]}
    no_maximum = AdaptiveGradClipper(buffer_size=2)
    assert float(no_maximum.limit()) == math.inf


def test_clipper_is_built_from_every_spelling():
    assert build_grad_clipper(None).limit() == math.inf
    assert build_grad_clipper(2.0).limit() == 2.0
    assert build_grad_clipper(Named("AdaptiveGradClipper", {"max_norm": 1.0})).limit() == 1.0
    for spec, message in [
        (Named("Clip", {}), "must be AdaptiveGradClipper"),
        (Named("AdaptiveGradClipper", {"max": 1}), "unknown key.*max_norm"),
        (Named("AdaptiveGradClipper", {"clip_percentile": 0}), r"in \(0, 100\], got 0"),
    ]:
        with pytest.raises(InputError, match=message):
            build_grad_clipper(spec)


# -- order of shapes --------------------------------------------------------------------------------------------------


def first_batches(sampler: ResumableSampler, count: int) -> list[list[tuple[int, int]]]:
    batches = iter(sampler)
    return [next(batches) for _ in range(count)]


def test_every_epoch_is_a_permutation_and_epochs_differ():
    sampler = ResumableSampler(7, 3, seed=1)
    items = [item for batch in first_batches(sampler, 7) for item in batch]
    for epoch in range(3):
        part = items[7 * epoch : 7 * epoch + 7]
        assert [e for e, _ in part] == [epoch] * 7 and sorted(i for _, i in part) == list(range(7))
    orders = [[i for _, i in items[7 * e : 7 * e + 7]] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert first_batches(ResumableSampler(7, 3, seed=2), 2) != first_batches(sampler, 2)


def test_ranks_share_the_stream_of_one_rank():
    joint = first_batches(ResumableSampler(5, 4, seed=3), 6)
    parts = [first_batches(ResumableSampler(5, 2, seed=3, rank=r, world_size=2), 6) for r in (0, 1)]
    assert joint == [a + b for a, b in zip(*parts)]


def test_sizes_share_a_step_out_without_changing_it():
    sizes = [5, 40, 7, 30, 11, 2, 60]
    joint = first_batches(ResumableSampler(7, 4, seed=3), 9)
    samplers = [ResumableSampler(7, 2, seed=3, rank=r, world_size=2, sizes=sizes) for r in (0, 1)]
    parts = [first_batches(sampler, 9) for sampler in samplers]
    for step, (whole, *own) in enumerate(zip(joint, *parts)):
        places = [sampler.places() for sampler in samplers]
        assert sorted(places[0] + places[1]) == [0, 1, 2, 3] and all(p == sorted(p) for p in places), step
        assert [[whole[place] for place in p] for p in places] == own
        four = sorted(sizes[i] for _, i in whole)
        totals = sorted(sum(sizes[i] for _, i in part) for part in own)
        assert totals == sorted([four[3] + four[0], four[1] + four[2]])  # the best that pairs can do
        for sampler in samplers:
            sampler.advance()
    assert any(own[0] != whole[:2] for whole, *own in zip(joint, *parts))
    with pytest.raises(ValueError, match="each of the 7 shapes, got 3"):
        ResumableSampler(7, 2, seed=3, sizes=[1, 2, 3])


def test_sharing_out_is_even_in_number_and_near_even_in_size():
    rng = np.random.default_rng(0)
    for ranks, each in ((2, 1), (2, 8), (8, 2), (3, 5)):
        for _ in range(50):
            sizes = rng.integers(1, 1000, ranks * each).tolist()
            parts = share_out(sizes, ranks)
            assert sorted(i for part in parts for i in part) == list(range(ranks * each))
            assert {len(part) for part in parts} == {each}
            totals = [sum(sizes[i] for i in part) for part in parts]
            assert max(totals) - min(totals) <= max(sizes)
    assert share_out([4, 4, 4, 4], 2) == share_out([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]


def scaling(sizes: np.ndarray, ranks: int, each: int, *, shared_out: bool) -> float:
    """Throughput of `ranks` over that of one where a step takes as long as the blocks of its slowest rank."""
    rng = np.random.default_rng(1)
    total = slowest = 0
    for _ in range(2000):
        step = rng.choice(sizes, ranks * each).tolist()
        slices = [list(range(r * each, (r + 1) * each)) for r in range(ranks)]
        sums = [sum(step[i] for i in part) for part in (share_out(step, ranks) if shared_out else slices)]
        total, slowest = total + sum(sums), slowest + max(sums)
    return total / slowest


def test_two_ranks_with_shapes_of_whole_regions_scale_by_their_sizes():
    """4,506 to 12,669 blocks, two shapes a rank: sharing out leaves room below 1.85 for the sum over ranks."""
    sizes = np.arange(4506, 12670)
    assert scaling(sizes, 2, 2, shared_out=False) < 1.82
    assert scaling(sizes, 2, 2, shared_out=True) > 1.90


def test_resuming_ignores_what_was_only_fetched():
    sampler = ResumableSampler(5, 2, seed=4)
    ahead = first_batches(sampler, 9)  # fetched ahead by a loader
    for _ in range(4):
        sampler.advance()
    again = ResumableSampler(5, 2, seed=4)
    again.load_state_dict(sampler.state_dict())
    assert first_batches(again, 5) == ahead[4:]
    assert again.epoch == 1


def test_another_number_of_shapes_starts_an_epoch(caplog: pytest.LogCaptureFixture):
    sampler = ResumableSampler(5, 2, seed=4)
    for _ in range(4):
        sampler.advance()
    again = ResumableSampler(6, 2, seed=4)
    again.load_state_dict(sampler.state_dict())
    assert (again.epoch, again.position) == (2, 12) and "there were 5 shapes and are 6" in caplog.text


def test_micro_batches_are_balanced_and_in_order():
    parts = split_and_collate(list(range(7)), parts=3, collate=list)
    assert [x for part in parts for x in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


class Shapes(torch.utils.data.Dataset):
    def __getitem__(self, key: int) -> int:
        if key == 5:
            raise UnreadableFile("shape5.npz: not a zip file", "shape5.npz: BadZipFile")
        return key


def none_above_3(samples: list[int]) -> list[int]:
    if max(samples) > 3:
        raise ValueError(f"shape {max(samples)} is too large")
    return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_a_shape_is_said_in_its_own_words(workers):
    """Also by a loader process, where PyTorch would make a traceback of it, and a RuntimeError of the first."""
    assert list(read_batches(Shapes(), [[0, 3], [2], [1]], list, workers)) == [[0, 3], [2], [1]]
    read = read_batches(Shapes(), [[0], [1, 5]], list, workers)
    assert next(read) == [0]
    with pytest.raises(ValueError) as caught:
        next(read)
    assert str(caught.value) == "shape5.npz: not a zip file"
    with pytest.raises(ValueError) as caught:
        list(read_batches(Shapes(), [[0], [1, 4]], none_above_3, workers))
    assert str(caught.value) == "shape 4 is too large"


# -- optimizers and schedules -----------------------------------------------------------------------------------------


def test_codebook_has_no_weight_decay():
    parameters = {"a": nn.Parameter(torch.ones(3)), "quantizer.codebook": nn.Parameter(torch.ones(3))}
    optimizer = build_optimizer(
        Named("AdamW", {"lr": 0.1, "weight_decay": 0.5, "betas": [0.8, 0.9]}), parameters, ["quantizer.codebook"]
    )
    for p in parameters.values():
        p.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert parameters["a"].max() < 0.96 and parameters["quantizer.codebook"].min() == 1


def test_a_saved_optimizer_is_updated_as_this_device_does():
    """A state saved with another way of computing the update goes on with this one's, to the same weights."""
    weights = {}
    for fused in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 7))
        saved = build_optimizer(Named("AdamW", {"lr": 0.1}), {"a": parameter}, [])
        parameter.grad = torch.linspace(2, -3, 7)
        saved.step()
        optimizer = build_optimizer(Named("AdamW", {"lr": 0.1, "fused": fused}), {"a": parameter}, [])
        load_optimizer(optimizer, saved.state_dict())
        assert optimizer.param_groups[0]["fused"] is fused
        optimizer.step()
        weights[fused] = parameter.detach().clone()
    torch.testing.assert_close(weights[True], weights[False])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Named("Adam2"), "name: must be one of .*AdamW.*got 'Adam2'"),
        (Named("AdamW", {"learning_rate": 1}), "learning_rate: unknown key.*valid keys:.*lr"),
        (Named("AdamW", {"lr": -1.0}), "args: .*learning rate"),
    ],
)
def test_bad_optimizers(spec: Named, message: str):
    with pytest.raises(InputError, match=message):
        build_optimizer(spec, {"a": nn.Parameter(torch.ones(1))}, [])


def test_schedules():
    def rates(spec: Named | None, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
        scheduler, seen = build_scheduler(spec, optimizer), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(None, 3) == [2.0] * 3
    assert rates(Named("LinearWarmupLRScheduler", {"warmup_steps": 4}), 6) == pytest.approx([0.5, 1, 1.5, 2, 2, 2])
    cosine = rates(Named("WarmupCosineLRScheduler", {"warmup_steps": 2, "total_steps": 6, "min_ratio": 0.1}), 8)
    angle = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert cosine == pytest.approx([1.0, 2.0, *(2 * a for a in angle), 0.2])
    assert rates(Named("StepLR", {"step_size": 2, "gamma": 0.5}), 5) == pytest.approx([2, 2, 1, 1, 0.5])
    with pytest.raises(InputError, match="total_steps: is missing"):
        build_scheduler(Named("WarmupCosineLRScheduler"), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    with pytest.raises(InputError, match="total_steps must be"):
        rates(Named("WarmupCosineLRScheduler", {"total_steps": 0}), 1)


# -- number formats ---------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """A stand-in with a trunk that turns to half and a part that stays float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 2)
        self.codebook = nn.Parameter(torch.randn(2, 2))

    def convert_to_fp16(self) -> None:
        self.trunk.half()

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x.to(self.trunk.weight.dtype)).float()
        return (hidden @ self.codebook).square().sum()


def test_inflat_all_keeps_masters_and_its_scale_follows_overflow():
    model = Halves()
    precision = Precision(model, "inflat_all", scale_growth=0.25)
    masters = precision.parameters
    assert model.trunk.weight.dtype == torch.float16 and masters["trunk.weight"].dtype == torch.float32
    assert masters["codebook"] is model.codebook  # float32 parameters are their own masters
    optimizer = torch.optim.SGD(list(precision.flat.values()), lr=1e-5)
    precision.scale.log2.fill_(4.0)
    exact = Halves()
    x = torch.tensor([[0.5, -1.0, 2.0]])
    exact.loss(x).backward()
    for first in (True, False):  # two micro-batches of half the loss each
        precision.backward(model.loss(x) / 2)
        precision.collect(first=first)
    norm = precision.unscale()
    wanted = torch.cat([p.grad.reshape(-1) for p in exact.parameters()])
    by_name = {name: exact.get_parameter(name).grad for name in masters}
    for name in masters:
        torch.testing.assert_close(precision.gradients[name], by_name[name], rtol=5e-3, atol=5e-3)
    assert float(norm) == pytest.approx(float(wanted.norm()), rel=5e-3)
    before = masters["trunk.weight"].detach().clone()
    assert precision.step(optimizer, norm, math.inf)
    assert precision.scale.log2 == 4.25
    assert not torch.equal(masters["trunk.weight"], before)
    assert torch.equal(model.trunk.weight, masters["trunk.weight"].half())
    changed = masters["trunk.weight"].detach().clone()
    precision.backward(model.loss(x) * 1e30)
    precision.collect(first=True)
    norm = precision.unscale()
    assert not norm.isfinite() and not precision.step(optimizer, norm, 1.0)
    assert precision.scale.log2 == 3.25 and torch.equal(masters["trunk.weight"], changed)


def test_micro_batches_add_up_in_float32_and_leave_out_what_has_no_gradient():
    """65,504 is the largest half: two gradients of 40,000 add up all the same, and nothing of another step is left."""
    model = Halves()
    precision = Precision(model, "inflat_all")
    precision.gradient.fill_(math.nan)  # of a step before
    for first in (True, False):
        model.trunk.weight.grad = torch.full((2, 3), 40_000.0, dtype=torch.float16)
        if not first:
            model.codebook.grad = torch.ones(2, 2)
        precision.collect(first=first)
    assert all(p.grad is None for p in model.parameters())
    assert (precision.gradients["trunk.weight"] == 80_000).all()
    assert (precision.gradients["codebook"] == 1).all() and (precision.gradients["trunk.bias"] == 0).all()
    assert precision.unscale().isfinite()


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_is_clipped_and_a_step_skipped_without_asking(fused: bool):
    """By SGD with a wait, by fused AdamW without one: the limit is exact, and a skipped step leaves no trace."""
    precision = Precision(Halves(), None)
    name, args = ("AdamW", {"lr": 0.1, "fused": True}) if fused else ("SGD", {"lr": 1.0})
    optimizer = build_optimizer(Named(name, args), precision.flat, [])
    assert skips_on_device(optimizer) is fused
    before = precision.flat["weights"].detach().clone()
    precision.gradient.copy_(torch.where(before != 0, 3.0, 0.0))
    norm = precision.unscale()
    precision.step(optimizer, norm, torch.tensor(0.5, dtype=torch.float64))
    assert float(precision.gradient.norm()) == pytest.approx(0.5, rel=1e-6)
    after = precision.flat["weights"].detach().clone()
    if not fused:
        torch.testing.assert_close(after, before - precision.gradient)
    state = {k: v.clone() for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
    for bad in (math.inf, math.nan):
        precision.gradient[0] = bad
        assert not precision.step(optimizer, precision.unscale(), 0.5)
        assert torch.equal(precision.flat["weights"], after)
        now = {k: v for s in optimizer.state.values() for k, v in s.items() if isinstance(v, torch.Tensor)}
        assert all(torch.equal(now[key], value) for key, value in state.items())
    for parameter in precision.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    precision.collect(first=True)
    assert precision.step(optimizer, precision.unscale(), math.inf)
    assert not torch.equal(precision.flat["weights"], after)


def test_the_scale_rises_after_finite_steps_in_a_row():
    scale = LossScale(3.0, growth=1.0, interval=3, device=torch.device("cpu"))
    seen = []
    for finite in (YES, YES, NO, YES, YES, YES, YES):
        scale.update(finite)
        seen.append(float(scale.log2))
    assert seen == [3, 3, 2, 2, 2, 3, 3] and float(scale.factor()) == 8
    again = LossScale(0.0, growth=1.0, interval=3, device=torch.device("cpu"))
    again.load_state_dict(scale.state_dict())
    for _ in range(2):
        again.update(YES)
    assert float(again.log2) == 4


@pytest.mark.parametrize("mode", [None, "inflat_all"])
def test_flat_updates_are_those_of_the_single_parameters(mode: str | None):
    """AdamW over the flat tensors is AdamW over each parameter; the codebook has its own settings."""
    precision = Precision(Halves(), mode, apart=lambda name: name == "codebook")
    if precision.scale is not None:
        precision.scale.log2.zero_()
    assert set(precision.flat) == {"weights", "apart"} and precision.gradient.numel() == 3 * ALIGNMENT
    single = {name: nn.Parameter(p.detach().clone()) for name, p in precision.parameters.items()}
    spec = Named("AdamW", {"lr": 0.1, "weight_decay": 0.3})
    optimizer = build_optimizer(spec, precision.flat, ["apart"])
    reference = build_optimizer(spec, single, ["codebook"])
    for step in range(3):
        precision.collect(first=True)
        torch.manual_seed(step)
        for name, p in precision.parameters.items():
            precision.gradients[name].copy_(torch.randn(p.shape))
            single[name].grad = precision.gradients[name].clone() / 2**(0.001 * step if mode else 0)
        precision.step(optimizer, precision.unscale(), math.inf)
        reference.step()
    for name, p in precision.parameters.items():
        torch.testing.assert_close(p, single[name], rtol=1e-6, atol=1e-7)
        model_weight = precision.model.get_parameter(name)
        assert torch.equal(model_weight, p.to(model_weight.dtype))
    moments = optimizer.state[precision.flat["weights"]]["exp_avg"]
    torch.testing.assert_close(precision.view("trunk.bias", moments), reference.state[single["trunk.bias"]]["exp_avg"])


def test_inflat_all_weights_round_trip_through_masters():
    precision = Precision(Halves(), "inflat_all")
    saved = {name: t + 1e-5 for name, t in precision.weights().items()}
    assert precision.scale.log2 == INITIAL_LOG_SCALE["inflat_all"] and saved["trunk.weight"].dtype == torch.float32
    other = Precision(Halves(), "inflat_all")
    other.load_weights(saved)
    assert all(torch.equal(t, saved[name]) for name, t in other.weights().items())
    assert torch.equal(other.model.trunk.weight, saved["trunk.weight"].half())
    with pytest.raises(ValueError, match="missing trunk.bias.*trunk.weight is .*the model has"):
        other.load_weights({"trunk.weight": torch.zeros(1), "codebook": saved["codebook"]})


def test_amp_scales_and_backs_off():
    model = Halves()
    precision = Precision(model, "amp")
    assert model.dtype == torch.float16 and precision.scale.log2 == 16
    optimizer = torch.optim.SGD(list(precision.flat.values()), lr=1e-4)
    x, exact = torch.ones(1, 3), Halves()
    exact.loss(x).backward()
    precision.backward(model.loss(x))
    precision.collect(first=True)
    norm = precision.unscale()
    wanted = torch.cat([p.grad.reshape(-1) for p in exact.parameters()]).norm()
    assert float(norm) == pytest.approx(float(wanted), rel=1e-5)
    assert precision.step(optimizer, norm, math.inf)
    weights = model.trunk.weight.detach().clone()
    precision.backward(model.loss(x) * float("inf"))
    precision.collect(first=True)
    assert not precision.step(optimizer, precision.unscale(), math.inf)
    assert precision.scale.log2 == 15 and torch.equal(model.trunk.weight, weights)
    again = Precision(Halves(), "amp")
    again.load_state_dict(precision.state_dict())
    assert again.scale.log2 == 15
    again.load_state_dict({"mode": "bf16", "scale": None})
    assert again.scale.log2 == 15


def test_a_loss_scale_of_before_goes_on():
    """Checkpoints that kept amp's scale as `torch.amp.GradScaler` does, and the other's beside it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0).state_dict() | {"_growth_tracker": 5}
    amp = Precision(Halves(), "amp")
    amp.load_state_dict({"mode": "amp", "log_scale": 20.0, "scaler": scaler})
    assert amp.state_dict()["scale"] == {"log_scale": 10.0, "finite_steps": 5}
    inflat_all = Precision(Halves(), "inflat_all")
    inflat_all.load_state_dict({"mode": "inflat_all", "log_scale": 8.3, "scaler": {}})
    assert inflat_all.state_dict()["scale"] == {"log_scale": 8.3, "finite_steps": 0}


def test_half_precision_on_a_cpu_becomes_float32_in_one_line(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    cpu = torch.device("cpu")
    assert mode_on_device("inflat_all", cpu) is None and len(caplog.records) == 1
    assert "float32" in caplog.text
    assert mode_on_device("bf16", cpu) == "bf16" and mode_on_device(None, cpu) is None
    assert mode_on_device("amp", torch.device("cuda")) == "amp" and len(caplog.records) == 1


# -- generators, usage ------------------------------------------------------------------------------------------------


def test_random_states_come_back_through_a_file(tmp_path):
    state = random_state()
    torch.save(state, tmp_path / "s.pt")
    np.random.standard_normal(3)  # noqa: NPY002 -- leaves half a pair cached

    def draw() -> list[float]:
        return [random.random(), float(np.random.standard_normal()), float(torch.rand(()))]  # noqa: NPY002

    set_random_state(torch.load(tmp_path / "s.pt", weights_only=True))
    first = draw()
    set_random_state(torch.load(tmp_path / "s.pt", weights_only=True))
    assert draw() == first


def test_perplexity_closed_forms():
    assert float(perplexity(torch.tensor([5, 5, 5, 5]))) == pytest.approx(4)
    assert float(perplexity(torch.tensor([7, 0, 0]))) == pytest.approx(1)
    assert float(perplexity(torch.zeros(4, dtype=torch.int64))) == 0


def usage(**settings) -> CodebookUsage:
    return CodebookUsage(4000, torch.device("cpu"), **{"reseed_after": 0, **settings})


def spread(rows: int, codes: int) -> torch.Tensor:
    """Counts of `rows` rows that fall evenly on the first `codes` of 4000 codes."""
    return torch.bincount(torch.arange(rows) % codes, minlength=4000)


COLLAPSED, HEALTHY = spread(200, 2), spread(200, 150)


def alarms_of(usage: CodebookUsage, steps: list[torch.Tensor], caplog: pytest.LogCaptureFixture, *, epoch=None):
    """Steps, from 1, at which a collapse is announced; an epoch ends every `epoch` steps."""
    found = []
    for step, counts in enumerate(steps, start=1):
        caplog.clear()
        usage.add(counts)
        if epoch is not None and step % epoch == 0:
            usage.finish_epoch()
        found += [step] * caplog.text.count("CODEBOOK COLLAPSE")
    return found


def test_collapse_is_announced_within_an_epoch_once_per_episode(caplog: pytest.LogCaptureFixture):
    steps = [COLLAPSED] * 400 + [HEALTHY] * 50 + [COLLAPSED] * 200
    # each with the step after the period that decides it, when its figures have come from the device
    assert alarms_of(usage(), steps, caplog) == [101, 551]
    assert alarms_of(usage(reseed_after=130), steps, caplog) == [301]  # re-seeding has had its chance
    assert alarms_of(usage(), [COLLAPSED] * 200, caplog, epoch=30) == [121]  # periods end with epochs
    assert alarms_of(usage(speaks=False), steps, caplog) == []


def test_no_false_alarm(caplog: pytest.LogCaptureFixture):
    assert alarms_of(usage(), [HEALTHY] * 300, caplog) == []
    assert alarms_of(usage(), [COLLAPSED] * 99, caplog) == []  # a start, or a short trial
    assert alarms_of(usage(), ([COLLAPSED] * 50 + [HEALTHY] * 50) * 3, caplog) == []
    assert alarms_of(usage(), [spread(3, 1)] * 300, caplog, epoch=1) == []  # too few rows to tell
    # One small shape again and again: 50 steps hold 2000 rows, but never more than 15 different ones.
    assert alarms_of(usage(), [spread(40, 15)] * 300, caplog, epoch=1) == []


def test_the_watch_goes_on_after_a_restart(caplog: pytest.LogCaptureFixture):
    first, second = usage(), usage()
    assert alarms_of(first, [COLLAPSED] * 60, caplog) == []
    second.load_state_dict(first.state_dict())
    assert alarms_of(second, [COLLAPSED] * 90, caplog) == [41]
    third = usage()
    third.load_state_dict(second.state_dict())
    assert alarms_of(third, [COLLAPSED] * 90, caplog) == []


def test_figures_of_an_epoch_are_of_all_its_steps():
    watched = usage()
    for step in range(70):  # a period and a part of one
        counts = torch.zeros(4000, dtype=torch.int64)
        counts[step] = 5
        watched.add(counts)
    assert watched.finish_epoch()() == {
        "epoch_perplexity": pytest.approx(70), "epoch_codes_used": 70, "epoch_share_used": 70 / 4000,
        "epoch_dead_codes": 3930,
    }
    assert watched.finish_epoch()()["epoch_codes_used"] == 0
