"""Broken surfaces made from sound ones, and how many voxels come out with the wrong sign after repair.

`python tests/utils/sign_corpus.py [MESH RESOLUTION]` prints the table of docs/geometry_sign.md, for a generated shape
or with the defects made in a mesh file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trimesh

Arrays = tuple[np.ndarray, np.ndarray]
RESOLUTION = 64


@dataclass(frozen=True)
class Case:
    """A broken mesh and what is to become of it.

    Attributes:
        broken: vertices, faces.
        truth: inside [N] bool of points [N, 3], by a rule that does not look at the broken mesh; or the unbroken mesh,
            too large for the brute-force rule, whose signs tests/geometry/test_sdf.py vouches for; None: refused.
        says: a part of the refusal, or of one of the report's actions; "" if the mesh needs no repair.
        tolerance: share of voxels of the blocks that may have the wrong sign, for what a repair cannot know.
        options: for `clean_mesh`.
    """

    broken: Arrays
    truth: Callable[[np.ndarray], np.ndarray] | Arrays | None
    says: str
    tolerance: float = 0.0
    options: dict | None = None


def blob(subdivisions: int = 3) -> Arrays:
    """A closed surface without symmetry, 60 mm long."""
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    v = np.asarray(mesh.vertices)
    radius = 1 + 0.25 * np.sin(2 * v[:, 0] + 1) + 0.2 * np.cos(3 * v[:, 1]) * v[:, 2] + 0.15 * v[:, 2]
    return v * radius[:, None] * [30, 18, 11] + [5, -70, 40], np.asarray(mesh.faces).astype(np.int64)


def sphere(radius: float = 10.0, centre: tuple[float, float, float] = (0, 0, 0), subdivisions: int = 4) -> Arrays:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return np.asarray(mesh.vertices) + np.asarray(centre, dtype=float), np.asarray(mesh.faces).astype(np.int64)


def joined(*meshes: Arrays) -> Arrays:
    vertices, faces, offset = [], [], 0
    for v, f in meshes:
        vertices.append(v)
        faces.append(f + offset)
        offset += len(v)
    return np.concatenate(vertices), np.concatenate(faces)


def inverted(mesh: Arrays) -> Arrays:
    return mesh[0], mesh[1][:, ::-1]


def inside_mesh(mesh: Arrays) -> Callable[[np.ndarray], np.ndarray]:
    """Inside of a sound mesh, by its generalised winding number in float64."""
    v, f = mesh
    known: dict[bytes, np.ndarray] = {}

    def inside(points: np.ndarray) -> np.ndarray:
        key = points.round(6).tobytes()  # most defects leave the frame, and so the points, as they were
        if key in known:
            return known[key]
        total = np.empty(len(points))
        for i in range(0, len(points), 400):
            a, b, c = (v[f[:, k]] - points[i : i + 400, None] for k in range(3))
            la, lb, lc = (np.linalg.norm(x, axis=-1) for x in (a, b, c))
            top = (a * np.cross(b, c)).sum(-1)
            bottom = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
            total[i : i + 400] = np.arctan2(top, bottom).sum(1) / (2 * np.pi)
        known[key] = total > 0.5
        return known[key]

    return inside


def inside_ball(radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Callable[[np.ndarray], np.ndarray]:
    return lambda p: np.linalg.norm(p - np.asarray(centre, dtype=float), axis=1) < radius


def with_t_junctions(mesh: Arrays, every: int = 5) -> Arrays:
    """Faces split at the middle of one edge while the neighbour keeps the whole edge."""
    v, f = mesh
    chosen = f[::every]
    middle = ((v[chosen[:, 0]] + v[chosen[:, 1]]) / 2).astype(np.float32).astype(float)
    new = len(v) + np.arange(len(chosen))
    kept = np.delete(f, np.arange(0, len(f), every), axis=0)
    first = np.stack([chosen[:, 0], new, chosen[:, 2]], 1)
    second = np.stack([new, chosen[:, 1], chosen[:, 2]], 1)
    return np.concatenate([v, middle]), np.concatenate([kept, first, second])


def corpus(real: Arrays | None = None) -> dict[str, Case]:
    """All cases. `real`: a closed anatomical surface, from which the same defects are made; else a blob."""
    rng = np.random.default_rng(7)
    base = blob() if real is None else real
    v, f = base
    truth = inside_mesh(base) if real is None else base
    centre = v[f].mean(axis=1)
    n = len(f)
    top = np.argmax(centre[:, 2])
    away = np.linalg.norm(centre - centre[top], axis=1)
    size = float(np.linalg.norm(np.ptp(v, axis=0)))
    ball, inner = sphere(10), sphere(4, (1, 2, 0.5))
    two = joined(sphere(10), sphere(7, (9, 1, 2)))

    def in_two(p: np.ndarray) -> np.ndarray:
        return inside_ball(10)(p) | inside_ball(7, (9, 1, 2))(p)

    def in_shell(p: np.ndarray) -> np.ndarray:
        return inside_ball(10)(p) & ~inside_ball(4, (1, 2, 0.5))(p)

    mixed = f.copy()
    turned = rng.random(n) < 0.4
    mixed[turned] = mixed[turned][:, ::-1]
    some = f[rng.choice(n, n // 20, replace=False)]
    soup = (v[f].reshape(-1, 3), np.arange(3 * n).reshape(-1, 3))
    jitter = soup[0] + rng.normal(size=soup[0].shape) * size * 1e-8
    grid = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0), indexing="ij"), -1).reshape(-1, 2)
    at = (np.arange(19)[:, None] * 20 + np.arange(19)).reshape(-1)
    sheet_faces = np.concatenate([np.stack([at, at + 20, at + 1], 1), np.stack([at + 1, at + 20, at + 21], 1)])
    sheet = (np.column_stack([grid, 0.3 * np.sin(grid[:, 0])]), sheet_faces)
    huge, bad = v.copy(), v.copy()
    huge[3], bad[3, 1] = 1e30, np.nan
    small = away < np.sort(away)[max(12, n // 200)]
    box = trimesh.creation.box([10, 10, 10])
    wall = (np.asarray(box.vertices), np.concatenate([np.asarray(box.faces), [[0, 3, 7], [0, 7, 4]]]))
    bent = _self_intersecting()
    cut_ball = ball[1][ball[0][ball[1]].mean(1)[:, 2] < 9.0]
    half_ball = ball[1][ball[0][ball[1]].mean(1)[:, 2] < 0.0]
    return {
        "sound": Case(base, truth, ""),
        "all faces inverted": Case(inverted(base), truth, "turned the surface outward"),
        "40 % of faces inverted": Case((v, mixed), truth, "to agree with their neighbours"),
        "one of two components inverted": Case(
            joined(sphere(10), inverted(sphere(7, (30, 1, 2)))),
            lambda p: inside_ball(10)(p) | inside_ball(7, (30, 1, 2))(p), "components outward", 0.02,
        ),
        "duplicate faces": Case((v, np.concatenate([f, some, some[: len(some) // 2]])), truth, "duplicate"),
        "duplicate faces, turned": Case((v, np.concatenate([f, some[:, ::-1]])), truth, "duplicate"),
        "every face twice": Case((v, np.concatenate([f, f])), truth, "duplicate"),
        "degenerate faces": Case(
            (v, np.concatenate([f, some[:, [0, 0, 1]], np.repeat(some[:9, :1], 3, axis=1)])), truth, "a vertex twice"
        ),
        "faces of zero area": Case(_flat_faces(base), truth, "zero area"),
        "vertices not merged (STL)": Case(soup, truth, "merged"),
        "vertices apart by rounding": Case((jitter, soup[1]), truth, "welded"),
        "vertices not merged, 40 % inverted": Case((v[mixed].reshape(-1, 3), soup[1]), truth, "merged"),
        "T-junctions": Case(with_t_junctions(base), truth, "T-junctions"),
        "small hole": Case((v, f[~small]), truth, "capped 1 holes", 0.01),
        "40 holes of a face": Case((v, np.delete(f, np.arange(0, n, n // 40)[:40], axis=0)), truth, "capped", 0.01),
        "wide hole": Case((ball[0], cut_ball), inside_ball(10), "capped 1 holes", 0.03),
        "hole wider than allowed": Case((ball[0], cut_ball), None, "max_hole_mm = 2", options={"max_hole_mm": 2.0}),
        "half a ball": Case((ball[0], half_ball), None, "holes must be"),
        "half a ball, allowed": Case(
            (ball[0], half_ball), lambda p: inside_ball(10)(p) & (p[:, 2] < 0), "capped 1 holes", 0.03,
            {"max_hole_mm": 25.0},
        ),
        "self-intersection": Case(bent, inside_mesh(bent), ""),
        "overlapping components": Case(two, in_two, "united 2", 0.02),
        "overlapping, one inverted": Case(joined(sphere(10), inverted(sphere(7, (9, 1, 2)))), in_two, "united 2", 0.02),
        "nested shell, facing outward": Case(joined(ball, inner), in_shell, "cavities", 0.02),
        "nested shell, facing inward": Case(joined(ball, inverted(inner)), in_shell, "cavities", 0.02),
        "nested shell, all inverted": Case(joined(inverted(ball), inner), in_shell, "cavities", 0.02),
        "nested shell as a solid": Case(
            joined(ball, inverted(inner)), inside_ball(10), "removed 1", 0.02, {"nested": "solid"}
        ),
        "solid in a cavity": Case(
            joined(ball, sphere(8), sphere(5)),
            lambda p: inside_ball(10)(p) & (~inside_ball(8)(p) | inside_ball(5)(p)), "cavities", 0.03,
        ),
        "loose triangles beside it": Case(
            joined(base, (v[f[top]] + [0, 0, size / 50], np.array([[0, 1, 2]]))), truth, "open pieces", 0.0
        ),
        "an inner wall": Case(wall, None, "even number of faces"),
        "open sheet": Case(sheet, None, "enclose nothing"),
        "triangle soup": Case(
            (rng.normal(size=(300, 3)), np.arange(300).reshape(-1, 3)), None, "enclose nothing"
        ),
        "point soup": Case((rng.normal(size=(300, 3)), np.zeros((0, 3), dtype=np.int64)), None, "must have faces"),
        "one triangle": Case((np.eye(3), np.array([[0, 1, 2]])), None, "enclose"),
        "Moebius strip": Case(_moebius(), None, "two sides"),
        "a NaN vertex": Case((bad, f), None, "finite"),
        "a huge coordinate": Case((huge, f), None, "within 1e"),
    }


def _flat_faces(mesh: Arrays) -> Arrays:
    """Loose needles on edges of the surface: three distinct vertices in one line."""
    v, f = mesh
    ends = f[:30, :2]
    middle = (v[ends[:, 0]] + v[ends[:, 1]]) / 2
    return np.concatenate([v, middle]), np.concatenate([f, np.column_stack([ends, len(v) + np.arange(30)])])


def _self_intersecting() -> Arrays:
    """A tube along a nodal cubic: where it crosses itself the winding number is 2."""
    mesh = trimesh.creation.capsule(height=3.0, radius=0.15, count=[10, 10])
    v, f = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, 0.3)
    t = (v[:, 2] - (v[:, 2].min() + v[:, 2].max()) / 2) * (2.6 / 3.3)
    along = np.column_stack([2 * t, 3 * t**2 - 1, np.zeros(len(t))])
    along /= np.linalg.norm(along, axis=1)[:, None]
    normal = np.column_stack([-along[:, 1], along[:, 0], along[:, 2]])
    curve = np.column_stack([t**2 - 1, t * (t**2 - 1), np.zeros(len(t))])
    v = curve + v[:, :1] * normal + v[:, 1:2] * np.array([0, 0, 1.0])
    if trimesh.Trimesh(v, f, process=False).volume < 0:
        f = f[:, ::-1]
    return v * 10, np.asarray(f).astype(np.int64)


def _moebius() -> Arrays:
    steps, faces = 40, []
    t = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    rows = []
    for width in (-0.3, 0.3):
        r = 1 + width * np.cos(t / 2)
        rows.append(np.column_stack([r * np.cos(t), r * np.sin(t), width * np.sin(t / 2)]))
    v = np.concatenate(rows)
    for i in range(steps):
        j = i + 1
        a, b, c, d = i, i + steps, j, j + steps
        if j == steps:
            c, d = steps, 0
        faces += [[a, c, b], [b, c, d]]
    return v, np.array(faces)


def wrong_share(case: Case, resolution: int = RESOLUTION) -> tuple[float, float, list[str]]:
    """Repair, make the TSDF, and compare signs with the truth.

    Returns:
        share of the blocks' voxels with the wrong sign, the farthest such voxel from the surface in voxels (4: out of
        the band), and the repair's actions.
    """
    from trellis.geometry.sdf import mesh_to_sparse_sdf
    from trellis.geometry.transforms import grid_to_world, voxel_centres
    from trellis.utils.blocks import block_voxel_offsets
    from trellis.utils.mesh_repair import clean_mesh

    v, f, report = clean_mesh(*case.broken, **(case.options or {}))
    blocks = mesh_to_sparse_sdf(v, f, resolution)
    coords = (blocks.block_index.astype(np.int64)[:, None] * 8 + block_voxel_offsets()).reshape(-1, 3)
    values = blocks.block_sdf.reshape(-1).astype(np.float64)
    if isinstance(case.truth, tuple):
        inside = _inside_of_blocks(case.truth, blocks)
        wrong = (values < 0) != inside
        return float(wrong.mean()), float(np.abs(values[wrong]).max(initial=0) * 4), report.actions
    if len(coords) > 6000:
        pick = np.random.default_rng(0).choice(len(coords), 6000, replace=False)
        coords, values = coords[pick], values[pick]
    inside = case.truth(grid_to_world(voxel_centres(coords, resolution), blocks.to_world))
    wrong = (values < 0) != inside
    return float(wrong.mean()), float(np.abs(values[wrong]).max(initial=0) * 4), report.actions


def _inside_of_blocks(mesh: Arrays, blocks: object) -> np.ndarray:
    """Inside [M * 512] of another mesh's blocks."""
    from trellis.geometry.sdf_sign import CrossingSigns
    from trellis.geometry.transforms import world_to_grid
    from trellis.utils.warp_utils import get_warp

    wp = get_warp()
    index_coords = (world_to_grid(mesh[0], blocks.to_world) + 0.5) * blocks.resolution - 0.5
    signs = CrossingSigns(index_coords, wp.array(mesh[1].astype(np.int32), device="cpu"), blocks.resolution)
    bits = signs.sign_blocks(wp.array(blocks.block_index.astype(np.int32), device="cpu")).numpy()
    return np.unpackbits(bits[:, :, None], axis=2, bitorder="little").reshape(-1).astype(bool)


def main(arguments: list[str]) -> None:
    real, resolution = None, RESOLUTION
    if arguments:
        mesh = trimesh.load(arguments[0], process=False)
        real, resolution = (np.asarray(mesh.vertices), np.asarray(mesh.faces).astype(np.int64)), int(arguments[1])
    print("| defect | wrong signs | at most, voxels from the surface | what was done |\n| --- | --- | --- | --- |")
    for name, case in corpus(real).items():
        try:
            share, farthest, actions = wrong_share(case, resolution)
            print(f"| {name} | {share:.2%} | {farthest:.2f} | {'; '.join(actions) or 'nothing'} |")
        except ValueError as error:
            print(f"| {name} | | | refused: {error} |")


if __name__ == "__main__":
    main(sys.argv[1:])
