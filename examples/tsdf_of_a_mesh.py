"""A mesh to its sparse TSDF and back, without a network: python examples/tsdf_of_a_mesh.py liver.stl 512."""

import sys

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.metrics import evaluate_pair
from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.utils.mesh_repair import clean_mesh
from trellis.utils.mesh_utils import read_mesh


def main(path: str, resolution: str = "512") -> None:
    """Print what the TSDF holds and how far its surface lies from the mesh."""
    mesh = read_mesh(path)
    vertices, faces, report = clean_mesh(mesh.vertices, mesh.faces)
    print("repairs:", "; ".join(report.actions) or "none")

    blocks = mesh_to_sparse_sdf(vertices, faces, int(resolution))
    print(f"{blocks.num_blocks} blocks, {int(blocks.active.sum())} voxels in the band of {blocks.band_voxels} voxels")

    scores = evaluate_pair(extract_mesh(blocks), (vertices, faces), blocks.resolution)
    print(f"Dice {scores['dice']:.5f}, mean distance {scores['assd_mm']:.4f} mm, voxel {blocks.voxel_size_mm:.3f} mm")


if __name__ == "__main__":
    main(*sys.argv[1:])
