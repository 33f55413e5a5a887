"""VTP files in every encoding that VTK writes, read without it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from trellis.utils.mesh_utils import read_mesh


@pytest.mark.parametrize("points", [60, 9000])  # 9,000 points take several packed blocks
def test_every_encoding_of_vtk(tmp_path: Path, points: int):
    import pyvista
    import vtk

    side = int(points**0.5)
    ball = pyvista.Sphere(radius=7, center=(1, 2, 3), theta_resolution=side, phi_resolution=side)
    whole = [("None", 32, 0), ("ZLib", 64, 1)] if points > 100 else product(("None", "ZLib", "LZMA"), (32, 64), (0, 1))
    for (compressor, head, order), mode, text in product(whole, (0, 1, 2), (0, 1)):
        for mesh in (ball, ball.strip()) if points < 100 else (ball,):
            writer = vtk.vtkXMLPolyDataWriter()
            writer.SetFileName(str(tmp_path / "a.vtp"))
            writer.SetInputData(mesh)
            writer.SetDataMode(mode)
            writer.SetEncodeAppendedData(text)
            getattr(writer, f"SetCompressorTypeTo{compressor}")()
            getattr(writer, f"SetHeaderTypeToUInt{head}")()
            writer.SetByteOrder(order)
            writer.Write()
            found = read_mesh(tmp_path / "a.vtp", mesh_space="RAS")
            expected = mesh.triangulate()
            np.testing.assert_allclose(found.vertices, expected.points, atol=1e-5)
            triangles = np.sort(expected.faces.reshape(-1, 4)[:, 1:], axis=1)
            faces = np.sort(found.faces, axis=1)
            np.testing.assert_array_equal(faces[np.lexsort(faces.T)], triangles[np.lexsort(triangles.T)])
            corners = found.vertices[found.faces] - [1, 2, 3]
            volumes = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))
            assert (volumes > 0).all(), "all faces point outward"


def test_what_is_refused(tmp_path: Path):
    path = tmp_path / "a.vtp"
    head = b'<VTKFile type="PolyData"><PolyData><Piece NumberOfPoints="%s" NumberOfPolys="1">'
    points = b'<Points><DataArray type="%s" format="%s">0 0 0 1 0 0 0 1 0</DataArray></Points>'
    end = b"</Piece></PolyData></VTKFile>"
    for data, words in (
        (b"<VTKFile><ImageData/></VTKFile>", "a surface is needed"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]><VTKFile/>', "document type"),
        (head % b"4" + points % (b"Float32", b"ascii") + end, "4 points need 12 numbers, got 9"),
        (head % b"-1" + end, "NumberOfPoints must be a whole number, got '-1'"),
        (head % b"3" + points % (b"Float16", b"ascii") + end, "unknown type 'Float16'"),
        (head % b"3" + points % (b"Float32", b"morse") + end, "unknown format 'morse'"),
        (head % b"3" + points % (b"Float32", b"ascii") + b"<Polys/>" + end, "connectivity and offsets"),
        (b"<VTKFile>", "not well-formed"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words) as caught:
            read_mesh(path)
        assert "a.vtp" in str(caught.value)
