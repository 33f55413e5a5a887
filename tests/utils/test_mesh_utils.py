"""Meshes come back from every format in RAS mm, and bad files get a clear error."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from trellis.utils.mesh_merge import merge_identical_vertices
from trellis.utils.mesh_readers import find_space_tag
from trellis.utils.mesh_utils import read_mesh, write_mesh

FORMATS = ["stl", "ply", "obj", "off", "glb"]


def lopsided_tetrahedron() -> tuple[np.ndarray, np.ndarray]:
    """A tetrahedron without any symmetry, off the origin, outward faces."""
    vertices = np.array([[10.0, 20, 30], [13, 21, 30.5], [9, 25, 31], [11, 22, 37]])
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    return vertices, faces


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def sorted_triangles(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Triangles as coordinates, each rotated to start at its smallest corner, sorted: equal for equal surfaces."""
    rows = []
    for corners in np.round(vertices[faces], 4):
        start = min(range(3), key=lambda i: tuple(corners[i]))
        rows.append(np.roll(corners, -start, axis=0).ravel())
    return np.array(sorted(map(tuple, rows)))


def assert_same_mesh(vertices, faces, other_vertices, other_faces, tolerance=1e-4):
    np.testing.assert_allclose(
        sorted_triangles(vertices, faces), sorted_triangles(other_vertices, other_faces), atol=tolerance
    )


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("space", ["LPS", "RAS"])
def test_what_is_written_comes_back_whatever_the_reader_is_told(tmp_path: Path, suffix: str, space: str):
    vertices, faces = lopsided_tetrahedron()
    assert signed_volume(vertices, faces) > 0
    path = tmp_path / f"shape.{suffix}"
    write_mesh(path, vertices, faces, mesh_space=space)
    for told in ("LPS", "RAS"):
        mesh = read_mesh(path, mesh_space=told)
        assert mesh.vertices.dtype == np.float64 and mesh.faces.dtype == np.int64
        assert len(mesh.vertices) == 4 and mesh.name == "shape"
        assert_same_mesh(mesh.vertices, mesh.faces, vertices, faces)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_independent_reader_sees_lps_numbers(tmp_path: Path, suffix: str):
    """3D Slicer's rule, with trimesh in the part of Slicer: the numbers in the file are (-x, -y, z)."""
    import trimesh

    vertices, faces = lopsided_tetrahedron()
    path = tmp_path / f"shape.{suffix}"
    write_mesh(path, vertices, faces)
    other = trimesh.load(path, process=False, force="mesh")
    assert_same_mesh(np.asarray(other.vertices), np.asarray(other.faces), vertices * [-1, -1, 1], faces)
    assert other.volume == pytest.approx(signed_volume(vertices, faces), rel=1e-5)


@pytest.mark.parametrize("suffix", ["stl", "ply", "obj", "off", "glb", "stl_ascii"])
def test_untagged_files_are_read_as_mesh_space(tmp_path: Path, suffix: str):
    import trimesh

    vertices, faces = lopsided_tetrahedron()
    path = tmp_path / f"shape.{suffix.removesuffix('_ascii')}"
    path.write_bytes(
        data if isinstance(data := trimesh.Trimesh(vertices, faces, process=False).export(file_type=suffix), bytes)
        else data.encode()
    )
    ras = read_mesh(path, mesh_space="RAS")
    lps = read_mesh(path)
    assert_same_mesh(ras.vertices, ras.faces, vertices, faces)
    assert_same_mesh(lps.vertices, lps.faces, vertices * [-1, -1, 1], faces)


