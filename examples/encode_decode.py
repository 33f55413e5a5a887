"""A mesh to tokens and back, in the patient's millimetres: python examples/encode_decode.py RUN liver.stl OUT."""

import sys
from pathlib import Path

from trellis.pipelines.token_files import load_tokens, save_tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer
from trellis.utils.mesh_utils import write_mesh


def main(checkpoint: str, mesh: str, out: str) -> None:
    """Write OUT/shape.safetensors and OUT/shape.stl, and say how large the shape is as tokens."""
    tokenizer = SparseSDFTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer.encode(mesh, label=Path(mesh).stem)
    save_tokens(Path(out) / "shape.safetensors", tokens)
    print(f"{tokens.num_tokens} codes from a codebook of {tokens.codebook_size}")

    vertices, faces = tokenizer.decode_mesh(load_tokens(Path(out) / "shape.safetensors"))
    write_mesh(Path(out) / "shape.stl", vertices, faces)


if __name__ == "__main__":
    main(*sys.argv[1:])
