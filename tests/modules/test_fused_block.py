"""The transformer block as one function against the plain block; its attention kernel stood in for by plain torch."""

from __future__ import annotations

import pytest
import torch
from sparse_batches import random_pyramid

from trellis.modules.sparse import fused_block, transformer
from trellis.modules.sparse.transformer import TransformerBlock


def plain_attention(qkv, plan):
    q, k, v = qkv.unbind(1)
    out = torch.empty_like(q)
    bounds = plan.cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:]):
        score = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / q.shape[-1] ** 0.5
        out[start:stop] = torch.einsum("hqk,khd->qhd", score.softmax(-1), v[start:stop])
    return out


def stand_in(monkeypatch):
    def backward(grad, qkv, out, lse, states, plan):
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            plain_attention(leaf, plan).backward(grad)
        return leaf.grad.view(len(qkv), -1)

    none = torch.zeros(0)
    monkeypatch.setattr(fused_block, "attention_forward", lambda x, plan: (plain_attention(x, plan), none, none, none))
    monkeypatch.setattr(fused_block, "attention_backward", backward)


@pytest.mark.parametrize("shift", [0, 4])
def test_fused_block_equals_the_plain_one(shift, monkeypatch):
    stand_in(monkeypatch)
    topology = random_pyramid([40, 0, 27], extent=6).topology
    block = TransformerBlock(24, 3, window_size=4, shift=shift).double()
    x = torch.randn(topology.num_blocks, 24, dtype=torch.float64, requires_grad=True)
    handed = torch.randn_like(x)
    expected = block(x, topology, False)
    good = torch.autograd.grad(expected, [x, *block.parameters()], handed)
    layers = (block.attn.to_qkv, block.attn.to_out, block.mlp.mlp[0], block.mlp.mlp[2])
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    out = fused_block.FusedBlock.apply(x, topology.windows(4, shift), 3, True, *parameters)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    named = dict(zip([x, *block.parameters()], good))
    for value, grad in zip([x, *parameters], torch.autograd.grad(out, [x, *parameters], handed)):
        torch.testing.assert_close(grad, named[value], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_kept_where_no_backward_pass_comes(grad, monkeypatch):
    """Under no_grad the weights still require gradients: GELU runs inside its product, and no tensor is saved."""
    stand_in(monkeypatch)
    monkeypatch.setattr(transformer, "can_fuse", lambda feats, heads, plan: True)
    product, inside, kept = fused_block.gelu_product, [], []
    monkeypatch.setattr(fused_block, "gelu_product", lambda *given: inside.append(1) or product(*given))
    topology = random_pyramid([20], extent=6).topology
    block, x = TransformerBlock(24, 3, window_size=4).double(), torch.randn(20, 24, dtype=torch.float64)
    assert all(p.requires_grad for p in block.parameters())
    save = lambda t: kept.append(t) or t  # noqa: E731
    with torch.set_grad_enabled(grad), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        out = block(x, topology)
    assert (inside, bool(kept)) == ([], True) if grad else (inside, kept) == ([1], [])
    torch.testing.assert_close(out, block(x, topology, False), rtol=0, atol=1e-10)


def check_row_kernels(device, dtype, rows, channels, tolerance):
    """Kernels of rows and columns against plain float64."""
    from trellis.modules.sparse.kernels import block

    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(rows, channels, generator=generator).to(device, dtype) for _ in range(3))
    order = torch.randperm(rows, generator=generator).to(device)
    exact, plain = [t.double() for t in (x, y, z)], fused_block._Plain
    wide = torch.float64
    for got, expected in [
        ([block.norm_rows(x)], [plain.norm_rows(exact[0])]),
        ([block.norm_rows(x, order)], [plain.norm_rows(exact[0], order)]),
        (block.add_norm(x, order, y), plain.add_norm(exact[0], order, exact[1])),
        ([block.norm_backward(x, order, y, z)], [plain.norm_backward(exact[0], order, *exact[1:])]),
        ([block.norm_backward(x, None, y, z)], [plain.norm_backward(exact[0], None, *exact[1:])]),
        ([block.column_sums(x, torch.float32)], [plain.column_sums(exact[0], wide)]),
        (block.gelu_backward(x, y, torch.float32), plain.gelu_backward(*exact[:2], wide)),
    ]:
        for a, b in zip(got, expected):
            assert a.shape == b.shape and torch.isfinite(a).all()
            assert float((a.double() - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without CUDA")
@pytest.mark.parametrize("rows, channels", [(70, 24), (1, 65), (0, 8)])
def test_row_kernels_interpreted(rows, channels):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_row_kernels("cpu", torch.float32, rows, channels, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows, channels", [(26888, 512), (1, 65), (3001, 2048), (0, 8)])
def test_row_kernels_on_the_card(rows, channels, dtype, tolerance, cuda_device):
    check_row_kernels(cuda_device, dtype, rows, channels, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 4])
def test_fused_block_on_the_card(dtype, shift, cuda_device):
    topology = random_pyramid([300, 0, 512], extent=16).topology
    block = TransformerBlock(128, 2, shift=shift)
    exact = TransformerBlock(128, 2, shift=shift).double()
    exact.load_state_dict(block.state_dict())
    block = block.to(cuda_device)
    moved = type(topology)(topology.coords.to(cuda_device), topology.num_samples, 16)
    x = torch.randn(topology.num_blocks, 128).to(cuda_device, dtype).requires_grad_()
    y = x.detach().cpu().double().requires_grad_()
    handed = torch.randn(x.shape)
    out, expected = block(x, moved), exact(y, topology, False)
    out.backward(handed.to(cuda_device, dtype))
    expected.backward(handed.to(dtype).double())
    tolerance = 4 * torch.finfo(dtype).eps
    pairs = [(out, expected), (x.grad, y.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(block.parameters(), exact.parameters())]
    for got, good in pairs:
        error = (got.detach().cpu().double() - good.detach()).norm() / good.detach().norm()
        assert error <= tolerance
    with torch.no_grad():
        # GELU inside the product, without the tensors of the backward pass
        error = (block(x, moved).cpu().double() - expected.detach()).norm() / expected.detach().norm()
    assert error <= tolerance