def test_slicer_style_tags(tmp_path: Path):
    vertices, faces = lopsided_tetrahedron()
    lines = ["solid 3D Slicer output. SPACE=RAS"]
    for corners in vertices[faces]:
        lines += ["facet normal 0 0 0", "outer loop", *(f"vertex {x} {y} {z}" for x, y, z in corners)]
        lines += ["endloop", "endfacet"]
    path = tmp_path / "ascii.stl"
    path.write_text("\n".join([*lines, "endsolid"]))
    mesh = read_mesh(path, mesh_space="LPS")
    assert_same_mesh(mesh.vertices, mesh.faces, vertices, faces)
    assert find_space_tag(b"3D Slicer output. SPACE=LPS") == "LPS"
    assert find_space_tag(b"no tag, SPACEX=LPS") is None
    path.write_text("\n".join([*lines, "endsolid"]).replace("SPACE=RAS", "SPACE=LAS"))
    with pytest.raises(ValueError, match="ascii.stl.*LPS or RAS, got .'LAS'."):
        read_mesh(path)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("suffix", ["vtk", "vtp"])
def test_vtk_files(tmp_path: Path, suffix: str, binary: bool):
    import pyvista

    vertices, faces = lopsided_tetrahedron()
    path = tmp_path / f"shape.{suffix}"
    poly = pyvista.PolyData.from_regular_faces(vertices, faces)
    poly["scalars"] = np.arange(4.0)
    poly.add_field_data(np.arange(3), "numbers")
    poly.add_field_data(["two words", "b"], "strings")
    poly.save(path, binary=binary)
    mesh = read_mesh(path, mesh_space="RAS")
    assert_same_mesh(mesh.vertices, mesh.faces, vertices, faces)
    if suffix == "vtp":
        poly.add_field_data(["LPS"], "SPACE")
        poly.save(path)
    else:
        lines = path.read_bytes().split(b"\n")
        lines[1] = b"3D Slicer output. SPACE=LPS"
        path.write_bytes(b"\n".join(lines))
    mesh = read_mesh(path, mesh_space="RAS")
    assert_same_mesh(mesh.vertices, mesh.faces, vertices * [-1, -1, 1], faces)


def test_old_vtk_layout_and_strips(tmp_path: Path):
    path = tmp_path / "old.vtk"
    path.write_text(
        "# vtk DataFile Version 3.0\nSPACE=RAS\nASCII\nDATASET POLYDATA\nPOINTS 5 float\n0 0 0 1 0 0\n1 1 0 0 1 0\n"
        "0 2 0\nPOLYGONS 2 9\n4 0 1 2 3\n3 3 2 4\nTRIANGLE_STRIPS 1 5\n4 0 1 3 2\nPOINT_DATA 5\nwhatever\n"
    )
    np.testing.assert_array_equal(
        read_mesh(path).faces, [[0, 1, 2], [0, 2, 3], [3, 2, 4], [0, 1, 3], [2, 3, 1]]
    )
    for wrong in (("9\n", "99\n"), ("POLYGONS 2", "POLYGONS 3"), ("POINTS 5", "POINTS 5000000"), ("ASCII", "TEXT")):
        (tmp_path / "bad.vtk").write_text(path.read_text().replace(*wrong))
        with pytest.raises(ValueError, match="bad.vtk"):
            read_mesh(tmp_path / "bad.vtk")


def write_gifti(path: Path, vertices, faces, *, dataspace=0, xformspace=0, xform=None, meta=None):
    import nibabel

    coordsys = nibabel.gifti.GiftiCoordSystem(dataspace, xformspace, np.eye(4) if xform is None else xform)
    points = nibabel.gifti.GiftiDataArray(
        vertices.astype(np.float32), intent="NIFTI_INTENT_POINTSET", datatype="NIFTI_TYPE_FLOAT32", coordsys=coordsys,
        meta=nibabel.gifti.GiftiMetaData(meta or {}),
    )
    triangles = nibabel.gifti.GiftiDataArray(
        faces.astype(np.int32), intent="NIFTI_INTENT_TRIANGLE", datatype="NIFTI_TYPE_INT32"
    )
    nibabel.save(nibabel.gifti.GiftiImage(darrays=[points, triangles]), path)


