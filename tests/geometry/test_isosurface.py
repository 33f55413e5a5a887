"""Surfaces from sparse TSDF blocks: closed on any input, accurate on analytic shapes, right sign of empty space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from trellis.geometry.block_complement import PaddedBlocks
from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.mc_table import CORNERS, EDGES, case_table
from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.geometry.surface_distance import ClosestTriangle, sample_surface
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order

Distance = Callable[[np.ndarray], np.ndarray]


def analytic_blocks(distance: Distance, resolution: int, to_world: np.ndarray | None = None) -> SparseSDFBlocks:
    """Blocks of an exact distance function on grid space, computed in float64 and stored as float16."""
    side = resolution // 8
    index = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    index = index[np.abs(distance((index * 8 + 4) / resolution - 0.5)) * resolution < 12]
    voxels = index[:, None, :] * 8 + block_voxel_offsets()
    values = np.clip(distance((voxels + 0.5) / resolution - 0.5) * resolution / 4, -1, 1)
    values = values.astype(np.float16).reshape(-1, 8, 8, 8)
    keep = (np.abs(values) < 1).any(axis=(1, 2, 3))
    order = morton_order(index[keep])
    return SparseSDFBlocks(index[keep][order].astype(np.int16), values[keep][order], to_world, resolution)


def sphere(centre, radius) -> Distance:
    return lambda p: np.linalg.norm(p - np.asarray(centre), axis=-1) - radius


def torus(centre, major, minor) -> Distance:
    def distance(p):
        q = p - np.asarray(centre)
        return np.hypot(np.hypot(q[..., 0], q[..., 1]) - major, q[..., 2]) - minor

    return distance


def capsule(a, b, radius) -> Distance:
    a, b = np.asarray(a), np.asarray(b)

    def distance(p):
        t = np.clip((p - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        return np.linalg.norm(p - a - t[..., None] * (b - a), axis=-1) - radius

    return distance


def box(centre, half) -> Distance:
    def distance(p):
        q = np.abs(p - np.asarray(centre)) - np.asarray(half)
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0)

    return distance


def assert_closed_manifold(faces: np.ndarray, num_vertices: int) -> None:
    """Each directed edge once, its reverse once; every vertex used, by a single fan of triangles."""
    if not len(faces):
        assert num_vertices == 0
        return
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    forward = np.sort(edges[:, 0] * num_vertices + edges[:, 1])
    backward = np.sort(edges[:, 1] * num_vertices + edges[:, 0])
    assert (np.diff(forward) > 0).all()
    assert np.array_equal(forward, backward)
    assert np.array_equal(np.unique(faces), np.arange(num_vertices))
    # walk each vertex's fan: from the triangle (v, a, b) to the one that starts (v, b, .); one cycle per vertex
    corner = np.concatenate([faces, faces[:, [1, 2, 0]], faces[:, [2, 0, 1]]])
    order = np.lexsort((corner[:, 1], corner[:, 0]))
    corner = corner[order]
    key = corner[:, 0] * num_vertices + corner[:, 1]
    following = np.searchsorted(key, corner[:, 0] * num_vertices + corner[:, 2])
    n = len(corner)
    graph = coo_matrix((np.ones(n), (np.arange(n), following)), shape=(n, n))
    assert connected_components(graph, directed=False)[0] == num_vertices


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def surface_samples(vertices: np.ndarray, faces: np.ndarray, count: int = 200_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    corner = vertices[faces]
    area = np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    face = rng.choice(len(faces), count, p=area / area.sum())
    weight = rng.dirichlet((1, 1, 1), count)
    return (weight[:, :, None] * corner[face]).sum(axis=1)


def test_table_cuts_the_right_edges_and_keeps_off_the_faces():
    table = case_table()
    inner_edges_seen = 0
    for case in range(256):
        inside = [bool(case >> c & 1) for c in range(8)]
        cut = set()
        for e, (axis, *base) in enumerate(EDGES.tolist()):
            a = base[0] * 4 + base[1] * 2 + base[2]
            if inside[a] != inside[a + (4, 2, 1)[axis]]:
                cut.add(e)
        triangles = table.triangles[table.triangle_start[case] : table.triangle_start[case + 1]].astype(int)
        assert set(triangles.reshape(-1).tolist()) == cut
        directed = [tuple(t[[i, (i + 1) % 3]]) for t in triangles for i in range(3)]
        assert len(set(directed)) == len(directed)
        for a, b in directed:
            on_face = any(
                EDGES[a, 0] != k and EDGES[b, 0] != k and EDGES[a, 1 + k] == EDGES[b, 1 + k] for k in range(3)
            )
            assert on_face != ((b, a) in directed)  # segments in a face once in a cell, inner edges twice
            inner_edges_seen += not on_face
    assert inner_edges_seen > 0


def test_table_is_outward_for_every_single_corner():
    table = case_table()
    middle = EDGES[:, 1:] + 0.5 * np.eye(3)[EDGES[:, 0]]
    for corner in range(8):
        for case, sign in ((1 << corner, 1), (255 - (1 << corner), -1)):
            (triangle,) = table.triangles[table.triangle_start[case] : table.triangle_start[case + 1]]
            a, b, c = middle[triangle]
            assert sign * np.cross(b - a, c - a) @ ((a + b + c) / 3 - CORNERS[corner]) > 0


@pytest.mark.parametrize(
    ("name", "resolution", "distance", "euler"),
    [
        ("sphere", 64, sphere((0.011, 0.02, -0.03), 16 / 64), 2),
        ("large sphere", 128, sphere((0.003, 0.001, -0.002), 0.475), 2),
        ("torus", 128, torus((0.001, 0.002, 0.003), 36 / 128, 16 / 128), 0),
        ("capsule", 128, capsule((-0.2, -0.13, -0.1), (0.2, 0.21, 0.17), 16 / 128), 2),
    ],
)
def test_smooth_shapes_within_hundredths_of_a_voxel(name, resolution, distance, euler):
    vertices, faces = extract_mesh(analytic_blocks(distance, resolution))
    assert_closed_manifold(faces, len(vertices))
    assert len(vertices) - len(faces) // 2 == euler
    error = distance(surface_samples(vertices, faces)) * resolution
    assert np.abs(error).mean() < 0.005
    assert np.abs(error).max() < 0.025
    assert abs(error.mean()) < 2e-4


@pytest.mark.parametrize("offset", [(0.0, 0.0, 0.0), (0.9, 0.9, 0.9), (0.2, 0.7, 0.5), (0.49, 0.51, 0.05)])
def test_edges_of_a_box_are_sharp(offset):
    resolution = 64
    half = np.array([0.3, 0.2, 0.25])
    centre = np.array(offset) / resolution - (0.02, -0.03, 0.01)
    distance = box(centre, half)
    vertices, faces = extract_mesh(analytic_blocks(distance, resolution))
    assert_closed_manifold(faces, len(vertices))
    assert len(vertices) - len(faces) // 2 == 2
    error = distance(surface_samples(vertices, faces)) * resolution
    assert np.abs(error).max() < 0.2 and np.abs(error).mean() < 0.002 and abs(error.mean()) < 1e-3
    # from the box's own edges and corners, the other way
    corners = centre + half * (2 * CORNERS - 1)
    share = np.linspace(0, 1, 200)[:, None]
    ends = [(a, b) for a in range(8) for b in range(a) if np.abs(CORNERS[a] - CORNERS[b]).sum() == 1]
    on_edges = np.concatenate([corners[a] * share + corners[b] * (1 - share) for a, b in ends])
    assert ClosestTriangle(vertices, faces).query(on_edges)[0].max() * resolution < 0.25


@pytest.mark.parametrize("first_seed", [0, 10, 20])
def test_edges_of_a_turned_box_come_back_within_half_a_voxel(first_seed):
    """Mesh to field to mesh at 64, ten random boxes each: both ways, and nothing folded over on the flat sides."""
    share = np.linspace(0, 1, 400)[:, None]
    ends = [(a, b) for a in range(8) for b in range(a) if np.abs(CORNERS[a] - CORNERS[b]).sum() == 1]
    for seed in range(first_seed, first_seed + 10):
        rng = np.random.default_rng(seed)
        half, turn = rng.uniform(4, 10, 3), np.linalg.qr(rng.standard_normal((3, 3)))[0]
        turn *= np.linalg.det(turn)
        mesh = trimesh.creation.box(2 * half)
        blocks = mesh_to_sparse_sdf(np.asarray(mesh.vertices) @ turn.T, np.asarray(mesh.faces), 64)
        vertices, faces = extract_mesh(blocks)
        assert_closed_manifold(faces, len(vertices))
        corners = half * (2 * CORNERS - 1)
        on_edges = np.concatenate([corners[a] * share + corners[b] * (1 - share) for a, b in ends])
        there = ClosestTriangle(vertices, faces).query(on_edges @ turn.T)[0] / blocks.voxel_size_mm
        assert there.max() < 0.5, f"seed {seed}: an edge of the box is {there.max():.3f} voxels from the mesh"
        points, face = sample_surface(vertices @ turn, faces, 20_000, seed=0)[:2]
        back = box((0, 0, 0), half)(points) / blocks.voxel_size_mm
        assert np.abs(back).max() < 0.5 and np.abs(back).mean() < 0.005
        # three voxels away from the box's edges, each triangle faces as its side does
        depth = np.sort((half - np.abs(points)) / blocks.voxel_size_mm, axis=1)
        flat = depth[:, 1] > 3
        side = (half - np.abs(points)).argmin(axis=1)
        corner = (vertices @ turn)[faces[face]]
        normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
        along = np.take_along_axis(normal * np.sign(points), side[:, None], axis=1)[:, 0]
        assert (along[flat] > 0.98 * np.linalg.norm(normal[flat], axis=1)).all()


def test_round_shapes_are_not_sharpened():
    blocks = analytic_blocks(sphere((0.011, 0.02, -0.03), 4 / 64), 64)
    vertices, faces = extract_mesh(blocks)
    field, _ = dense_field(blocks)
    assert len(vertices) == sum(np.count_nonzero(np.diff(field < 0, axis=axis)) for axis in range(3))
    error = (np.linalg.norm(surface_samples(vertices, faces) - (0.011, 0.02, -0.03), axis=1) - 4 / 64) * 64
    assert np.abs(error).max() < 0.1 and abs(error.mean()) < 2e-3


@pytest.mark.parametrize(("name", "resolution"), [("ball", 64), ("torus", 160), ("capsule", 160)])
def test_mesh_to_field_to_mesh(name, resolution):
    """Curvature radii of 16 voxels and more come back within hundredths of a voxel, measured against the first mesh."""
    mesh = {
        "ball": trimesh.creation.icosphere(subdivisions=6, radius=50),
        "torus": trimesh.creation.torus(60, 20, major_sections=400, minor_sections=200),
        "capsule": trimesh.creation.capsule(height=60, radius=20, count=(200, 200)),
    }[name]
    mesh.apply_transform(trimesh.transformations.rotation_matrix(0.4, (1, 2, 0.5), (300, 20, -70)))
    truth = np.array(mesh.vertices), np.array(mesh.faces)
    blocks = mesh_to_sparse_sdf(*truth, resolution)
    vertices, faces = extract_mesh(blocks)
    assert_closed_manifold(faces, len(vertices))
    surface = ClosestTriangle(*truth)
    points = sample_surface(vertices, faces, 50_000, seed=0)[0]
    distance, face = surface.query(points)
    side = np.sign(((points - truth[0][truth[1][face, 0]]) * surface.normals[face]).sum(axis=1))
    distance /= blocks.voxel_size_mm
    assert distance.mean() < 0.01 and distance.max() < 0.05 and abs((side * distance).mean()) < 0.001


def test_cavity_keeps_its_sign_and_orientation():
    def shell(p):
        r = np.linalg.norm(p - (0.01, -0.02, 0.005), axis=-1)
        return np.maximum(r - 0.44, 0.2 - r)

    vertices, faces = extract_mesh(analytic_blocks(shell, 128))
    assert_closed_manifold(faces, len(vertices))
    assert signed_volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * (0.44**3 - 0.2**3), rel=2e-4)


def test_world_frame_is_asymmetric_and_to_scale():
    to_world = np.diag([80.0, 80.0, 80.0, 1.0])
    to_world[:3, 3] = (5, -40, 300)
    distance = box((0.05, -0.1, 0.15), (0.3, 0.2, 0.1))
    blocks = analytic_blocks(distance, 64, to_world)
    vertices, faces = extract_mesh(blocks)
    voxel_mm = 80 / 64
    want = np.array([[5 - 20, -40 - 24, 300 + 4], [5 + 28, -40 + 8, 300 + 20]])
    assert np.abs(np.stack([vertices.min(axis=0), vertices.max(axis=0)]) - want).max() < 0.05 * voxel_mm
    assert signed_volume(vertices, faces) > 0
    mirrored = SparseSDFBlocks(blocks.block_index, blocks.block_sdf, np.diag([-80.0, 80, 80, 1]), 64)
    assert signed_volume(*extract_mesh(mirrored)) > 0


def noise_blocks(seed: int, resolution: int = 48) -> SparseSDFBlocks:
    """Random blocks with every awkward value: saturated, exactly zero, minus zero, smallest float16."""
    rng = np.random.default_rng(seed)
    side = resolution // 8
    count = int(rng.integers(1, side**3))
    index = np.stack(np.unravel_index(rng.choice(side**3, count, replace=False), (side,) * 3), axis=-1)
    values = rng.uniform(-1.5, 1.5, (count, 8, 8, 8)).clip(-1, 1).astype(np.float16)
    special = rng.random(values.shape) < 0.3
    values[special] = rng.choice(np.array([0, -0.0, 6e-8, -6e-8, 1e-3, -1e-3], dtype=np.float16), special.sum())
    if seed % 3 == 0:  # nearly constant, so that enclosed components take the inside
        values = np.where(rng.random(values.shape) < 0.97, -1, values).astype(np.float16)
    return SparseSDFBlocks(index.astype(np.int16), values, None, resolution)


def dense_field(blocks: SparseSDFBlocks) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: the whole grid with one voxel block of border, missing blocks signed by dense labelling; their mask."""
    side, size = blocks.resolution // 8 + 2, blocks.resolution + 16
    exists = np.zeros((side,) * 3, dtype=bool)
    exists[tuple(blocks.block_index.T + 1)] = True
    field = np.ones((size,) * 3)
    for (x, y, z), block in zip((blocks.block_index.astype(int) + 1) * 8, blocks.block_sdf):
        field[x : x + 8, y : y + 8, z : z + 8] = block
    label, count = scipy.ndimage.label(~exists)
    for number in range(1, count + 1):
        if number == label[0, 0, 0]:
            continue
        inside, total = 0, 0
        for x, y, z in np.argwhere(label == number):
            for axis, step in ((0, -1), (0, 1), (1, -1), (1, 1), (2, -1), (2, 1)):
                neighbour = [x, y, z]
                neighbour[axis] += step
                if exists[tuple(neighbour)]:
                    cut = [slice(8 * v, 8 * v + 8) for v in neighbour]
                    cut[axis] = 8 * neighbour[axis] + (7 if step < 0 else 0)
                    inside, total = inside + (field[tuple(cut)] < 0).sum(), total + 64
        if 2 * inside > total:
            field[np.kron(label == number, np.ones((8, 8, 8), dtype=bool))] = -1
    return field, ~exists


