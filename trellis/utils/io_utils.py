"""Files: atomic writes, hashes, and sparse SDF npz of schema 2 and 1."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from trellis.utils.blocks import BAND_VOXELS, STORAGE_BLOCK, SparseSDFBlocks, blocks_from_voxels, morton_encode

SCHEMA_VERSION = 2
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100


_TRANSIENT = frozenset(
    getattr(errno, name) for name in (
        "EIO", "ESTALE", "ENOMEM", "EMFILE", "ENFILE", "ETIMEDOUT", "EAGAIN", "ENOSPC", "EDQUOT", "EINTR", "EBUSY",
        "ENOBUFS", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ECONNRESET", "ECONNREFUSED", "ENOTCONN",
        "EREMOTEIO", "ENOLINK",
    ) if hasattr(errno, name)
)  # fmt: skip
"""Errors of a disk, a network or a machine that is short of something, not of the file that is read."""
_NO_MEMORY = re.compile(r"bad_alloc|failed to allocate memory", flags=re.IGNORECASE)
"""What libraries in C++ say for want of memory."""


class UnreadableFile(ValueError):
    """A file that cannot be read. `public` says it without the words of a library, which may be text of the file.

    `transient` is true where the machine was at fault and not the file, so that trying again may help.
    """

    def __init__(self, message: str, public: str, transient: bool = False) -> None:
        super().__init__(message)
        self.public = public
        self.transient = transient

    def __reduce__(self) -> tuple[type[UnreadableFile], tuple[str, str, bool]]:
        return type(self), (str(self), self.public, self.transient)  # to come back whole from a worker process


def is_transient(error: BaseException) -> bool:
    """Whether an error, or one that it was raised for, is a want of memory or a fault of disk, network or machine."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        following = following.__cause__ or following.__context__
    return any(
        isinstance(one, MemoryError)
        or (isinstance(one, OSError) and one.errno in _TRANSIENT)
        or (isinstance(one, RuntimeError) and _NO_MEMORY.search(str(one)) is not None)
        for one in seen
    )


def unreadable(what: str, error: Exception, words: str) -> UnreadableFile:
    """`what: words`; the words are public if it was this package that raised `error`, else only its type is."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    own = frame is not None and str(frame.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "trellis"
    public = f"{what}: {words if own else type(error).__name__}"
    return UnreadableFile(f"{what}: {words}", public, is_transient(error))


def printable(text: str) -> str:
    """`text` with what UTF-8 cannot hold (the bytes of a file name in another encoding) written out: `\\udcfc`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Binary file that appears under `path` whole or not at all (written beside it, synced, then renamed)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def open_regular(path: str, flags: int) -> int:
    """An `opener` for open(): OSError for what is no regular file, where a pipe would wait and a device never end."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is not JSON and is refused."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sha256_of_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=open_regular) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_sparse_sdf(path: str | Path, blocks: SparseSDFBlocks, *, schema: int = SCHEMA_VERSION) -> None:
    """Write a sparse SDF npz atomically; schema 2 (blocks) or 1 (a list of active voxels)."""
    if schema == 1:
        coords, values = blocks.to_voxels()
        arrays: dict[str, Any] = {
            "sparse_sdf": values, "sparse_index": coords, "resolution": np.int64(blocks.resolution)
        }
    elif schema == SCHEMA_VERSION:
        if blocks.to_world is None:
            raise ValueError(f"{Path(path).name}: schema 2 needs to_world, and this shape has none")
        arrays = {
            "schema_version": np.int64(SCHEMA_VERSION),
            "resolution": np.int64(blocks.resolution),
            "band_voxels": np.int64(blocks.band_voxels),
            "block_index": blocks.block_index,
            "block_sdf": blocks.block_sdf,
            "to_world": blocks.to_world,
            "label": np.str_(blocks.label),
            "patient_id": np.str_(blocks.patient_id),
            "prep_hash": np.str_(blocks.prep_hash),
            "frame": np.str_(blocks.frame),
        }
        if blocks.label_value is not None:
            arrays["label_value"] = np.int64(blocks.label_value)
    else:
        raise ValueError(f"schema must be 1 or {SCHEMA_VERSION}, got {schema}")
    with atomic_write(path) as stream:
        np.savez(stream, **arrays)


def load_sparse_sdf(path: str | Path, *, convert_unsigned: bool = False) -> SparseSDFBlocks:
    """Read a sparse SDF npz of schema 2 or 1. Nothing is unpickled.

    Args:
        convert_unsigned: schema-1 files of raw unsigned distances are refused unless this is true; then the values
            are divided by the band and stay unsigned, a double shell without an inside.

    Raises:
        ValueError: the file is not a readable npz, a field is missing or malformed; names file, rule and value.
    """
    path = Path(path)
    fields = _read_fields(path)
    with _naming(path, fields):
        if "schema_version" in fields:
            return _from_schema_2(fields)
        return _from_schema_1(fields, convert_unsigned)


def load_sparse_sdf_header(path: str | Path) -> dict[str, Any]:
    """The fields of `SparseSDFBlocks`, save label and block_sdf, of an npz whose values are not read.

    A file of schema 1 holds little but values, and is read whole.

    Raises:
        ValueError: as `load_sparse_sdf`, which checks more.
    """
    path = Path(path)
    fields = _read_fields(path, (*_HEADER, "schema_version"))
    if "schema_version" not in fields:
        blocks = load_sparse_sdf(path)
        return {name: getattr(blocks, name) for name in _HEADER}
    with _naming(path, fields):
        return _header(fields)


def _read_fields(path: Path, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, only)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # damaged headers make numpy and zipfile raise anything, TokenError to RuntimeError
        raise unreadable(f"{path}: not a readable sparse SDF npz", error, _short(error)) from None


@contextmanager
def _naming(path: Path, fields: Mapping[str, np.ndarray]) -> Iterator[None]:
    """What is wrong with the fields of a file becomes a ValueError that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: field {error} is missing; fields present: {sorted(fields)[:12]}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {_short(error)}") from None