def test_gifti_is_ras_and_its_transform_to_scanner_space_is_applied(tmp_path: Path):
    vertices, faces = lopsided_tetrahedron()
    path = tmp_path / "lh.white.surf.gii"
    write_gifti(path, vertices, faces)
    mesh = read_mesh(path, mesh_space="LPS")
    assert mesh.name == "lh.white"
    assert_same_mesh(mesh.vertices, mesh.faces, vertices, faces)

    mirror = np.diag([-1.0, 1, 1, 1])
    mirror[:3, 3] = [5, 6, 7]
    write_gifti(path, vertices, faces, xformspace=1, xform=mirror)
    mesh = read_mesh(path)
    assert_same_mesh(mesh.vertices, mesh.faces, vertices * [-1, 1, 1] + [5, 6, 7], faces[:, ::-1])
    assert signed_volume(mesh.vertices, mesh.faces) > 0

    write_gifti(path, vertices, faces, xformspace=4, xform=mirror)  # to MNI: another brain's space
    assert_same_mesh(*[(m := read_mesh(path)).vertices, m.faces], vertices, faces)

    write_gifti(path, vertices, faces, meta={"VolGeomC_R": "1.5", "VolGeomC_A": "-2", "VolGeomC_S": "3"})
    assert_same_mesh(*[(m := read_mesh(path)).vertices, m.faces], vertices + [1.5, -2, 3], faces)


def test_gifti_bomb_is_refused(tmp_path: Path):
    import re
    import zlib

    vertices, faces = lopsided_tetrahedron()
    path = tmp_path / "a.gii"
    write_gifti(path, vertices, faces)
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000)))
    path.write_bytes(re.sub(rb"<Data>[^<]*</Data>", b"<Data>" + bomb + b"</Data>", path.read_bytes(), count=1))
    with pytest.raises(ValueError, match="a.gii.*unpacks to more than the 96 bytes"):
        read_mesh(path)


def test_freesurfer_surfaces_get_c_ras(tmp_path: Path, caplog):
    import nibabel

    vertices, faces = lopsided_tetrahedron()
    info = {
        "head": np.array([2, 0, 20]), "valid": "1  # volume info valid", "filename": "x.mgz",
        "volume": np.array([256, 256, 256]), "voxelsize": np.ones(3), "xras": np.array([-1.0, 0, 0]),
        "yras": np.array([0.0, 0, -1]), "zras": np.array([0.0, 1, 0]), "cras": np.array([4.0, -5, 6.5]),
    }
    path = tmp_path / "lh.pial"
    nibabel.freesurfer.write_geometry(str(path), vertices, faces, volume_info=info)
    mesh = read_mesh(path)
    assert_same_mesh(mesh.vertices, mesh.faces, vertices + [4, -5, 6.5], faces)
    nibabel.freesurfer.write_geometry(str(path), vertices, faces)
    mesh = read_mesh(path)
    assert_same_mesh(mesh.vertices, mesh.faces, vertices, faces)
    assert "c_ras" in caplog.text
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="lh.pial.*truncated"):
        read_mesh(path)


def test_quads_and_polygons_become_triangles(tmp_path: Path):
    path = tmp_path / "quad.obj"
    path.write_text("# SPACE=RAS\nv 0 0 0\nv 2 0 0\nv 2 1 0\nv 0 1 0\nf 1/1/1 2/2/2 3//3 4\n")
    mesh = read_mesh(path)
    assert mesh.faces.shape == (2, 3)
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    assert np.cross(b - a, c - a).sum(axis=0) == pytest.approx([0, 0, 4])


