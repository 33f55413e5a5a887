"""The public entries that take a user's file, by name; each checks what it got and returns nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def mesh(path: Path) -> None:
    from trellis.utils.mesh_utils import read_mesh

    result = read_mesh(path)
    assert result.vertices.dtype == np.float64 and np.isfinite(result.vertices).all() and len(result.faces)
    assert result.faces.min() >= 0 and result.faces.max() < len(result.vertices)


def _check_labels(volume) -> None:
    assert volume.data.ndim == 3 and volume.data.dtype.kind in "iu" and volume.data.min() >= 0
    assert np.isfinite(volume.affine).all() and np.linalg.det(volume.affine[:3, :3]) != 0


def volume(path: Path) -> None:
    from trellis.geometry.volume import read_volume

    _check_labels(read_volume(path, spacing_mm=(1, 1, 1) if path.suffix == ".npy" else None))


def layers(path: Path) -> None:
    from trellis.geometry.volume import read_label_layers

    for layer in read_label_layers(path, spacing_mm=(1, 1, 1) if path.suffix == ".npy" else None):
        _check_labels(layer)


def intensity(path: Path) -> None:
    from trellis.geometry.volume import read_intensity

    result = read_intensity(path, spacing_mm=(1, 1, 1) if path.suffix == ".npy" else None)
    assert result.data.ndim == 3 and np.isfinite(result.data).all() and np.isfinite(result.affine).all()


def sdf(path: Path) -> None:
    from trellis.utils.io_utils import load_sparse_sdf

    blocks = load_sparse_sdf(path)
    assert blocks.block_sdf.dtype == np.float16 and (np.abs(blocks.block_sdf.astype(np.float32)) <= 1).all()


def tokens(path: Path) -> None:
    from trellis.pipelines.token_files import load_tokens

    result = load_tokens(path)
    assert len(result.ids) == len(result.block_index)


def decode(path: Path) -> None:
    """Tokens decoded with a small model of fixed weights."""
    import torch

    from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    torch.manual_seed(0)
    model = SparseSDFVQVAE(model_channels=64, latent_channels=4, num_blocks=1, num_embeddings=8, resolution=32)
    SparseSDFTokenizer(model, resolution=32).decode(path)


def config(path: Path) -> None:
    from trellis.config import load_config

    load_config(path)


def weights(path: Path) -> None:
    from trellis.models.pretrained import read_state_dict

    assert read_state_dict(path)


def pretrained(path: Path) -> None:
    from trellis.models.pretrained import from_pretrained

    from_pretrained(path)


def table(path: Path) -> None:
    from trellis.geometry.label_names import read_label_names

    assert all(isinstance(value, int) and value > 0 for value in read_label_names(path))


def splits(path: Path) -> None:
    from trellis.preparation.given_splits import read_splits

    assert set(read_splits(path).values()) <= {"train", "val", "test"}


def dataset(path: Path) -> None:
    """A prepared folder, or its metadata.csv: all its samples."""
    from trellis.datasets.sparse_sdf import SparseSDF

    samples = SparseSDF(path if path.is_dir() else path.parent, resolution=32, split="all", min_points=0)
    for index in range(len(samples)):
        samples[index]


def resolution(path: Path) -> None:
    """Preparation at the resolution that the file names."""
    from trellis.preparation.prepare import prepare_dataset

    prepare_dataset(path.parent, path.parent / "out", resolutions=(int(path.read_text()),), workers=0, progress=False)


def prepare(path: Path) -> None:
    """Preparation of a folder DATA_ROOT/data into DATA_ROOT/out: failures are recorded, what is good is finished."""
    from trellis.preparation.prepare import prepare_dataset

    summary = prepare_dataset(path / "data", path / "out", resolutions=(32,), workers=0, progress=False)
    assert summary.n_shapes + summary.n_failed > 0
    expected = path / "expected_shapes"  # how many shapes must come through
    if expected.exists():
        good = sum(summary.shapes.values())
        assert good == int(expected.read_text()), (good, summary.failures)


def misbehave(path: Path) -> None:
    """What no entry may do, as the file says: for the test of the runner itself."""
    match path.read_text():
        case "shell":  # what a pickle would run
            os.system("touch escaped")
        case "home":
            (Path.home() / "escaped").mkdir()
        case "temporary":
            tempfile.mkstemp()
        case "above":
            (path.parent / "../../escaped").symlink_to("/etc/passwd")
        case "overwrite":
            path.write_text("other")
        case "delete":
            path.unlink()
        case "crash":
            os.abort()
        case "memory":
            np.ones(900 << 20, np.uint8)
        case "other error":
            raise KeyError(path.name)
        case "nameless":
            raise ValueError("it is wrong")


ENTRIES: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        mesh, volume, layers, intensity, sdf, tokens, decode, config, weights, pretrained, table, splits, dataset,
        resolution, prepare, misbehave,
    )  # fmt: skip
}