@pytest.mark.parametrize("seed", range(12))
def test_noise_is_closed_manifold_and_agrees_with_the_dense_oracle(seed):
    blocks = noise_blocks(seed)
    field, missing = dense_field(blocks)
    padded = PaddedBlocks(blocks)
    coords = np.argwhere(missing[1:-1, 1:-1, 1:-1])
    want = field[8:-8:8, 8:-8:8, 8:-8:8][tuple(coords.T)] < 0
    assert np.array_equal(padded.missing_inside(coords), want)

    vertices, faces = extract_mesh(blocks)
    assert_closed_manifold(faces, len(vertices))
    assert len(np.unique(vertices, axis=0)) == len(vertices)
    inside = field < 0
    crossings = [np.argwhere(np.diff(inside, axis=axis)) for axis in range(3)]
    middle = np.concatenate([c + 0.5 * np.eye(3)[axis] for axis, c in enumerate(crossings)])
    assert len(middle) <= len(vertices) < 1.01 * len(middle)  # those beyond are of sharp features
    # each vertex lies on its own crossing edge, but for the correction along the normal
    grid = (vertices[: len(middle)] + 0.5) * blocks.resolution - 0.5 + 8
    assert cKDTree(middle).query(grid, p=np.inf)[0].max() <= 0.5 + 0.06