def _short(error: Exception) -> str:
    """An error's words; a damaged header may be quoted in them at length."""
    words = str(error) or type(error).__name__
    return words if len(words) <= 1000 else words[:1000] + " ..."


def read_npz(path: str | Path, only: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive, all or those of some names that are there.

    Nothing is unpickled, and no header makes it reserve more than the file holds.

    Raises:
        ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error: the file is not such an archive.
    """
    with open(path, "rb", opener=open_regular) as stream:
        if stream.read(6) == b"\x93NUMPY":
            raise ValueError("an .npz archive is needed, got a single array")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked, packed = (sum(getattr(info, name) for info in members) for name in ("file_size", "compress_size"))
        if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * packed:
            raise ValueError(f"{packed} bytes that unpack to {unpacked} are refused")
        for info in members:
            with archive.open(info) as member:
                check_npy_header(member, info.file_size, info.filename)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if only is None or name in only}


def check_npy_header(stream: IO[bytes], size: int, name: str) -> None:
    """ValueError unless a stream of `size` bytes is an array of plain numbers or text as long as its header says."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError(f"{name!r} holds pickled objects, which are never loaded: save plain numbers")
    announced = math.prod(shape) * dtype.itemsize
    if announced != size - stream.tell() or any(n < 0 for n in shape):
        raise ValueError(f"{name!r} announces {announced} bytes, shape {shape}, and holds {size - stream.tell()}")


_HEADER = (
    "block_index", "to_world", "resolution", "band_voxels", "patient_id", "prep_hash", "frame", "label_value",
)  # fmt: skip


def _header(fields: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields of `_HEADER` of a file of schema 2."""
    version = int(fields["schema_version"])
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {version}")
    return {
        "block_index": fields["block_index"],
        "to_world": fields["to_world"],
        "resolution": int(fields["resolution"]),
        "band_voxels": int(fields["band_voxels"]),
        "patient_id": str(fields.get("patient_id", "")),
        "prep_hash": str(fields.get("prep_hash", "")),
        "frame": str(fields.get("frame", "shape")),
        "label_value": int(fields["label_value"]) if "label_value" in fields else None,
    }


def _from_schema_2(fields: dict[str, np.ndarray]) -> SparseSDFBlocks:
    header = _header(fields)
    blocks = SparseSDFBlocks(block_sdf=fields["block_sdf"], label=str(fields.get("label", "")), **header)
    if not within_unit_interval(blocks.block_sdf):
        raise ValueError("block_sdf must lie in [-1, 1] without NaN")
    index = blocks.block_index
    if blocks.num_blocks and (index.min() < 0 or int(index.max()) >= blocks.resolution // STORAGE_BLOCK):
        raise ValueError(
            f"block_index must lie in [0, {blocks.resolution // STORAGE_BLOCK}), got [{index.min()}, {index.max()}]"
        )
    if (np.diff(morton_encode(index)) <= 0).any():
        raise ValueError("block_index must be in Morton order without repeats")
    if not np.isfinite(blocks.to_world).all():
        raise ValueError("to_world must be finite")
    return blocks


def within_unit_interval(values: np.ndarray) -> bool:
    """Whether every float16 of an array lies in [-1, 1] and is no NaN; by bit patterns, 20 times faster than abs()."""
    if values.size == 0:
        return True
    values = np.ascontiguousarray(values)
    # Positive halves grow with their bits read as int16, negative ones as uint16; Inf and NaN lie above 1 in both.
    return int(values.view(np.int16).max()) <= 0x3C00 and int(values.view(np.uint16).max()) <= 0xBC00


def _from_schema_1(fields: dict[str, np.ndarray], convert_unsigned: bool) -> SparseSDFBlocks:
    prefix = "sparse_sdf/" if "sparse_sdf/sparse_index" in fields else ""
    values = np.asarray(fields[f"{prefix}sparse_sdf"], dtype=np.float32).reshape(-1)
    coords = fields[f"{prefix}sparse_index"]
    resolution_key = f"{prefix}resolution" if f"{prefix}resolution" in fields else "resolution"
    resolution = int(fields[resolution_key])
    band = BAND_VOXELS / resolution
    looks_unsigned = values.size > 0 and values.min() >= 0 and values.max() <= band * (1 + 1e-3)
    if looks_unsigned and not convert_unsigned:
        raise ValueError(
            f"values lie in [{values.min():.4g}, {values.max():.4g}]: a raw unsigned distance below 4/R, not a signed "
            "TSDF in [-1, 1]; prepare the shape again, or ask for the conversion (convert_unsigned=True)"
        )
    if looks_unsigned:
        values = np.minimum(values / band, 1)
    return blocks_from_voxels(coords, values, resolution, to_world=None, band_voxels=BAND_VOXELS)
