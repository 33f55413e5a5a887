"""The decoder: one latent row per block to the TSDF of the block's 512 voxels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.modules.sparse.conv.functional import subdivide_conv_to_scalar
from trellis.modules.sparse.conv.module import SparseConv3d
from trellis.modules.sparse.levels import Grid, Topology
from trellis.modules.sparse.linear import SparseLinear
from trellis.modules.sparse.tensor import SparseTensor
from trellis.modules.sparse.transformer import TransformerBlock, embed_positions


class UpBlock(nn.Module):
    """SiLU(conv), subdivide, SiLU(conv)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.act_layers = nn.ModuleList([SparseConv3d(in_channels, out_channels), nn.SiLU()])
        self.out_layers = nn.ModuleList([SparseConv3d(out_channels, out_channels), nn.SiLU()])

    def forward(self, x: SparseTensor, activate: bool, backend: str) -> SparseTensor:
        """[N, in] -> [8 N, out] on the children, before the last SiLU; with `activate` of SiLU(x).

        Each SiLU is left to the convolution that reads it, which then need not keep both sides of it.
        """
        hidden = self.act_layers[0](x.feats, x.grid, activate=activate, backend=backend)
        hidden = self.out_layers[0](hidden, x.grid, subdivide=True, activate=True, backend=backend)
        return SparseTensor(hidden, children_grid(x.grid))

    def plain(self, x: SparseTensor, backend: str) -> SparseTensor:
        """The same with the subdivided tensor and every SiLU written out: for comparison."""
        children = children_grid(x.grid)
        hidden = F.silu(self.act_layers[0](x.feats, x.grid, backend=backend)).repeat_interleave(8, dim=0)
        return SparseTensor(F.silu(self.out_layers[0](hidden, children, backend=backend)), children)


def children_grid(grid: Grid) -> Grid:
    """The dense level below a dense level."""
    return grid.topology.dense_grid(2 * grid.side)


class SparseSDFDecoder(nn.Module):
    """Transformer blocks in shifted windows and three up blocks."""

    def __init__(
        self,
        *,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int,
        use_checkpoint: bool,
        qk_rms_norm: bool,
    ) -> None:
        super().__init__()
        c = model_channels
        widths = [c, c // 4, c // 8, c // 16]
        self.input_layer = SparseLinear(latent_channels, c)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                c,
                num_heads,
                mlp_ratio=mlp_ratio,
                window_size=window_size,
                shift=window_size // 2 * (i % 2),
                qk_rms_norm=qk_rms_norm,
                use_checkpoint=use_checkpoint,
            )
            for i in range(num_blocks)
        )
        self.upsample = nn.ModuleList(UpBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.out_layer = SparseLinear(c // 16, 1)

    def forward(
        self,
        latent: Tensor,
        topology: Topology,
        dtype: torch.dtype,
        *,
        factor: float | None = None,
        fused: bool = True,
        backend: str = "auto",
    ) -> Tensor:
        """[M, L] -> TSDF [M, 512] in (-1, 1), slots in Morton order; float32 (float64 for float64)."""
        x = self.embed(latent, topology, dtype, factor)
        for block in self.blocks:
            x = block(x, topology, fused)
        return self.fine(self.coarse(x, topology, fused, backend), topology, fused, backend)

    def embed(self, latent: Tensor, topology: Topology, dtype: torch.dtype, factor: float | None = None) -> Tensor:
        """[M, L] -> [M, C], before the first transformer block."""
        return embed_positions(self.input_layer(latent.to(dtype)), topology, factor)

    def coarse(self, x: Tensor, topology: Topology, fused: bool = True, backend: str = "auto") -> Tensor:
        """[M, C], after the last transformer block -> what `fine` reads: [8 M, C / 8] at two voxels a block and axis.

        The up blocks are cut in two here, where a block of 8-cubed voxels has the fewest numbers, for `split_decode`.
        """
        first, second = self.upsample[0], self.upsample[1]
        level = SparseTensor(x, topology.dense_grid(1))
        if not fused:
            level = first.plain(level, backend)
            return F.silu(second.act_layers[0](level.feats, level.grid, backend=backend))
        level = first(level, False, backend)
        return second.act_layers[0](level.feats, level.grid, activate=True, backend=backend)

    def fine(self, x: Tensor, topology: Topology, fused: bool = True, backend: str = "auto") -> Tensor:
        """What `coarse` made, [8 M, C / 8] -> TSDF [M, 512]."""
        second, third = self.upsample[1], self.upsample[2]
        grid, children = topology.dense_grid(2), topology.dense_grid(4)
        if not fused:
            x = F.silu(second.out_layers[0](x.repeat_interleave(8, dim=0), children, backend=backend))
            level = third.plain(SparseTensor(x, children), backend)
            x = self.out_layer(level.feats)
            return torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32))).view(-1, 512)
        x = second.out_layers[0](x, grid, subdivide=True, activate=True, backend=backend)
        x = third.act_layers[0](x, children, activate=True, backend=backend)
        kernel, bias = third.out_layers[0].cast(x.dtype)
        out_weight, out_bias = self.out_layer.weight.to(x.dtype), self.out_layer.bias.to(x.dtype)
        values = subdivide_conv_to_scalar(
            x, kernel, bias, out_weight, out_bias, children, activate=True, backend=backend
        )
        return values.view(-1, 512)
