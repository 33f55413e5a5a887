"""The tokens of one shape, and their files: safetensors with ids, block positions and the place in the patient."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trellis.geometry.transforms import check_to_world
from trellis.preparation.frames import SHAPE, parse_frame
from trellis.utils.blocks import LATENT_STRIDE, check_label_value, check_resolution, morton_encode
from trellis.utils.io_utils import atomic_write, open_regular

TOKEN_FORMAT_VERSION = 1
TOKEN_SUFFIX = ".safetensors"
_DTYPES = {"ids": "I32", "block_index": "I16", "to_world": "F64"}
_REQUIRED = ("format_version", "resolution", "band_voxels", "quantizer", "codebook_size", "model_hash")


@dataclass(frozen=True)
class Tokens:
    """The discrete form of one shape.

    Attributes:
        ids: int32 [M], or [M, q] for a residual quantizer of depth q; a code in [0, codebook_size) per latent voxel.
        block_index: int16 [M, 3], the latent voxels (blocks of 8-cubed voxels), axes x, y, z, in Morton order.
        to_world: float64 [4, 4], grid space [-0.5, 0.5]^3 to RAS mm; None when the shape came without.
        resolution: voxels per side of the cube.
        band_voxels: half-width of the TSDF's band in voxels.
        label, sha256: which structure this is, and the hash of the content that it was made from.
        quantizer, codebook_size: the kind of quantizer and the number of its codes.
        model_hash: `model_hash` of the model that made the tokens, the only one that can decode them.
        frame: whose cube it is, "shape", "patient" or "fixed-mm:SIZE"; a file that does not say means "shape".
        prep_hash: of the settings that the shape was prepared with; empty where that is not known.
        patient_id: as the prepared file has it (a pseudonym unless names were asked for); empty where it is not known.
        label_value: the label's number in the volume that it came from; None where there is none or it is not known.
        label_table: digest of the table that named the labels of that volume; empty without a volume or a table.
    """

    ids: np.ndarray
    block_index: np.ndarray
    to_world: np.ndarray | None
    resolution: int
    band_voxels: int
    label: str = ""
    sha256: str = ""
    quantizer: str = "vq"
    codebook_size: int = 0
    model_hash: str = ""
    frame: str = SHAPE
    prep_hash: str = ""
    patient_id: str = ""
    label_value: int | None = None
    label_table: str = ""

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        check_label_value(self.label_value)
        m = len(self.ids)
        if self.ids.dtype != np.int32 or self.ids.ndim not in (1, 2):
            raise ValueError(f"ids must be int32 [M] or [M, q], got {self.ids.dtype} {list(self.ids.shape)}")
        if self.block_index.dtype != np.int16 or self.block_index.shape != (m, 3):
            raise ValueError(
                f"block_index must be int16 [{m}, 3], got {self.block_index.dtype} {list(self.block_index.shape)}"
            )
        parse_frame(self.frame)
        if self.band_voxels < 1:
            raise ValueError(f"band_voxels must be 1 or more, got {self.band_voxels}")
        if m:
            low, high = int(self.ids.min()), int(self.ids.max())
            if low < 0 or high >= self.codebook_size:
                raise ValueError(f"ids must lie in [0, {self.codebook_size}), got [{low}, {high}]")
            side = self.resolution // LATENT_STRIDE
            low, high = int(self.block_index.min()), int(self.block_index.max())
            if low < 0 or high >= side:
                raise ValueError(f"block_index must lie in [0, {side}), got [{low}, {high}]")
            if not (np.diff(morton_encode(self.block_index)) > 0).all():
                raise ValueError("block_index must be in Morton order, each block once")
        if self.to_world is not None:
            if self.to_world.dtype != np.float64 or self.to_world.shape != (4, 4):
                raise ValueError(f"to_world must be float64 [4, 4], got {list(self.to_world.shape)}")
            check_to_world(self.to_world)

    @property
    def num_tokens(self) -> int:
        """Codes in the shape: M, or M * q."""
        return int(self.ids.size)


def save_tokens(path: str | Path, tokens: Tokens) -> None:
    """Write one token file atomically. `to_world` is left out when the shape has none."""
    from safetensors.numpy import save

    arrays = {
        "ids": np.ascontiguousarray(tokens.ids),
        "block_index": np.ascontiguousarray(tokens.block_index),
    }
    if tokens.to_world is not None:
        arrays["to_world"] = np.ascontiguousarray(tokens.to_world)
    metadata = {
        "format_version": str(TOKEN_FORMAT_VERSION),
        "resolution": str(tokens.resolution),
        "band_voxels": str(tokens.band_voxels),
        "label": tokens.label,
        "sha256": tokens.sha256,
        "quantizer": tokens.quantizer,
        "codebook_size": str(tokens.codebook_size),
        "model_hash": tokens.model_hash,
        "frame": tokens.frame,
        "prep_hash": tokens.prep_hash,
    }
    if tokens.patient_id:
        metadata["patient_id"] = tokens.patient_id
    if tokens.label_value is not None:
        metadata["label_value"] = str(tokens.label_value)
    if tokens.label_table:
        metadata["label_table"] = tokens.label_table
    data = save(arrays, metadata=metadata)
    with atomic_write(path) as stream:
        stream.write(data)


def read_token_metadata(path: str | Path) -> dict[str, str]:
    """The text fields of a token file, without reading its arrays.

    Raises:
        ValueError: not safetensors, or not a token file of a known version; names the file.
    """
    path = Path(path)
    header = _read_header(path)
    metadata = header.get("__metadata__")
    metadata = metadata if isinstance(metadata, dict) else {}
    missing = [name for name in _REQUIRED if name not in metadata]
    if missing or "ids" not in header or "block_index" not in header:
        tensors = sorted(name for name in header if name != "__metadata__")[:5]
        raise ValueError(f"{path}: a safetensors file, but not of tokens: {missing or 'ids'} missing, it has {tensors}")
    if metadata["format_version"] != str(TOKEN_FORMAT_VERSION):
        raise ValueError(
            f"{path}: token format version must be {TOKEN_FORMAT_VERSION}, got {metadata['format_version']!r}"
        )
    return {str(name): str(value) for name, value in metadata.items()}


def load_tokens(path: str | Path) -> Tokens:
    """Read and check one token file.

    Raises:
        ValueError: missing, cut short, not a token file, or with values out of range; names file, rule and value.
    """
    path = Path(path)
    metadata = read_token_metadata(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    header = _read_header(path)
    for name, wanted in _DTYPES.items():
        given = header[name].get("dtype") if isinstance(header.get(name), dict) else None
        if name in header and given != wanted:
            raise ValueError(f"{path}: {name} must have dtype {wanted}, got {given}")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a readable token file: {error}") from None
    try:
        return Tokens(
            ids=arrays["ids"],
            block_index=arrays["block_index"],
            to_world=arrays.get("to_world"),
            resolution=_integer(metadata, "resolution"),
            band_voxels=_integer(metadata, "band_voxels"),
            label=metadata.get("label", ""),
            sha256=metadata.get("sha256", ""),
            quantizer=metadata["quantizer"],
            codebook_size=_integer(metadata, "codebook_size"),
            model_hash=metadata["model_hash"],
            frame=metadata.get("frame", SHAPE),
            prep_hash=metadata.get("prep_hash", ""),
            patient_id=metadata.get("patient_id", ""),
            label_value=_integer(metadata, "label_value") if "label_value" in metadata else None,
            label_table=metadata.get("label_table", ""),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over named tensors, sorted by name: name, dtype, shape and raw bytes of each; the same on any device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _integer(metadata: Mapping[str, str], name: str) -> int:
    try:
        return int(metadata[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {metadata[name]!r}") from None


def _read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of length, then that many bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb", opener=open_regular) as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 < length <= min(size - 8, 100_000_000):
                raise ValueError(f"{path}: not a token file (safetensors): no valid header in {size} bytes")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path}: not a token file (safetensors): its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a token file (safetensors): its header is not an object")
    return header