def test_ply_of_mixed_polygons_and_extra_properties(tmp_path: Path):
    corners = [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0], [1, 2, 0]]
    polygons = [[0, 1, 2, 3], [3, 2, 4]]
    head = (
        "ply\nformat {} 1.0\ncomment 3D Slicer output. SPACE=RAS\nelement vertex 5\nproperty uchar red\n"
        "property double x\nproperty double y\nproperty float z\nelement face 2\nproperty float quality\n"
        "property list uchar int vertex_index\nproperty list uchar float uv\nend_header\n"
    )
    text = "".join(f"7 {x} {y} {z}\n" for x, y, z in corners)
    text += "".join(f"0.5 {len(p)} {' '.join(map(str, p))} 2 0.25 0.75\n" for p in polygons)
    big = b"".join(struct.pack(">Bddf", 7, *c) for c in corners)
    big += b"".join(struct.pack(f">fB{len(p)}iBff", 0.5, len(p), *p, 2, 0.25, 0.75) for p in polygons)
    for name, data in (("ascii", text.encode()), ("binary_big_endian", big)):
        path = tmp_path / f"{name}.ply"
        path.write_bytes(head.format(name).encode() + data)
        mesh = read_mesh(path)
        np.testing.assert_array_equal(mesh.vertices, corners)
        np.testing.assert_array_equal(mesh.faces, [[0, 1, 2], [0, 2, 3], [3, 2, 4]])
        path.write_bytes(head.format(name).encode() + data[:-20])
        with pytest.raises(ValueError, match="truncated|too short"):
            read_mesh(path)


def test_obj_relative_indices(tmp_path: Path):
    path = tmp_path / "relative.obj"
    path.write_text("#SPACE=RAS\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf -3 -2 -1\nv 0 0 5\nf -4 -1 \\\n-3\n")
    np.testing.assert_array_equal(read_mesh(path).faces, [[0, 1, 2], [0, 3, 1]])


def test_gltf_node_transforms_are_applied(tmp_path: Path):
    vertices, faces = lopsided_tetrahedron()
    blob = vertices.astype("<f4").tobytes() + faces.astype("<u4").tobytes()
    document = {
        "asset": {"version": "2.0", "extras": {"SPACE": "RAS"}}, "scene": 0, "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "translation": [100, 0, 0]}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(blob), "uri": "data:application/octet-stream;base64," +
                     base64.b64encode(blob).decode()}],
        "bufferViews": [{"buffer": 0, "byteOffset": 0, "byteLength": 48}, {"buffer": 0, "byteOffset": 48,
                                                                            "byteLength": 48}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"},
                      {"bufferView": 1, "componentType": 5125, "count": 12, "type": "SCALAR"}],
    }
    path = tmp_path / "scene.gltf"
    path.write_text(json.dumps(document))
    mesh = read_mesh(path)
    assert_same_mesh(mesh.vertices, mesh.faces, vertices + [100, 0, 0], faces)


def test_merge_identical_vertices_merges_exact_duplicates_only():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3)).astype(np.float32)
    soup = points[rng.integers(0, 50, size=(200, 3))]
    soup[0, 0] = [0.0, -0.0, 1.0]
    soup[1, 0] = [-0.0, 0.0, 1.0]
    flat = soup.reshape(-1, 3)
    for dtype in (np.float32, np.float64):
        vertices, faces = merge_identical_vertices(flat.astype(dtype), np.arange(600).reshape(-1, 3))
        np.testing.assert_array_equal(vertices[faces], soup)
        assert len(np.unique(vertices, axis=0)) == len(vertices)
        assert faces[0, 0] == faces[1, 0] == 0
    near = np.array([[0, 0, 0], [np.nextafter(np.float32(1), 2), 0, 0], [1, 0, 0]], dtype=np.float32)
    assert len(merge_identical_vertices(near, np.arange(3)[None])[0]) == 3