@pytest.mark.parametrize("seed", range(6))
def test_distance_fields_full_of_kinks_stay_manifold(seed):
    """Voxel-exact distances to random blobs: everything is sharp, and much of it symmetric to the last bit."""
    rng = np.random.default_rng(seed)
    size = 32
    smooth = scipy.ndimage.gaussian_filter(rng.standard_normal((size,) * 3), 0.5 + 0.3 * (seed % 3))
    inside = smooth < np.quantile(smooth, 0.1 + 0.3 * (seed % 2))
    outer, inner = (scipy.ndimage.distance_transform_edt(m) for m in (~inside, inside))
    values = np.clip(np.where(inside, 0.5 - inner, outer - 0.5) / 4, -1, 1).astype(np.float16)
    split = values.reshape(4, 8, 4, 8, 4, 8).transpose(0, 2, 4, 1, 3, 5).reshape(64, 8, 8, 8)
    index = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int16)
    vertices, faces = extract_mesh(SparseSDFBlocks(index, np.ascontiguousarray(split), None, size))
    assert_closed_manifold(faces, len(vertices))
    crossings = sum(np.count_nonzero(np.diff(np.pad(inside, 1), axis=axis)) for axis in range(3))
    assert len(vertices) > 1.02 * crossings  # features were found
    for exact in (vertices, vertices.astype(np.float32)):  # as in a binary STL
        assert len(np.unique(exact, axis=0)) == len(vertices)
    assert 0 < signed_volume(vertices, faces) * size**3 < 1.1 * inside.sum()


