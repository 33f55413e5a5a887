"""SparseSDFTokenizer: a shape to tokens, and tokens back to a shape in its own millimetres, from one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trellis.models.autoencoders.split_decode import parts_within, split_decode
from trellis.modules.sparse.kernels.support import on_own_device
from trellis.pipelines.checkpoints import load_model
from trellis.pipelines.mesh_output import write_ply_tensors
from trellis.pipelines.shape_inputs import InputOptions, blocks_of_mesh
from trellis.pipelines.token_files import Tokens, load_tokens, tensors_hash
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks, c_to_morton_permutation, check_resolution
from trellis.utils.io_utils import load_sparse_sdf, write_json

NO_SURFACE = "the decoded field has no surface; there is nothing to write"

Shape = SparseSDFBlocks | str | Path | tuple[np.ndarray, np.ndarray]


class SparseSDFTokenizer:
    """Turns shapes into tokens and tokens into shapes with one trained model.

    Args:
        model: a `SparseSDFVQVAE`; put into eval mode and moved to `device`.
        resolution: the resolution that meshes are sampled at when `encode` is not told one; None: it must be told.
        device: "cpu", "cuda", "cuda:1" or a torch.device.
        compute_dtype: dtype of the network's activations; None is float32 on a CPU and float16 on CUDA. The quantizer
            always works in float32. Tokens made in float16 may differ in few codes from those made in float32.
        max_memory_gb: decode within so many GB (1e9 bytes) of the device's memory, weights included, by splitting
            shapes into parts; None: at once. The parts' values are those of the whole up to rounding. On a CPU it
            bounds the network alone. Encoding is not split: its norms run over the whole shape.

    Example:
        >>> tokenizer = SparseSDFTokenizer.from_pretrained("runs/liver")
        >>> tokens = tokenizer.encode("liver.stl")
        >>> vertices, faces = tokenizer.decode_mesh(tokens)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        resolution: int | None = None,
        device: str | torch.device = "cpu",
        compute_dtype: torch.dtype | None = None,
        max_memory_gb: float | None = None,
    ) -> None:
        if max_memory_gb is not None and not max_memory_gb > 0:
            raise ValueError(f"max_memory_gb must be above 0, got {max_memory_gb}")
        self.max_memory_gb = max_memory_gb
        self.resolution = None if resolution is None else check_resolution(resolution)
        self.device = torch.device(device)
        # Before the move and any change of dtype: the hash is of the weights as they are stored.
        self.model_hash = model_hash(model)
        self.model = model.eval().to(self.device)
        if compute_dtype is None:
            compute_dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.model.set_compute_dtype(compute_dtype)
        self._to_morton = torch.from_numpy(c_to_morton_permutation()).to(self.device)
        self._to_c_order = torch.argsort(self._to_morton)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device | None = None,
        ema: bool = True,
        resolution: int | None = None,
        compute_dtype: torch.dtype | None = None,
        max_memory_gb: float | None = None,
    ) -> SparseSDFTokenizer:
        """The tokenizer of a run folder, a checkpoint file, a published folder or a hub id.

        Args:
            source: a run folder (its newest valid checkpoint), a `.safetensors` file of a run, a folder of
                config.json and model.safetensors, or, when no such path exists, an id `owner/name` of the hub.
            device: None is "cuda" where there is one, else "cpu".
            ema: take the averaged weights of a run.
            resolution: overrides the resolution that the run was trained at.
            compute_dtype, max_memory_gb: as of the class.

        Raises:
            ValueError: nothing usable under `source`, weights that do not fit, or a device that is not there.
        """
        device = resolve_device(device)
        model, trained_at = load_model(source, ema=ema)
        resolution = resolution or trained_at
        return cls(
            model, resolution=resolution, device=device, compute_dtype=compute_dtype, max_memory_gb=max_memory_gb
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a published folder: config.json, with the resolution, and model.safetensors."""
        from trellis.models.pretrained import save_pretrained

        save_pretrained(self.model, folder)
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**config, "tokenizer": {"resolution": self.resolution}})

    @property
    def codebook_size(self) -> int:
        """Number of codes an id may take."""
        return int(self.model.quantizer.num_embeddings)

    @property
    def quantizer_name(self) -> str:
        """Kind of quantizer, as written to token files."""
        return str(getattr(self.model.quantizer, "kind", "vq"))

    def encode(
        self,
        shape: Shape,
        *,
        resolution: int | None = None,
        label: str | None = None,
        sha256: str = "",
        mesh_space: str = "LPS",
    ) -> Tokens:
        """Tokens of one shape.

        Args:
            shape: blocks; a path of a prepared `.npz` or of a mesh file; or (vertices [V, 3] RAS mm, faces [F, 3]).
            resolution: grid of a mesh; a prepared shape has its own, and this then only has to agree with it.
            label, sha256: written into the tokens; a prepared shape brings its own label.
            mesh_space: "LPS" or "RAS", the space of a mesh file that does not say.

        Raises:
            ValueError: unreadable or unsuitable input, no resolution known, a shape without a block, or latents that
                are not finite.
        """
        blocks = self.read_shape(shape, resolution=resolution, mesh_space=mesh_space)
        ids = self.encode_blocks(blocks)
        return Tokens(
            ids=ids,
            block_index=blocks.block_index,
            to_world=blocks.to_world,
            resolution=blocks.resolution,
            band_voxels=blocks.band_voxels,
            label=blocks.label if label is None else label,
            sha256=sha256,
            quantizer=self.quantizer_name,
            codebook_size=self.codebook_size,
            model_hash=self.model_hash,
            frame=blocks.frame,
            prep_hash=blocks.prep_hash,
            patient_id=blocks.patient_id,
            label_value=blocks.label_value,
        )

    def read_shape(self, shape: Shape, *, resolution: int | None = None, mesh_space: str = "LPS") -> SparseSDFBlocks:
        """The sparse SDF of whatever `encode` takes."""
        wanted = None if resolution is None else check_resolution(resolution)
        if isinstance(shape, (str, Path)) and Path(shape).suffix.lower() == ".npz":
            shape = load_sparse_sdf(shape)
        if isinstance(shape, SparseSDFBlocks):
            if wanted is not None and shape.resolution != wanted:
                raise ValueError(f"resolution {wanted} was asked for, but the prepared shape has {shape.resolution}")
            return shape
        options = InputOptions(resolution=wanted or self.resolution, mesh_space=mesh_space, device=self.device.type)
        if not isinstance(shape, (str, Path)):
            return blocks_of_mesh(*shape, options)
        from trellis.utils.mesh_utils import read_mesh

        mesh = read_mesh(shape, mesh_space=mesh_space)
        try:
            return blocks_of_mesh(mesh.vertices, mesh.faces, options)
        except ValueError as error:
            raise ValueError(f"{shape}: {error}") from None

    @torch.no_grad()  # not inference_mode: tables that are kept for later calls must serve training too
    def encode_blocks(self, blocks: SparseSDFBlocks) -> np.ndarray:
        """Codes int32 [M] (or [M, q]) of the blocks of one shape, in their order.

        Raises:
            ValueError: no block, or latents that are not finite, which any code is as near to as another.
        """
        from trellis.datasets.sparse_sdf import collate, sample_from_blocks

        if blocks.num_blocks == 0:
            raise ValueError("a shape without blocks has no tokens")
        batch = collate([sample_from_blocks(blocks)])
        found = self.model.encode(move_batch(batch, self.device))
        bad = int((~torch.isfinite(found["mean"])).any(dim=1).sum())
        if bad:
            raise ValueError(self._not_finite(bad, blocks.num_blocks))
        return found["ids"].to(torch.int32).cpu().numpy()

    def _not_finite(self, bad: int, count: int) -> str:
        dtype = str(self.model.compute_dtype).removeprefix("torch.")
        advice = "the weights or the field are not usable"
        if self.model.compute_dtype == torch.float16:
            advice = (
                "float16 ends at 65504; encode with compute_dtype=torch.float32 or torch.bfloat16 "
                "(on the command line --device cpu, which works in float32)"
            )
        return f"the latents of {bad} of {count} blocks, made in {dtype}, are not finite and have no tokens: {advice}"

    def decode(self, tokens: Tokens | str | Path) -> SparseSDFBlocks:
        """The decoded TSDF, blocks in Morton order, float16.

        Raises:
            ValueError: an unreadable file, tokens that another model made, or a memory budget that is too small.
        """
        tokens = self._checked(tokens)
        return _as_blocks(tokens, self.decode_values(tokens).cpu())

    def decode_mesh(self, tokens: Tokens | str | Path) -> tuple[np.ndarray, np.ndarray]:
        """The decoded surface: vertices float64 [V, 3], RAS mm (grid space without `to_world`), faces int64 [F, 3]."""
        vertices, faces = self._decode_surface(tokens)
        return vertices.cpu().numpy(), faces.long().cpu().numpy()

    def decode_ply(self, tokens: Tokens | str | Path, path: str | Path, *, mesh_space: str = "LPS") -> int:
        """Write the decoded surface as a binary PLY file, packed on the device; returns the number of triangles.

        Args:
            mesh_space: "LPS" or "RAS": the axes that are written, and tagged.

        Raises:
            ValueError: as `decode`, or a field without a surface.
        """
        vertices, faces = self._decode_surface(tokens)
        if not len(faces):
            raise ValueError(NO_SURFACE)
        write_ply_tensors(path, vertices, faces, mesh_space=mesh_space)
        return len(faces)

    def _decode_surface(self, tokens: Tokens | str | Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Vertices float64 [V, 3] and faces [F, 3], on the device where they were made."""
        tokens = self._checked(tokens)
        return self.surface_of(tokens, self.decode_values(tokens))

    def surface_of(self, tokens: Tokens, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The surface of block values float16 [M, 8, 8, 8] at the tokens' places; as tensors, see `decode_mesh`.

        On CUDA it is made there, unless that takes more than `max_memory_gb`; else on the CPU.
        """
        from trellis.geometry.isosurface import extract_mesh
        from trellis.geometry.isosurface_torch import ChunkSizes, extract_mesh_tensors, sizes_within

        sizes: ChunkSizes | None = None
        if values.device.type != "cpu":
            sizes = ChunkSizes()
            if self.max_memory_gb is not None:
                sizes = sizes_within(values, self.max_memory_gb * 1e9 - self._weight_bytes - values.nbytes)
        if sizes is None:
            return tuple(torch.from_numpy(part) for part in extract_mesh(_as_blocks(tokens, values.cpu())))
        return extract_mesh_tensors(
            torch.from_numpy(tokens.block_index).to(values.device),
            values,
            resolution=tokens.resolution,
            band_voxels=tokens.band_voxels,
            to_world=tokens.to_world,
            sizes=sizes,
        )

    def _checked(self, tokens: Tokens | str | Path) -> Tokens:
        """Tokens that this model made, from memory or a file."""
        if isinstance(tokens, Tokens):
            self.check(tokens)
            return tokens
        path = tokens
        tokens = load_tokens(path)
        try:
            self.check(tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return tokens

    def check(self, tokens: Tokens) -> None:
        """ValueError unless this model made the tokens."""
        if tokens.model_hash != self.model_hash:
            raise ValueError(
                f"the tokens were made by another model (its hash {tokens.model_hash[:12] or 'missing'}, this one has "
                f"{self.model_hash[:12]}); decode them with the checkpoint that encoded them"
            )

    @on_own_device
    @torch.no_grad()
    def decode_values(self, tokens: Tokens) -> torch.Tensor:
        """Block values float16 [M, 8, 8, 8] in C order, on the device; inside stays inside when they round to zero."""
        from trellis.datasets.sparse_sdf import window_sizes

        m = len(tokens.ids)
        out = torch.empty(m, STORAGE_BLOCK**3, dtype=torch.float16, device=self.device)
        ids = torch.from_numpy(tokens.ids).to(self.device, torch.int64)
        coords = torch.zeros((m, 4), dtype=torch.int32)
        coords[:, 1:] = torch.from_numpy(tokens.block_index.astype(np.int32))
        coords, model = coords.to(self.device), self.model
        if m and self.max_memory_gb is None:
            values = model.decode_blocks(
                model.quantizer.lookup(ids), coords, window_sizes=window_sizes(tokens.block_index)
            )
            out = to_float16(values)[:, self._to_c_order]
        elif m:
            budget = self.max_memory_gb * 1e9 - self._weight_bytes
            sizes = parts_within(model.decoder, m, budget, model.compute_dtype, self.device)
            given = (model.decoder, model.quantizer.lookup(ids), coords, model.compute_dtype, sizes)
            for rows, values in split_decode(*given, fused=model.fused, backend=model.backend):
                out[rows] = to_float16(values)[:, self._to_c_order]
        return out.view(m, *(STORAGE_BLOCK,) * 3)

    @property
    def _weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())


def _as_blocks(tokens: Tokens, values: torch.Tensor) -> SparseSDFBlocks:
    return SparseSDFBlocks(
        block_index=tokens.block_index,
        block_sdf=values.numpy(),
        to_world=tokens.to_world,
        resolution=tokens.resolution,
        band_voxels=tokens.band_voxels,
        label=tokens.label,
        patient_id=tokens.patient_id,
        frame=tokens.frame,
        prep_hash=tokens.prep_hash,
        label_value=tokens.label_value,
    )


def to_float16(sdf: torch.Tensor) -> torch.Tensor:
    """float16 of SDF values; a value that would round to zero keeps its sign, so that inside (v < 0) stays inside."""
    half = sdf.to(torch.float16)
    smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10
    return torch.where((half == 0) & (sdf < 0), torch.full_like(half, -smallest), half)


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 over the decoder's and codebook's tensors: what fixes the meaning of a token."""
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("decoder.", "quantizer.codebook"))
    }
    return tensors_hash(tensors)


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; lists and numbers stay, and `to_world` (float64) stays on the CPU."""
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) and key != "to_world" else value
        for key, value in batch.items()
    }


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A torch.device that is there; None picks CUDA where there is one.

    Raises:
        ValueError: an unknown device, or CUDA asked for by name on a machine without it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(device)!r} was asked for and PyTorch {torch.__version__} finds {torch.cuda.device_count()} "
            "CUDA devices here; see trellis-vqvae doctor"
        )
    return chosen
