"""Fixtures of the pipelines' tests: a shape, a small model with a codebook made from data, a tokenizer, a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline_shapes import ellipsoid_blocks, small_model, write_run

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.pipelines.tokenizer import SparseSDFTokenizer
from trellis.utils.blocks import SparseSDFBlocks


@pytest.fixture(scope="session")
def blocks() -> SparseSDFBlocks:
    return ellipsoid_blocks()


@pytest.fixture(scope="session")
def model(blocks) -> SparseSDFVQVAE:
    from trellis.datasets.sparse_sdf import collate, sample_from_blocks

    model = small_model()
    other = ellipsoid_blocks(axes=(0.2, 0.475, 0.35))
    model.initialize_codebook([collate([sample_from_blocks(b) for b in (blocks, other)])], seed=0)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer(model) -> SparseSDFTokenizer:
    return SparseSDFTokenizer(model, resolution=32)


@pytest.fixture
def run_folder(tmp_path, model) -> Path:
    return write_run(tmp_path / "run", model)
