"""The encoder: TSDF values on active voxels to one latent row per block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trellis.modules.sparse.conv.module import SparseConv3d
from trellis.modules.sparse.levels import Grid, Pyramid
from trellis.modules.sparse.linear import SparseLinear
from trellis.modules.sparse.norm import SparseGroupNorm, layer_norm
from trellis.modules.sparse.pool import first_stage
from trellis.modules.sparse.tensor import SparseTensor
from trellis.modules.sparse.transformer import TransformerBlock, embed_positions


class DownBlock(nn.Module):
    """SiLU(GN(x)), pool, conv, SiLU(GN), conv, plus a 1x1x1 convolution of the pooled input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.act_layers = nn.ModuleList([SparseGroupNorm(in_channels), nn.SiLU()])
        self.out_layers = nn.ModuleList(
            [
                SparseConv3d(in_channels, out_channels),
                SparseGroupNorm(out_channels),
                nn.SiLU(),
                SparseConv3d(out_channels, out_channels),
            ]
        )
        self.skip_connection = SparseConv3d(in_channels, out_channels, kernel_size=1)

    def after_pool(self, hidden: Tensor, skip: Tensor, grid: Grid, fused: bool, backend: str) -> SparseTensor:
        """The part on the coarse grid: [P, in] twice -> [P, out] on `grid`."""
        conv_in, norm, _, conv_out = self.out_layers
        hidden = conv_in(hidden, grid, backend=backend)
        hidden = norm(hidden, grid, silu=True, fused=fused)
        return SparseTensor(conv_out(hidden, grid, backend=backend) + self.skip_connection(skip, grid), grid)

    def forward(self, x: SparseTensor, coarse: Grid, fused: bool, backend: str) -> SparseTensor:
        """[N, in] -> [P, out] on `coarse`, the next coarser grid."""
        hidden, skip = self.act_layers[0].silu_pool(x.feats, x.grid, coarse, fused=fused)
        return self.after_pool(hidden, skip, coarse, fused, backend)


class SparseSDFEncoder(nn.Module):
    """Three down blocks and transformer blocks in shifted windows; see the module's docstring for shapes."""

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
        widths = [c // 16, c // 8, c // 4, c]
        self.input_layer1 = SparseLinear(1, c // 16)
        self.downsample = nn.ModuleList(DownBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.input_layer = SparseLinear(c, c)
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
        self.out_layer = SparseLinear(c, 2 * latent_channels)

    def _first_block(self, pyramid: Pyramid, dtype: torch.dtype, fused: bool, backend: str) -> SparseTensor:
        block, fine, coarse = self.downsample[0], pyramid.grids[0], pyramid.grids[1]
        if not fused:
            rows = pyramid.values.reshape(-1)[fine.slots][:, None].to(dtype)
            return block(SparseTensor(self.input_layer1(rows), fine), coarse, fused, backend)
        norm = block.act_layers[0]
        hidden, skip = first_stage(
            pyramid.values,
            fine,
            coarse,
            self.input_layer1.weight[:, 0],
            self.input_layer1.bias,
            norm.weight,
            norm.bias,
            norm.groups,
            norm.eps,
            dtype=dtype,
        )
        return block.after_pool(hidden, skip, coarse, fused, backend)

    def forward(
        self,
        pyramid: Pyramid,
        dtype: torch.dtype,
        *,
        factor: float | None = None,
        fused: bool = True,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [M, L] (float32, or float64) of every block of the pyramid."""
        level = self._first_block(pyramid, dtype, fused, backend)
        for block, coarse in zip(list(self.downsample)[1:], pyramid.grids[2:]):
            level = block(level, coarse, fused, backend)
        topology = pyramid.topology
        x = self.input_layer(level.feats)
        x = embed_positions(x, topology, factor)
        for block in self.blocks:
            x = block(x, topology, fused)
        x = self.out_layer(layer_norm(x, 1e-5))
        mean, logvar = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)
