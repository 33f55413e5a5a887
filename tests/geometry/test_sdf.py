"""Mesh -> sparse TSDF against a float64 brute-force oracle on the same mesh and against analytic shapes."""

import numpy as np
import pytest
import trimesh
from sdf_oracle import IN_BAND_TOLERANCE, SIGN_TOLERANCE, assert_matches, block_voxels, oracle_distance, oracle_winding

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.geometry.transforms import (
    check_to_world,
    grid_to_world,
    normalising_transform,
    voxel_centres,
    world_to_grid,
)
from trellis.utils.blocks import BlockLookup, morton_encode
from trellis.utils.mesh_repair import clean_mesh


def active_in_truth(distance, band):
    return np.abs((distance / band).clip(max=2).astype(np.float16)) < 1


def check_against_oracle(vertices, faces, resolution, *, sample=None, band=4, **options):
    """Values of all block voxels and the block list of the whole grid; or of a sample, and blocks at voxels near."""
    blocks = mesh_to_sparse_sdf(vertices, faces, resolution, band_voxels=band, **options)
    v = world_to_grid(vertices, blocks.to_world)
    if sample is None:
        coords, values = block_voxels(blocks)
        grid = np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3)
        distance = oracle_distance(voxel_centres(grid, resolution), v, faces) * resolution
        needed = np.unique(morton_encode(grid[active_in_truth(distance, band)] // 8))
        assert np.array_equal(needed, morton_encode(blocks.block_index.astype(np.int64)))
        distance = distance[np.ravel_multi_index(coords.T, (resolution,) * 3)]
    else:
        rng = np.random.default_rng(0)
        coords, values = block_voxels(blocks, rng.choice(blocks.num_blocks * 512, sample, replace=False))
        distance = oracle_distance(voxel_centres(coords, resolution), v, faces) * resolution
        on_surface = np.einsum("nk,nkj->nj", rng.dirichlet([1, 1, 1], sample), v[rng.choice(faces, sample)])
        near = np.floor((on_surface + 0.5) * resolution + rng.uniform(-band, band, (sample, 3))).astype(np.int64)
        near = near[((near >= 0) & (near < resolution)).all(axis=1)]
        needed = active_in_truth(oracle_distance(voxel_centres(near, resolution), v, faces) * resolution, band)
        assert needed.any() and (BlockLookup(blocks.block_index).find(near[needed] // 8) >= 0).all()
    inside = oracle_winding(voxel_centres(coords, resolution), v, faces) > 0.5
    assert_matches(coords, values, distance, inside, band)
    assert (values < 0).any() and (values > 0).any()
    return blocks


def asymmetric_blob(subdivisions=2):
    """A closed surface without any symmetry, so that a swapped or flipped axis fails."""
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    v = mesh.vertices
    radius = 1 + 0.25 * np.sin(2 * v[:, 0] + 1) + 0.2 * np.cos(3 * v[:, 1]) * v[:, 2] + 0.15 * v[:, 2]
    return np.asarray(v * radius[:, None] * [30, 18, 11] + [5, -70, 400]), np.asarray(mesh.faces)


@pytest.mark.parametrize("resolution", [32, 40, 64])
def test_every_voxel_and_the_block_list_match_the_oracle(resolution):
    vertices, faces = asymmetric_blob(1)
    blocks = check_against_oracle(vertices, faces, resolution)
    keys = morton_encode(blocks.block_index.astype(np.int64))
    assert (np.diff(keys) > 0).all(), "blocks must be in Morton order, without duplicates"


@pytest.mark.parametrize("band", [1, 7])
def test_other_bands_match_the_oracle(band):
    vertices, faces = asymmetric_blob(1)
    check_against_oracle(vertices, faces, 32, band=band)


@pytest.mark.parametrize(
    "mesh",
    [
        trimesh.creation.torus(1.0, 0.3, major_sections=24, minor_sections=12),
        trimesh.creation.capsule(height=2.0, radius=0.5, count=[12, 12]),
        trimesh.creation.box([1.0, 0.02, 0.3]),
        trimesh.creation.cone(radius=0.3, height=4.0, sections=7),
        trimesh.creation.annulus(r_min=0.9, r_max=0.905, height=0.7, sections=20),
    ],
    ids=["torus", "capsule", "sheet", "needle", "thin ring"],
)
def test_shapes_match_the_oracle(mesh):
    vertices = np.asarray(mesh.vertices) @ trimesh.transformations.rotation_matrix(0.7, [1, 2, 3])[:3, :3].T
    check_against_oracle(vertices, np.asarray(mesh.faces), 64, sample=3000)
    check_against_oracle(vertices, np.asarray(mesh.faces), 128, sample=3000)


@pytest.mark.parametrize("resolution", [64, 192])
def test_many_triangles_per_voxel_and_few(resolution):
    """At 64 cells go through closest-point queries, at 192 through triangle lists; both must hold."""
    vertices, faces = asymmetric_blob(5)
    check_against_oracle(vertices, faces, resolution, sample=150)


@pytest.mark.parametrize("resolution", [512, 1024])
def test_high_resolutions_match_the_oracle(resolution):
    mesh = trimesh.creation.torus(1.0, 0.3, major_sections=24, minor_sections=12)
    vertices = np.asarray(mesh.vertices) @ trimesh.transformations.rotation_matrix(0.7, [1, 2, 3])[:3, :3].T
    check_against_oracle(vertices, np.asarray(mesh.faces), resolution, sample=4000)


@pytest.mark.parametrize("resolution", [64, 128, 512])
def test_box_is_exact_everywhere(resolution):
    mesh = trimesh.creation.box([20.0, 10.0, 5.0])
    blocks = mesh_to_sparse_sdf(mesh.vertices, mesh.faces, resolution)
    half = np.array([20.0, 10.0, 5.0]) / 20 * 0.95 / 2
    rows = np.arange(blocks.num_blocks * 512)
    for part in np.array_split(rows, 1 + len(rows) // 2**20):
        coords, values = block_voxels(blocks, part)
        q = np.abs(voxel_centres(coords, resolution)) - half
        outside = np.sqrt((np.maximum(q, 0) ** 2).sum(-1))
        signed = (outside + np.minimum(q.max(-1), 0)) * resolution
        assert_matches(coords, values, np.abs(signed), signed < 0)


def torus_distance(p):
    return np.hypot(np.hypot(p[:, 0], p[:, 1]) - 1.0, p[:, 2]) - 0.4


def capsule_distance(p):
    return np.linalg.norm(p - np.clip(p, [0, 0, -1], [0, 0, 1]), axis=1) - 0.5


def capsule_mesh():
    mesh = trimesh.creation.capsule(height=2.0, radius=0.5, count=[800, 800])
    mesh.vertices -= mesh.bounds.mean(axis=0)
    return mesh


@pytest.mark.parametrize(
    ("mesh", "signed"),
    [
        (lambda: trimesh.creation.icosphere(subdivisions=7), lambda p: np.linalg.norm(p, axis=1) - 1),
        (lambda: trimesh.creation.torus(1.0, 0.4, major_sections=800, minor_sections=400), torus_distance),
        (capsule_mesh, capsule_distance),
    ],
    ids=["sphere", "torus", "capsule"],
)
def test_fine_meshes_match_the_analytic_distance(mesh, signed):
    """Every voxel of every block, and no block missing; the meshes themselves are off by at most 0.0005 voxel."""
    resolution = 64
    mesh = mesh()
    blocks = mesh_to_sparse_sdf(mesh.vertices, mesh.faces, resolution)

    def expected_at(coords):
        return signed(grid_to_world(voxel_centres(coords, resolution), blocks.to_world)) / blocks.to_world[0, 0] * 64

    coords, values = block_voxels(blocks)
    expected = expected_at(coords)
    assert np.abs(values * 4 - np.clip(expected, -4, 4)).max() < IN_BAND_TOLERANCE
    assert ((values < 0) == (expected < 0))[np.abs(expected) > SIGN_TOLERANCE].all()
    grid = np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3)
    needed = grid[np.abs(expected_at(grid)) < 4 - IN_BAND_TOLERANCE]
    assert (BlockLookup(blocks.block_index).find(needed // 8) >= 0).all()


def test_nested_shell_is_a_cavity_and_self_intersection_is_filled():
    outer, inner = trimesh.creation.icosphere(2), trimesh.creation.icosphere(2, radius=0.6)
    inner.invert()
    shell = trimesh.util.concatenate([outer, inner])
    check_against_oracle(np.asarray(shell.vertices), np.asarray(shell.faces), 48, sample=2000)
    # A tube along a nodal cubic passes through itself: winding number 2 there, still inside.
    tube = trimesh.creation.capsule(height=3.0, radius=0.15, count=[10, 10])
    v, faces = trimesh.remesh.subdivide_to_size(tube.vertices, tube.faces, 0.5)
    t = (v[:, 2] - v[:, 2].mean()) * 0.8
    along = np.column_stack([2 * t, 3 * t**2 - 1]) / np.hypot(2 * t, 3 * t**2 - 1)[:, None]
    curve = np.column_stack([t**2 - 1, t * (t**2 - 1)])
    crossed = np.column_stack([curve + v[:, :1] * np.column_stack([-along[:, 1], along[:, 0]]), v[:, 1]])
    if trimesh.Trimesh(crossed, faces, process=False).volume < 0:
        faces = faces[:, ::-1]
    blocks = check_against_oracle(crossed, faces, 64, sample=600)
    coords, _ = block_voxels(blocks)
    points = voxel_centres(coords[::50], 64)
    assert oracle_winding(points, world_to_grid(crossed, blocks.to_world), faces).max() > 1.5


def test_scale_and_translation_do_not_matter():
    vertices, faces = asymmetric_blob(3)
    first = mesh_to_sparse_sdf(vertices, faces, 64)
    for scale, offset in ((2.0**-30, 0.0), (2.0**40, 0.0), (1.0, 512.0)):
        other = mesh_to_sparse_sdf(vertices * scale + offset, faces, 64)
        assert np.array_equal(first.block_index, other.block_index)
        difference = np.abs(first.block_sdf.astype(np.float32) - other.block_sdf.astype(np.float32))
        assert difference.max() < 0.001
        moved = grid_to_world(np.zeros((1, 3)), first.to_world) * scale + offset
        assert np.allclose(moved, grid_to_world(np.zeros((1, 3)), other.to_world), rtol=1e-12)


def test_symmetric_mesh_on_voxel_planes_has_right_signs():
    """Lines of voxels run through vertices, edges and faces; the surface lies on voxel centres."""
    resolution = 32
    to_world = np.eye(4)
    box = trimesh.creation.box([16 / resolution] * 3)
    v = np.asarray(box.vertices) + 0.5 / resolution
    blocks = mesh_to_sparse_sdf(v, box.faces, resolution, to_world=to_world)
    coords, values = block_voxels(blocks)
    signed = (np.abs(voxel_centres(coords, resolution) - 0.5 / resolution).max(-1) - 8 / resolution) * resolution
    assert ((values < 0) == (signed < 0))[np.abs(signed) > SIGN_TOLERANCE].all()
    assert (np.abs(values[np.abs(signed) < 1e-9]) < 1e-6).all()
    corners = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]) * 0.25 + 0.5 / resolution
    upper = np.array([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4]])
    lower = np.where(upper == 4, 5, upper)[:, ::-1]
    check_against_oracle(corners, np.concatenate([upper, lower]), 32, to_world=to_world)


def test_unmerged_vertices_degenerate_and_unused_ones_change_nothing():
    vertices, faces = asymmetric_blob(2)
    first = mesh_to_sparse_sdf(vertices, faces, 64)
    soup = vertices[faces].reshape(-1, 3)
    soup_faces = np.arange(len(soup)).reshape(-1, 3)
    extra = np.concatenate([soup, [[1e5, 0, 0]]])
    flat = np.concatenate([soup_faces, [[0, 0, 1], [2, 2, 2]]])
    other = mesh_to_sparse_sdf(extra, flat, 64)
    assert np.array_equal(first.block_index, other.block_index)
    assert np.array_equal(first.block_sdf, other.block_sdf)


def test_caller_fixes_the_frame():
    vertices, faces = asymmetric_blob(2)
    to_world = np.eye(4) * 200
    to_world[:3, 3] = [0, -60, 390]
    to_world[3, 3] = 1
    blocks = check_against_oracle(vertices, faces, 64, sample=2000, to_world=to_world)
    assert np.array_equal(blocks.to_world, to_world)
    to_world[:3, 3] = [90, -60, 390]
    with pytest.raises(ValueError, match="must lie in the cube"):
        mesh_to_sparse_sdf(vertices, faces, 64, to_world=to_world)
    with pytest.raises(ValueError, match="uniform positive scale"):
        mesh_to_sparse_sdf(vertices, faces, 64, to_world=np.diag([1.0, 2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="uniform positive scale"):
        check_to_world(np.diag([-1.0, -1.0, -1.0, 1.0]))


def test_the_normalised_box_is_centred_with_longest_side_095():
    vertices, _ = asymmetric_blob(2)
    grid = world_to_grid(vertices, normalising_transform(vertices))
    assert np.isclose(np.ptp(grid, axis=0).max(), 0.95)
    assert np.allclose(grid.min(0), -grid.max(0))


def test_winding_sign_serves_open_surfaces_when_asked():
    sphere = trimesh.creation.icosphere(3)
    faces = np.asarray(sphere.faces)[np.asarray(sphere.triangles_center)[:, 2] < 0.97]
    vertices = np.asarray(sphere.vertices)
    with pytest.raises(ValueError, match="closed.*clean_mesh"):
        mesh_to_sparse_sdf(vertices, faces, 32)
    blocks = mesh_to_sparse_sdf(vertices, faces, 32, sign_method="winding")
    coords, values = block_voxels(blocks)
    world = grid_to_world(voxel_centres(coords, 32), blocks.to_world)
    radius = np.linalg.norm(world, axis=1)
    clear = (np.abs(radius - 1) > 0.05) & (world[:, 2] < 0.8)
    assert ((values < 0) == (radius < 1))[clear].all()


@pytest.mark.slow
def test_two_million_triangles():
    """Cleaned and sampled at 64, hundreds of triangles a voxel of the surface, against the torus itself."""
    mesh = trimesh.creation.torus(1.0, 0.4, major_sections=1430, minor_sections=700)
    assert len(mesh.faces) == 2_002_000
    vertices, faces = clean_mesh(np.asarray(mesh.vertices), np.asarray(mesh.faces))[:2]
    assert len(faces) == len(mesh.faces), "nothing to repair"
    blocks = mesh_to_sparse_sdf(vertices, faces, 64)
    coords, values = block_voxels(blocks)
    p = grid_to_world(voxel_centres(coords, 64), blocks.to_world)
    expected = torus_distance(p) / blocks.to_world[0, 0] * 64
    assert np.abs(values * 4 - np.clip(expected, -4, 4)).max() < IN_BAND_TOLERANCE
    assert ((values < 0) == (expected < 0))[np.abs(expected) > SIGN_TOLERANCE].all()


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_plate_between_voxel_centres_has_no_inside_and_says_so(shift, caplog):
    """A plate of 0.2 voxels: between the centres its field and mesh warn, across them it has an inside."""
    resolution = 64
    plate = trimesh.creation.box([0.8, 0.6, 0.2 / resolution])
    # centres lie at half voxels from the cube's middle: the plate there touches none, moved by 0.5 it holds a layer
    for offset, hollow in ((shift, True), (0.5, False)):
        caplog.clear()
        vertices = np.asarray(plate.vertices) + [0.0, 0.0, offset / resolution]
        blocks = mesh_to_sparse_sdf(vertices, plate.faces, resolution, to_world=np.eye(4))
        warned = "no voxel centre is inside the shape at resolution 64" in caplog.text
        assert blocks.num_blocks and warned == hollow == (not (blocks.block_sdf < 0).any())
        _, faces = extract_mesh(blocks)
        assert (len(faces) == 0) == hollow == ("its mesh is empty" in caplog.text)


def test_inward_surface_is_refused():
    vertices, faces = asymmetric_blob(2)
    with pytest.raises(ValueError, match="faces inward"):
        mesh_to_sparse_sdf(vertices, faces[:, ::-1], 32)


def test_blocks_serve_lookup_and_voxel_list():
    vertices, faces = asymmetric_blob(2)
    blocks = mesh_to_sparse_sdf(vertices, faces, 64)
    coords, values = blocks.to_voxels()
    assert len(coords) == int(blocks.active.sum()) and (np.abs(values) < 1).all()
    assert (BlockLookup(blocks.block_index).find(coords // 8) >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 500}, "multiple of 8"),
        ({"vertices": "nan"}, "finite"),
        ({"vertices": np.zeros((0, 3)), "faces": np.zeros((0, 3), int)}, "must have faces"),
        ({"vertices": np.zeros((4, 2))}, r"\[V, 3\]"),
        ({"faces": np.array([[0, 1, 99999]])}, "index vertices"),
        ({"faces": np.array([[0, 1, -1]])}, "index vertices"),
        ({"faces": np.array([[0.5, 1, 2]])}, "integers"),
        ({"vertices": "point"}, "extent"),
        ({"band_voxels": 0}, "band_voxels"),
        ({"sign_method": "guess"}, "sign_method"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_input_is_refused(change, message):
    vertices, faces = asymmetric_blob(1)
    arguments = {"vertices": vertices, "faces": faces, "resolution": 32} | change
    if isinstance(arguments["vertices"], str):
        bad = vertices.copy()
        bad[7 if change["vertices"] == "nan" else slice(None)] = np.nan if change["vertices"] == "nan" else 3.0
        arguments["vertices"] = bad
    with pytest.raises(ValueError, match=message):
        mesh_to_sparse_sdf(**arguments)