def bad_files() -> dict[str, tuple[str, bytes, str]]:
    vertices, faces = lopsided_tetrahedron()
    triangle = struct.pack("<12fH", *([0.0] * 12), 0)
    header = b"x".ljust(80)
    ply = (
        b"ply\nformat binary_little_endian 1.0\nelement vertex %d\nproperty float x\nproperty float y\n"
        b"property float z\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n"
    )
    nan_obj = "".join(f"v {x} {y} nan\n" for x, y, _ in vertices) + "f 1 2 3\n"
    return {
        "empty stl": ("a.stl", b"", "a.stl.*empty"),
        "stl of no triangles": ("a.stl", header + struct.pack("<I", 0), "no triangles"),
        "ascii stl of no triangles": ("a.stl", b"solid x\nendsolid x\n", "no triangles"),
        "truncated stl": ("a.stl", header + struct.pack("<I", 2) + triangle, "announces 2 triangles, 184 bytes.*134"),
        "stl with an absurd count": ("a.stl", header + struct.pack("<I", 2**32 - 1) + triangle, "4294967295"),
        "stl of 20 bytes": ("a.stl", b"y" * 20, "at least 84 bytes, got 20"),
        "truncated ascii stl": ("a.stl", b"solid x\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n", "truncated"),
        "words for numbers": ("a.stl", b"solid x\n" + b"vertex a b c\n" * 3 + b"endfacet\nendsolid", "a.stl"),
        "ply with an absurd count": ("a.ply", ply % 10**15 + bytes(40), "1000000000000000 rows"),
        "ply cut off": ("a.ply", ply % 4 + bytes(20), "a.ply"),
        "ply of a text": ("a.ply", b"hello", "starts with 'ply'"),
        "nan vertices": ("a.obj", nan_obj.encode(), "4 of 4 with NaN"),
        "index out of range": ("a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "a.off"),
        "points only": ("a.obj", b"v 0 0 0\nv 1 0 0\n", "a.obj"),
        "glb cut off": ("a.glb", struct.pack("<4sII", b"glTF", 2, 1000) + bytes(40), "1000 bytes.*52"),
        "glb of a text": ("a.glb", b"hello", "starts with 'glTF'"),
        "gltf not json": ("a.gltf", b"{", "a.gltf"),
        "gifti not xml": ("a.gii", b"not xml", "a.gii"),
        "gifti bad gzip": ("a.gii.gz", b"not gzip", "a.gii.gz"),
        "vtk of a text": ("a.vtk", b"hello", "vtk DataFile"),
        "unknown suffix": ("a.xyz", b"hello", r"no mesh reader for '.xyz'; known: .gii, .*\.vtp"),
        "no suffix": ("mesh", b"hello", "file without suffix"),
    }


@pytest.mark.parametrize("case", bad_files())
def test_bad_files_get_a_clear_error(tmp_path: Path, case: str):
    name, data, message = bad_files()[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_mesh(tmp_path / name)


def test_gltf_buffers_outside_its_folder_are_refused(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(96))
    document = {"asset": {"version": "2.0"}, "buffers": [{"byteLength": 96, "uri": "../secret.bin"}]}
    (tmp_path / "in" / "a.gltf").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="a.gltf"):
        read_mesh(tmp_path / "in" / "a.gltf")


def test_bad_arguments(tmp_path: Path):
    vertices, faces = lopsided_tetrahedron()
    with pytest.raises(ValueError, match="no such file"):
        read_mesh(tmp_path / "absent.stl")
    with pytest.raises(ValueError, match="mesh_space must be one of.*'XYZ'"):
        read_mesh(tmp_path / "absent.stl", mesh_space="XYZ")
    with pytest.raises(ValueError, match="no mesh writer for '.vtk'"):
        write_mesh(tmp_path / "a.vtk", vertices, faces)
    with pytest.raises(ValueError, match="finite"):
        write_mesh(tmp_path / "a.stl", vertices * np.nan, faces)
    with pytest.raises(ValueError, match="0 to 3, got up to 4"):
        write_mesh(tmp_path / "a.stl", vertices, faces + 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_empty_mesh_can_be_written_and_is_refused_on_reading(tmp_path: Path, suffix: str):
    path = tmp_path / f"empty.{suffix}"
    write_mesh(path, np.zeros((0, 3)), np.zeros((0, 3), dtype=int))
    with pytest.raises(ValueError, match="empty"):
        read_mesh(path)