def test_some_noise_has_an_inside_without_blocks():
    assert any(
        PaddedBlocks(noise_blocks(seed)).shell_inside.any() for seed in range(0, 12, 3)
    ), "the oracle test above would not test enclosed components"


def test_full_cube_and_nothing():
    index = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int16)
    full = SparseSDFBlocks(index, np.full((64, 8, 8, 8), -1, dtype=np.float16), None, 32)
    vertices, faces = extract_mesh(full)
    assert_closed_manifold(faces, len(vertices))
    assert signed_volume(vertices, faces) == pytest.approx(1, rel=0.002)  # closed at the cube's border
    for count in (0, 64):
        vertices, faces = extract_mesh(SparseSDFBlocks(index[:count], -full.block_sdf[:count], None, 32))
        assert vertices.shape == (0, 3) and faces.shape == (0, 3)
        assert vertices.dtype == np.float64 and faces.dtype == np.int64


def test_one_voxel_is_an_octahedron():
    values = np.ones((1, 8, 8, 8), dtype=np.float16)
    values[0, 0, 7, 3] = -1
    vertices, faces = extract_mesh(SparseSDFBlocks(np.array([[2, 1, 3]], dtype=np.int16), values, None, 32))
    assert_closed_manifold(faces, len(vertices))
    assert len(vertices) == 6 and len(faces) == 8
    assert np.allclose(vertices.mean(axis=0), (np.array([16, 15, 27]) + 0.5) / 32 - 0.5)
    assert signed_volume(vertices, faces) == pytest.approx(1 / 6 / 32**3)


def test_refuses_what_is_not_a_field():
    values = np.ones((2, 8, 8, 8), dtype=np.float16)
    index = np.array([[0, 0, 0], [1, 0, 0]], dtype=np.int16)
    broken = values.copy()
    broken[1, 2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        extract_mesh(SparseSDFBlocks(index, broken, None, 32))
    with pytest.raises(ValueError, match="twice"):
        extract_mesh(SparseSDFBlocks(index[[0, 0]], values, None, 32))
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        extract_mesh(SparseSDFBlocks(index + np.int16(3), values, None, 32))
