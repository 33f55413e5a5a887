"""What is in a file of any kind that the project reads: a mesh, a volume, a prepared shape, tokens, or a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trellis.pipelines.shape_inputs import is_prepared_file
from trellis.utils.io_utils import load_sparse_sdf

if TYPE_CHECKING:
    from trellis.geometry.volume import IntensityVolume, LabelVolume
    from trellis.preparation.settings import PrepareSettings

Facts = dict[str, Any]


def inspect_file(
    path: str | Path,
    *,
    mesh_space: str = "LPS",
    nested: str = "cavity",
    max_hole_mm: float | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
    threshold: str | None = None,
) -> Facts:
    """Plain facts of a file, ready for JSON: `file`, `kind`, what that kind has, and `refused` with the reason.

    Args:
        mesh_space, nested, max_hole_mm, spacing_mm, threshold: as in `PrepareSettings`; what would be done is what a
            preparation with these does.

    Raises:
        ValueError: no such file, or of no known kind, or an option that breaks its rule. A file of a known kind that
            cannot be used is no error here: its facts hold `refused`.
    """
    from trellis.preparation.settings import PrepareSettings
    from trellis.utils.mesh_utils import is_mesh_file

    settings = PrepareSettings(
        mesh_space=mesh_space, nested=nested, max_hole_mm=max_hole_mm, spacing_mm=spacing_mm, threshold=threshold
    )
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    kinds = (
        ("prepared shape", is_prepared_file, _prepared),
        ("tokens", _is_token_file, _tokens),
        ("volume", _is_volume, lambda p: _volume(p, settings)),
        ("model", _is_model, _model),
        ("mesh", is_mesh_file, lambda p: _mesh(p, settings)),
    )
    for kind, belongs, read in kinds:
        if belongs(path):
            facts: Facts = {"file": str(path), "kind": kind}
            try:
                return {**facts, **read(path)}
            except ValueError as error:
                return {**facts, "refused": str(error)}
    raise ValueError(f"{path}: neither a mesh, volume, prepared shape, token file nor model, by its name and content")


def as_text(facts: Facts) -> str:
    """The facts for a terminal: the file, then a line a fact."""
    lines = [f"{facts['file']}: {facts['kind']}"]
    for key, value in facts.items():
        if key in ("file", "kind"):
            continue
        name = key.replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(item, (str, dict)) for item in value):
            lines += [f"  {name}:", *(f"    {_inline(item)}" for item in value)]
        else:
            lines.append(f"  {name}: {_inline(value)}")
    return "\n".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _mesh(path: Path, settings: PrepareSettings) -> Facts:
    from trellis.utils.mesh_repair import inspect_mesh
    from trellis.utils.mesh_utils import read_mesh

    mesh = read_mesh(path, mesh_space=settings.mesh_space)
    options = {"nested": settings.nested, "max_hole_mm": settings.max_hole_mm}
    known_by = "the file says so" if mesh.space_is_tagged else "the file does not say: --mesh-space"
    facts = {"space": f"{mesh.space} ({known_by})", "box_ras_mm": _box(mesh.vertices)}
    facts |= plain(inspect_mesh(mesh.vertices, mesh.faces, **options).as_dict())
    if facts.get("refused"):
        return facts
    facts.pop("refused", None)
    return {**facts, "afterwards": _afterwards(mesh.vertices, mesh.faces, settings, from_mesh=True)}


def _afterwards(vertices: np.ndarray, faces: np.ndarray, settings: PrepareSettings, *, from_mesh: bool) -> Facts:
    """Size of the closed surface that a preparation makes of this one."""
    from trellis.geometry.metrics import mesh_volume_mm3
    from trellis.preparation.surfaces import closed_surface

    surface = closed_surface(
        vertices, faces, from_mesh=from_mesh, nested=settings.nested, max_hole_mm=settings.max_hole_mm
    )
    volume_ml = mesh_volume_mm3(surface.vertices, surface.faces) / 1000
    return {"vertices": len(surface.vertices), "faces": len(surface.faces), "volume_ml": volume_ml}


def _is_volume(path: Path) -> bool:
    """A volume file, or a folder of mask files or of DICOM slices."""
    from trellis.geometry.volume import is_volume_file
    from trellis.preparation.discover import is_dicom_slice

    if not path.is_dir():
        return is_volume_file(path)
    files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    return any(is_volume_file(file) and not is_prepared_file(file) for file in files) or any(
        is_dicom_slice(file) for file in files
    )


def _volume(path: Path, settings: PrepareSettings) -> Facts:
    """Grid, labels by the names that a preparation gives them, and what of each lies at the volume's border; with a
    threshold the one surface there."""
    from trellis.geometry.volume import read_intensity, read_label_layers

    facts: Facts = {} if _has_masks(path) else _raw_volume(path)
    try:
        if settings.threshold is not None:
            return {**facts, **_within(read_intensity(path, spacing_mm=settings.spacing_mm), settings)}
        layers = read_label_layers(path, spacing_mm=settings.spacing_mm)
    except ValueError as error:
        return {**facts, "refused": str(error)}
    facts |= _grid(layers)
    if len(layers) > 1:
        facts["overlapping_layers"] = len(layers)
    return {**facts, **_labels(path, layers)}


def _grid(layers: Sequence[LabelVolume | IntensityVolume]) -> Facts:
    first = layers[0]
    return {
        "shape": list(first.data.shape),
        "spacing_mm": plain(np.linalg.norm(first.affine[:3, :3], axis=0)),
        "affine_to_ras_mm": plain(first.affine),
        "notes": sorted({note for layer in layers for note in layer.notes}),
    }


def _within(volume: IntensityVolume, settings: PrepareSettings) -> Facts:
    """The surface that a preparation makes of intensities within the threshold."""
    from trellis.geometry.volume import parse_threshold, threshold_surface

    surface = threshold_surface(volume.data, volume.affine, *parse_threshold(settings.threshold or ""))
    afterwards = _afterwards(*surface, settings, from_mesh=False)
    return {**_grid([volume]), "threshold": settings.threshold, "afterwards": afterwards}


def _has_masks(path: Path) -> bool:
    from trellis.geometry.volume import is_volume_file

    return path.is_dir() and any(is_volume_file(file) for file in path.iterdir())


def _raw_volume(path: Path) -> Facts:
    """What a volume has whether or not it holds labels."""
    from trellis.geometry.volume_readers import read_raw_volume

    raw = read_raw_volume(path)
    facts: Facts = {"shape": list(raw.data.shape)}
    if raw.affine is not None:
        facts |= {
            "spacing_mm": plain(np.linalg.norm(raw.affine[:3, :3], axis=0)),
            "affine_to_ras_mm": plain(raw.affine),
        }
    if raw.data.size:
        low, high = float(raw.data.min()), float(raw.data.max())
        finite = bool(np.isfinite(low) and np.isfinite(high))
        facts["values"] = f"{raw.data.dtype}, {f'{low:.6g} to {high:.6g}' if finite else 'not all finite'}"
    return {**facts, "notes": list(raw.notes)}


def _labels(path: Path, layers: Sequence[LabelVolume]) -> Facts:
    from trellis.geometry.source_grid import label_boxes
    from trellis.geometry.volume import labels_of
    from trellis.preparation.label_tables import find_table, named_layers, read_table
    from trellis.preparation.surfaces import names_of_labels

    masks = _has_masks(path)
    problems: list[str] = []
    table = None if masks else find_table(path, path.parent, problems)
    own = any(layer.names for layer in layers)
    try:
        layers, known = named_layers(layers, read_table(table) if table else {}, masks=masks)
    except ValueError as error:
        return {"refused": str(error)}
    numbers = {number: layer for layer in layers for number in labels_of(layer)}
    names = names_of_labels(list(numbers), known)
    boxes = {number: box for layer in layers for number, box in label_boxes(layer.data, labels_of(layer)).items()}
    labels = []
    for number in sorted(numbers):
        layer, box = numbers[number], boxes[number]
        voxels = int(np.count_nonzero(layer.data[box] == number))
        value = layer.file_values.get(number, number)
        entry: Facts = {"label": value, "name": names[number], "voxels": voxels}
        entry["ml"] = voxels * layer.voxel_volume_mm3 / 1000
        if any(part.start == 0 or part.stop == size for part, size in zip(box, layer.data.shape)):
            entry["at_border"] = "closed there"
        if len(layers) > 1:
            entry["layer"] = next(i for i, other in enumerate(layers) if other is layer)
        labels.append(entry)
    source = f"{table.name} beside it" if table else "the files' names" if masks else "the file"
    named = source if table or own else "none: labels are called by their numbers"
    return {"names_from": named, **({"tables_not_used": problems} if problems else {}), "labels": labels}


def _prepared(path: Path) -> Facts:
    blocks = load_sparse_sdf(path)
    values = blocks.block_sdf
    return {
        "schema": "2 (blocks)" if blocks.to_world is not None else "1 (voxel list, without a place in mm)",
        "resolution": blocks.resolution,
        "band_voxels": blocks.band_voxels,
        "frame": blocks.frame,
        "label": blocks.label,
        "label_value": blocks.label_value,
        "patient_id": blocks.patient_id,
        "blocks": blocks.num_blocks,
        "active_voxels": int(np.count_nonzero(blocks.active)),
        "inside_share_of_block_voxels": float(np.mean(values < 0)) if values.size else None,
        "voxel_size_mm": blocks.voxel_size_mm,
        "to_world": plain(blocks.to_world),
    }


def _is_token_file(path: Path) -> bool:
    from trellis.pipelines.token_files import read_token_metadata

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        read_token_metadata(path)
    except ValueError:
        return False
    return True


def _tokens(path: Path) -> Facts:
    from trellis.geometry.metrics_summary import bits_per_shape
    from trellis.pipelines.token_files import load_tokens

    tokens = load_tokens(path)
    return {
        "label": tokens.label,
        "label_value": tokens.label_value,
        "patient_id": tokens.patient_id or None,
        "sha256": tokens.sha256,
        "resolution": tokens.resolution,
        "frame": tokens.frame,
        "tokens": tokens.num_tokens,
        "distinct_codes": int(len(np.unique(tokens.ids))),
        "quantizer": tokens.quantizer,
        "codebook_size": tokens.codebook_size,
        **bits_per_shape(tokens.ids, tokens.codebook_size, tokens.block_index),
        "model_hash": tokens.model_hash,
        "to_world": plain(tokens.to_world),
    }


def _is_model(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".safetensors"


def _model(path: Path) -> Facts:
    from trellis.pipelines.checkpoints import find_model, load_model
    from trellis.pipelines.tokenizer import model_hash

    found = find_model(path)
    model, resolution = load_model(path)
    return {
        "weights": f"{found.weights.name} ({found.what})",
        "resolution": resolution,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "codebook_initialized": bool(model.quantizer.initialized),
        "args": {key: value for key, value in found.args.items() if value is not None},
        "model_hash": model_hash(model),
    }


def _box(vertices: np.ndarray) -> list[list[float]]:
    """Lowest and highest corner in RAS mm."""
    return [plain(vertices.min(axis=0)), plain(vertices.max(axis=0))] if len(vertices) else []


def plain(value: Any) -> Any:
    """Numbers, lists, dicts and text of anything that NumPy may be part of."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
