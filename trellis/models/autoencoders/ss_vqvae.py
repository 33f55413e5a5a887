"""SparseSDFVQVAE: the sparse SDF autoencoder with a vector quantizer for a bottleneck."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellis.models.autoencoders.decoder import SparseSDFDecoder
from trellis.models.autoencoders.encoder import SparseSDFEncoder
from trellis.models.autoencoders.flat_weights import FlatModel, FlatWeights
from trellis.models.autoencoders.part_arguments import part_arguments
from trellis.models.autoencoders.pass_graphs import PassGraphs, Rows, Split
from trellis.models.autoencoders.pass_head import Head
from trellis.models.autoencoders.pass_sizes import Sizes
from trellis.modules.quantizers import VectorQuantizer, nearest_code
from trellis.modules.sparse.attention import takes_varlen
from trellis.modules.sparse.kernels.support import has_kernels, on_own_device
from trellis.modules.sparse.levels import Pyramid, Topology, blocks_from_rows, build_pyramid
from trellis.modules.sparse.morton import slot_positions
from trellis.modules.sparse.plans import WindowSizes
from trellis.utils.blocks import LATENT_STRIDE

Batch = dict[str, Any]


class SparseSDFVQVAE(nn.Module):
    """Sparse TSDF -> one code per 8-cubed block -> TSDF of every voxel of those blocks.

    Args:
        resolution: accepted for compatibility; nothing depends on it.
        model_channels: C, a multiple of 64. latent_channels: L (`embed_dim` is another spelling).
        num_blocks: transformer blocks of encoder and decoder each. num_embeddings: K codes.
        num_heads: null for C / num_head_channels. mlp_ratio: hidden width of the MLP over C.
        model_channels_encoder, ..., num_head_channels_decoder: those of one part alone, where they are not null.
        attn_mode: "swin". window_size: side of the attention windows in latent voxels. pe_mode: "ape".
        use_fp16: activations of the trunk in float16 on CUDA (elsewhere float32). use_checkpoint: recompute transformer
            blocks in the backward pass. qk_rms_norm: RMS norm of queries and keys. representation_config: null.
        use_ema_update, ema_decay, quantizer_gradient, reseed_after: see `VectorQuantizer`.
        fused: the fused first and last stages and the collapsed convolutions; False writes every tensor out.
        backend: of the convolutions, see `trellis.modules.sparse.conv.functional`.
        cuda_graphs: on CUDA in 16 bit, batches of sizes that come up again run as CUDA graphs
            (`trellis.models.autoencoders.pass_graphs`): the same values, less work for the host. Then the backward pass
            must come before the model's next forward pass.

    Raises:
        ValueError: a value outside its rule.
    """

    def __init__(
        self,
        resolution: int = 64,
        model_channels: int = 512,
        latent_channels: int | None = None,
        num_blocks: int = 4,
        num_embeddings: int = 8192,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4.0,
        attn_mode: str = "swin",
        window_size: int = 8,
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        qk_rms_norm: bool = False,
        representation_config: None = None,
        embed_dim: int | None = None,
        model_channels_encoder: int | None = None,
        model_channels_decoder: int | None = None,
        num_blocks_encoder: int | None = None,
        num_blocks_decoder: int | None = None,
        num_heads_encoder: int | None = None,
        num_heads_decoder: int | None = None,
        num_head_channels_encoder: int | None = None,
        num_head_channels_decoder: int | None = None,
        use_ema_update: bool = False,
        ema_decay: float = 0.99,
        quantizer_gradient: str = "straight_through",
        reseed_after: int = 200,
        fused: bool = True,
        backend: str = "auto",
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k in inspect.signature(type(self).__init__).parameters}
        arguments.pop("self", None)
        self.config = arguments
        if attn_mode != "swin":
            raise ValueError(f'attn_mode must be "swin", got {attn_mode!r}')
        if pe_mode != "ape":
            raise ValueError(f'pe_mode must be "ape", got {pe_mode!r}')
        if representation_config is not None:
            raise ValueError(f"representation_config must be null, got {representation_config!r}")
        if None not in (latent_channels, embed_dim) and latent_channels != embed_dim:
            raise ValueError(f"latent_channels and embed_dim name one value, got {latent_channels} and {embed_dim}")
        latent = next((width for width in (latent_channels, embed_dim) if width is not None), 16)
        if latent < 1:
            name = "embed_dim" if latent_channels is None else "latent_channels"
            raise ValueError(f"{name} must be at least 1, got {latent}")
        if window_size < 2 or window_size % 2:
            raise ValueError(f"window_size must be even and at least 2, got {window_size}")
        parts = {part: part_arguments(arguments, part) for part in ("encoder", "decoder")}
        narrowest = min(part["model_channels"] for part in parts.values())
        if narrowest * mlp_ratio < 1:
            raise ValueError(
                f"mlp_ratio must give the MLP over {narrowest} channels a hidden width of at least 1, got {mlp_ratio}"
            )
        common: dict[str, Any] = {
            "latent_channels": latent,
            "mlp_ratio": mlp_ratio,
            "window_size": window_size,
            "use_checkpoint": use_checkpoint,
            "qk_rms_norm": qk_rms_norm,
        }
        self.latent_channels = latent
        self.fused, self.backend = fused, backend
        self.cuda_graphs = cuda_graphs
        self._graphs = PassGraphs()
        self._flat: FlatModel | None = None
        self.use_fp16 = use_fp16
        self._compute_dtype: torch.dtype | None = None
        self.encoder = SparseSDFEncoder(**common, **parts["encoder"])
        self.decoder = SparseSDFDecoder(**common, **parts["decoder"])
        self.quantizer = VectorQuantizer(
            num_embeddings,
            latent,
            use_ema_update=use_ema_update,
            ema_decay=ema_decay,
            gradient=quantizer_gradient,
            reseed_after=reseed_after,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform Linears with zero bias; the convolutions keep their own start. No layer starts at zero.

        The output layer starts small, so that tanh is far from saturation, and so do the residual branches of the
        transformer blocks, so that what the convolutions hand on is not drowned at first.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.decoder.out_layer.weight.mul_(0.3)
            for name, weight in self.named_parameters():
                if name.endswith(("attn.to_out.weight", "mlp.2.weight")):
                    weight.mul_(0.2)

    @property
    def device(self) -> torch.device:
        return self.quantizer.codebook.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the trunk's activations."""
        if self._compute_dtype is not None:
            return self._compute_dtype
        weight_dtype = self.decoder.out_layer.weight.dtype
        if self.use_fp16 and self.device.type == "cuda" and weight_dtype == torch.float32:
            return torch.float16
        return weight_dtype

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Fix the dtype of the trunk's activations; None: float16 for `use_fp16` on CUDA, else that of the weights."""
        self._compute_dtype = dtype

    def convert_to_fp16(self) -> None:
        """Trunk weights to float16; the quantizer stays float32."""
        self.encoder.half()
        self.decoder.half()

    def convert_to_fp32(self) -> None:
        """Trunk weights to float32."""
        self.encoder.float()
        self.decoder.float()

    # -- encoding ---------------------------------------------------------------------------------------------------

    def build_pyramid(self, batch: Batch) -> Pyramid:
        """The encoder's levels of a batch in block form or in the flat form (see `encode`), on the model's device."""
        if "block_coords" in batch:
            coords, values, active = (
                batch[key].to(self.device, non_blocking=True) for key in ("block_coords", "block_sdf", "active")
            )
            samples = len(batch["blocks_per_sample"]) if "blocks_per_sample" in batch else None
            extent = -(-batch["resolution"] // LATENT_STRIDE) if "resolution" in batch else None
            sizes = (batch.get("level_sizes"), samples, extent, batch.get("window_sizes"))
            return build_pyramid(coords, values, active, *sizes)
        missing = [key for key in ("sparse_sdf", "sparse_index", "batch_idx") if key not in batch]
        if missing:
            raise ValueError(f"a batch needs block_coords, block_sdf, active, or the flat form; missing: {missing}")
        values, index, rows = (batch[key].to(self.device) for key in ("sparse_sdf", "sparse_index", "batch_idx"))
        return build_pyramid(*blocks_from_rows(index, rows, values))

    def _encode(self, pyramid: Pyramid, factor: float | None = None) -> tuple[Tensor, Tensor]:
        return self.encoder(pyramid, self.compute_dtype, factor=factor, fused=self.fused, backend=self.backend)

    @on_own_device
    def encode(self, batch: Batch, *, factor: float | None = None) -> dict[str, Tensor]:
        """Latents and codes of a batch.

        Args:
            batch: `sparse_sdf` float32 [N, 1], `sparse_index` int [N, 3], `batch_idx` int [N]; or the block form that
                `trellis.datasets.sparse_sdf.collate` makes.
            factor: multiplies the coordinates before the position embedding.

        Returns:
            `coords` int32 [M, 4] (batch, x, y, z) by sample, then Morton; `mean`, `logvar` [M, L]; `ids` int64 [M].
        """
        if self._may_graph() and not torch.is_grad_enabled():
            out = self._through_graph("encode", batch, self._encode_pyramid, factor=factor)
            if out is not None:
                return {"coords": batch["block_coords"].to(self.device).int(), **out}
        pyramid = self.build_pyramid(batch)
        return {"coords": pyramid.topology.coords, **self._encode_pyramid(pyramid, factor)}

    def _encode_pyramid(self, pyramid: Pyramid, factor: float | None) -> Rows:
        mean, logvar = self._encode(pyramid, factor)
        # not through the quantizer's forward: encoding is no training step
        return {"mean": mean, "logvar": logvar, "ids": nearest_code(mean, self.quantizer.codebook)}

    # -- decoding ---------------------------------------------------------------------------------------------------

    @on_own_device
    def decode_blocks(
        self,
        latent: Tensor,
        coords: Tensor,
        *,
        factor: float | None = None,
        window_sizes: WindowSizes | None = None,
    ) -> Tensor:
        """[M, L] at block coordinates [M, 4] -> TSDF [M, 512] in (-1, 1), slots in Morton order.

        Args:
            window_sizes: of the blocks (`trellis.datasets.sparse_sdf.window_sizes`), where they are known: then a GPU
                works on no window that holds nothing.
        """
        if latent.shape != (coords.shape[0], self.latent_channels):
            raise ValueError(
                f"latent must be [{coords.shape[0]}, {self.latent_channels}], got {list(latent.shape)}"
            )
        latent, coords = latent.to(self.device), coords.to(self.device).int()
        if not (self._may_graph() and len(latent) and not torch.is_grad_enabled()):
            return self._decode(latent, Topology(coords), factor)
        # one wait for the GPU, and none for the windows of attention
        *lowest, highest, samples = torch.stack(
            [coords[:, 1:].min(), coords[:, 0].min(), coords[:, 1:].max(), coords[:, 0].max() + 1]
        ).tolist()
        if min(lowest) < 0:
            raise ValueError(f"coordinates must not be negative, got {min(lowest)}")
        extent = _round_up_to_power_of_2(highest + 1)

        weights, split, names = self._weights()

        def decode(inputs: Rows, size: Sizes, parts: Sequence[Tensor]) -> Rows:
            topology = Topology(inputs["coords"], samples + 1, extent, size.windows)
            return {"sdf": self._with_weights(names, parts, lambda: self._decode(inputs["latent"], topology, factor))}

        out = self._graphs.run(
            ("decode", factor, *self._switches()),
            Sizes(len(latent), windows=window_sizes or {}),
            {"coords": coords, "latent": latent},
            decode,
            weights,
            samples=samples,
            extent=extent,
            train=False,
            split=split,
        )
        if out is not None:
            return out["sdf"]
        return self._decode(latent, Topology(coords, samples, extent, window_sizes), factor)

    def _decode(self, latent: Tensor, topology: Topology, factor: float | None = None) -> Tensor:
        return self.decoder(
            latent, topology, self.compute_dtype, factor=factor, fused=self.fused, backend=self.backend
        )

    def decode_latent(self, latent: Tensor, coords: Tensor, *, factor: float | None = None) -> tuple[Tensor, Tensor]:
        """Decode latents [M, L] at [M, 4] without quantizing: sdf [512 M, 1] and voxel coords int32 [512 M, 4]."""
        values = self.decode_blocks(latent, coords, factor=factor)
        coords = coords.to(self.device)
        offsets = slot_positions(LATENT_STRIDE).to(coords)
        voxels = coords[:, None, 1:] * LATENT_STRIDE + offsets
        batch = coords[:, None, :1].expand(-1, offsets.shape[0], 1)
        return values.view(-1, 1), torch.cat([batch, voxels], dim=2).view(-1, 4).int()

    def decode_ids(self, ids: Tensor, coords: Tensor, *, factor: float | None = None) -> tuple[Tensor, Tensor]:
        """Decode codes [M] at [M, 4]; returns as `decode_latent`. ValueError for ids outside the codebook."""
        return self.decode_latent(self.quantizer.lookup(ids.to(self.device)), coords, factor=factor)

    # -- CUDA graphs ------------------------------------------------------------------------------------------------

    def _may_graph(self) -> bool:
        """Whether nothing in a pass waits for the GPU, and nothing but the model's own settings shapes it."""
        return (
            self.cuda_graphs
            and self.fused
            and self.device.type == "cuda"
            and self.compute_dtype in (torch.float16, torch.bfloat16)
            and has_kernels(self.device, self.compute_dtype)
            and all(takes_varlen(self.device, self.compute_dtype, dim) for dim in self._head_dims())
            and self.backend in ("auto", "triton")
            and not torch.is_autocast_enabled("cuda")
            and not torch.cuda.is_current_stream_capturing()
        )

    def _head_dims(self) -> set[int]:
        layers = [block.attn for part in (self.encoder, self.decoder) for block in part.blocks]
        return {layer.to_out.in_features // layer.heads for layer in layers}

    @property
    def graph_bytes(self) -> int:
        """Memory that recorded passes hold, beside what PyTorch's allocator counts as allocated."""
        return self._graphs.reserved_bytes

    def release_graphs(self) -> None:
        """Forget all recorded passes and give their memory back."""
        self._graphs.clear()

    def _switches(self) -> tuple[Any, ...]:
        return self.compute_dtype, self.backend, torch.backends.cuda.matmul.allow_tf32

    def use_flat_weights(self, flat: FlatWeights) -> None:
        """Let recorded passes read weights by the flat tensors in which they lie.

        Training passes with a `head` hand their gradients over to those. It ends by itself when the model is changed
        (moved, converted, a part replaced or frozen), and with a recorded training pass without a head, whose gradients
        are the parameters'.
        """
        self._graphs.clear()
        self._flat = FlatModel(self, flat)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has its own parameters, which do not lie there."""
        return {**super().__getstate__(), "_flat": None}

    def _weights(self) -> tuple[list[Tensor], Split, list[str]]:
        """What passes are given, how it becomes what they read, and the parameters' names there; buffers come last."""
        buffers = list(self.quantizer.buffers())
        if self._flat is not None and not self._flat.holds():
            self._flat = None
        if self._flat is None:
            named = dict(self.named_parameters())
            return [*named.values(), *buffers], list, list(named)
        return [*self._flat.weights(self), *buffers], self._flat.split, self._flat.names

    def _with_weights(self, names: Sequence[str], weights: Sequence[Tensor], work: Callable[[], Any]) -> Any:
        """What `work` returns with other tensors in the place of the parameters of these names; buffers stay."""
        named = {f"model.{name}": tensor for name, tensor in zip(names, weights)}
        return torch.func.functional_call(_Caller(self), named, (work,))

    def _through_graph(
        self,
        kind: str,
        batch: Batch,
        work: Callable[..., Rows],
        *,
        factor: float | None = None,
        train: bool = False,
        head: Head | None = None,
    ) -> Rows | None:
        """What `work`, and then `head`, make of the batch, where it says its sizes and a graph takes them."""
        if any(key not in batch for key in ("block_coords", "level_sizes", "blocks_per_sample", "resolution")):
            return None
        samples, extent = len(batch["blocks_per_sample"]), -(-batch["resolution"] // LATENT_STRIDE)
        _, rows2, rows4, blocks = batch["level_sizes"]

        if train and head is None:
            self._flat = None  # for all passes: recordings last as long as they are given the same weights
        weights, split, names = self._weights()

        def run(inputs: Rows, size: Sizes, parts: Sequence[Tensor]) -> Rows:
            coords, values, active = inputs["coords"], inputs["values"], inputs["active"]
            sizes = (size.level_sizes, samples + 1, extent, size.windows)
            pyramid = build_pyramid(coords, values, active, *sizes, padded=True)
            out = self._with_weights(names, parts, lambda: work(pyramid, factor))
            if head is None:
                return out
            return head.after(out, {key: inputs[name] for name, key in of_batch.items()})

        of_batch = {"coords": "block_coords", "values": "block_sdf", "active": "active"}
        of_batch |= {} if head is None else {f"head {key}": key for key in head.inputs}
        inputs = {name: batch[key].to(self.device, non_blocking=True) for name, key in of_batch.items()}
        inputs["coords"] = inputs["coords"].int()
        kinds = tuple((rows.dtype, rows.shape[1:]) for rows in inputs.values())
        key = (kind, factor, head, kinds, *self._switches())
        size = Sizes(blocks, rows2, rows4, batch.get("window_sizes") or {})
        return self._graphs.run(
            key, size, inputs, run, weights, samples=samples, extent=extent, train=train, split=split
        )

    # -- training ---------------------------------------------------------------------------------------------------

    @on_own_device
    def forward(self, batch: Batch, head: Head | None = None) -> dict[str, Tensor | None]:
        """Encode, quantize, decode.

        Args:
            head: what to make of the result, within the recorded pass; it then takes the place of `sdf` and what comes
                with it, but for `ids` and `latent`, which then has no gradient.

        Returns:
            `sdf` float32 [M, 512] in Morton order; `ids` int64 [M]; `codebook_rows` float32 [M] or None (codebook by
            moving averages); `commitment_rows` float32 [M]; `latent` float32 [M, L], before quantization.

        Raises:
            ValueError: a head, and a batch that lists voxels instead of blocks.
        """
        if head is not None and "block_coords" not in batch:
            raise ValueError(f"a head needs a batch of blocks (block_coords, block_sdf, ...), got {', '.join(batch)}")
        out = None
        try:
            if self.training and self._may_graph() and torch.is_grad_enabled():
                out = self._through_graph("train", batch, self._train_pyramid, train=True, head=head)
            if out is None:
                out = self._train_batch(batch, head)
        except torch.OutOfMemoryError:
            if not self._graphs.reserved_bytes:
                raise
            self._graphs.refuse("a batch needed their memory")
        if out is None:  # outside the handler, which would keep what the failed pass held
            out = self._train_batch(batch, head)
        if self.training:
            self.quantizer.collect(out["latent"].detach().float(), out["ids"])
        return out if head is not None else {"codebook_rows": None, **out}

    def _train_batch(self, batch: Batch, head: Head | None) -> Rows:
        if head is None:
            return self._train_pyramid(self.build_pyramid(batch))
        keys = ("block_coords", "block_sdf", "active", *head.inputs)
        rows = {key: batch[key].to(self.device, non_blocking=True) for key in keys}
        out = self._train_pyramid(self.build_pyramid(batch | rows))
        return head.after(out, rows | {"block_coords": rows["block_coords"].int()})

    def _train_pyramid(self, pyramid: Pyramid, factor: float | None = None) -> Rows:
        latent, _ = self._encode(pyramid, factor)
        quantized = self.quantizer.quantize(latent)
        out = {
            "sdf": self._decode(quantized.values, pyramid.topology, factor),
            "ids": quantized.ids,
            "commitment_rows": quantized.commitment_rows,
            "latent": latent,
        }
        if quantized.codebook_rows is not None:
            out["codebook_rows"] = quantized.codebook_rows
        return out

    @on_own_device
    @torch.no_grad()
    def initialize_codebook(self, batches: Iterable[Batch], seed: int = 0) -> None:
        """Set the codebook by k-means over the latents of some batches (of all ranks)."""
        was_training = self.training
        self.eval()
        rows = [self._encode(self.build_pyramid(batch))[0].float() for batch in batches]
        self.train(was_training)
        if not rows:
            raise ValueError("initialize_codebook needs at least one batch")
        self.quantizer.initialize(torch.cat(rows), seed)


class _Caller(nn.Module):
    """A module's parameters as `torch.func.functional_call` wants them, for any function that uses the module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def _round_up_to_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
