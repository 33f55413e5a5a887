"""One small valid file of each format that is read, and seeded mutations of their bytes."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np


def tetrahedra(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A few closed tetrahedra beside each other: vertices [4 n, 3], faces [4 n, 3]."""
    corners = np.array([[0, 0, 0], [9, 0, 0], [0, 7, 0], [0, 0, 5]], dtype=np.float64)
    sides = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]])
    vertices = np.concatenate([corners + [12.0 * i, i, -i] for i in range(count)])
    return vertices, np.concatenate([sides + 4 * i for i in range(count)])


def label_array() -> np.ndarray:
    data = np.zeros((7, 6, 5), dtype=np.uint8)
    data[1:4, 1:5, 1:4] = 1
    data[4:6, 2:4, 2:4] = 3
    return data


AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1, 0, -30], [0, 0, 2, 20], [0, 0, 0, 1.0]])


def ascii_stl() -> bytes:
    vertices, faces = tetrahedra()
    lines = ["solid thing"]
    for face in faces:
        lines += ["facet normal 0 0 0", "outer loop"]
        lines += ["vertex {} {} {}".format(*vertices[i]) for i in face] + ["endloop", "endfacet"]
    return "\n".join([*lines, "endsolid thing", ""]).encode()


def ascii_ply() -> bytes:
    vertices, faces = tetrahedra()
    head = [
        "ply", "format ascii 1.0", "comment SPACE=LPS", f"element vertex {len(vertices)}", "property float x",
        "property float y", "property float z", f"element face {len(faces)}",
        "property list uchar int vertex_indices", "end_header",
    ]  # fmt: skip
    rows = [" ".join(map(str, v)) for v in vertices] + ["3 {} {} {}".format(*f) for f in faces]
    return "\n".join([*head, *rows, ""]).encode()


def gltf() -> bytes:
    vertices, faces = tetrahedra()
    blob = vertices.astype("<f4").tobytes() + faces.astype("<u2").tobytes()
    split = 12 * len(vertices)
    return json.dumps(
        {
            "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
            "accessors": [
                {"bufferView": 0, "componentType": 5126, "count": len(vertices), "type": "VEC3",
                 "min": vertices.min(0).tolist(), "max": vertices.max(0).tolist()},
                {"bufferView": 1, "componentType": 5123, "count": faces.size, "type": "SCALAR"},
            ],
            "bufferViews": [
                {"buffer": 0, "byteOffset": 0, "byteLength": split},
                {"buffer": 0, "byteOffset": split, "byteLength": len(blob) - split},
            ],
            "buffers": [{
                "byteLength": len(blob),
                "uri": "data:application/octet-stream;base64," + base64.b64encode(blob).decode(),
            }],
        }
    ).encode()  # fmt: skip


def gifti(encoding: str) -> bytes:
    vertices, faces = tetrahedra()

    def data(array: np.ndarray) -> str:
        if encoding == "ASCII":
            return " ".join(map(str, array.reshape(-1)))
        packed = array.tobytes() if encoding == "Base64Binary" else zlib.compress(array.tobytes())
        return base64.b64encode(packed).decode()

    parts = []
    for intent, kind, array in (
        ("POINTSET", "FLOAT32", vertices.astype("<f4")), ("TRIANGLE", "INT32", faces.astype("<i4"))
    ):  # fmt: skip
        parts.append(
            f'<DataArray Intent="NIFTI_INTENT_{intent}" DataType="NIFTI_TYPE_{kind}" '
            f'ArrayIndexingOrder="RowMajorOrder" Dimensionality="2" Dim0="{len(array)}" Dim1="3" '
            f'Encoding="{encoding}" Endian="LittleEndian" ExternalFileName="" ExternalFileOffset="">'
            f"<Data>{data(array)}</Data></DataArray>"
        )
    return f'<?xml version="1.0"?><GIFTI Version="1.0" NumberOfDataArrays="2">{"".join(parts)}</GIFTI>'.encode()


def freesurfer() -> bytes:
    vertices, faces = tetrahedra()
    footer = (
        "\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x14valid = 1  # volume info valid\nfilename = a.mgz\n"
        "volume = 256 256 256\nvoxelsize = 1 1 1\nxras   = -1 0 0\nyras   = 0 0 -1\nzras   = 0 1 0\ncras   = 1 2 3\n"
    )
    head = b"\xff\xff\xfecreated by somebody\n\n" + struct.pack(">ii", len(vertices), len(faces))
    return head + vertices.astype(">f4").tobytes() + faces.astype(">i4").tobytes() + footer[:4].encode() + (
        struct.pack(">ii", 0, 20) + footer[12:].encode()
    )


def vtk(binary: bool) -> bytes:
    vertices, faces = tetrahedra()
    cells = np.column_stack([np.full(len(faces), 3), faces])
    if binary:
        points, rows = vertices.astype(">f4").tobytes(), cells.astype(">i4").tobytes()
    else:
        points, rows = (" ".join(map(str, array.reshape(-1))).encode() for array in (vertices, cells))
    head = b"# vtk DataFile Version 3.0\ntitle\n" + (b"BINARY" if binary else b"ASCII") + b"\nDATASET POLYDATA\n"
    middle = b"\nPOLYGONS %d %d\n" % (len(cells), cells.size)
    return head + b"POINTS %d float\n" % len(vertices) + points + middle + rows + b"\n"


def vtp(mode: str) -> bytes:
    """VTK XML: "ascii", "binary" (base64, packed by zlib) or "appended" (raw)."""
    vertices, faces = tetrahedra()
    arrays = [
        ("Points", 'type="Float32" NumberOfComponents="3"', vertices.astype("<f4")),
        ("connectivity", 'type="Int64"', faces.astype("<i8")),
        ("offsets", 'type="Int64"', np.arange(3, 3 * len(faces) + 1, 3).astype("<i8")),
    ]
    tags, appended, at = [], b"", 0
    for name, kind, array in arrays:
        raw = array.tobytes()
        if mode == "appended":
            tags.append(f'<DataArray Name="{name}" {kind} format="appended" offset="{at}"/>')
            appended += struct.pack("<I", len(raw)) + raw
            at = len(appended)
            continue
        if mode == "ascii":
            text = " ".join(map(str, array.reshape(-1)))
        else:
            packed = zlib.compress(raw)
            head = struct.pack("<4I", 1, len(raw), 0, len(packed))
            text = base64.b64encode(head).decode() + base64.b64encode(packed).decode()
        tags.append(f'<DataArray Name="{name}" {kind} format="{mode}">{text}</DataArray>')
    packer = ' compressor="vtkZLibDataCompressor"' if mode == "binary" else ""
    end = b'<AppendedData encoding="raw">_' + appended + b"</AppendedData>" if mode == "appended" else b""
    return (
        f'<?xml version="1.0"?><VTKFile type="PolyData" version="0.1" byte_order="LittleEndian"{packer}><PolyData>'
        f'<Piece NumberOfPoints="{len(vertices)}" NumberOfVerts="0" NumberOfLines="0" NumberOfStrips="0" '
        f'NumberOfPolys="{len(faces)}"><Points>{tags[0]}</Points><Polys>{tags[1]}{tags[2]}</Polys></Piece>'
        f"</PolyData>"
    ).encode() + end + b"</VTKFile>"


def nrrd(encoding: str, *, header: str = "", magic: str = "NRRD0004") -> bytes:
    data = label_array().tobytes(order="F")
    packed = gzip.compress(data, mtime=0) if encoding == "gzip" else data
    return (
        f"{magic}\ntype: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: 7 6 5\n"
        "space directions: (1.5,0,0) (0,1,0) (0,0,2)\nkinds: domain domain domain\nendian: little\n"
        f"encoding: {encoding}\nspace origin: (-40,30,20)\n{header.strip()}{bool(header) * chr(10)}\n"
    ).encode() + packed


def seg_nrrd() -> bytes:
    segments = "".join(
        f"Segment{i}_ID:=S{i}\nSegment{i}_Name:=part {i}\nSegment{i}_LabelValue:={value}\nSegment{i}_Layer:=0\n"
        for i, value in enumerate((1, 3))
    )
    return nrrd("gzip", header=segments)


def mha(compressed: bool = False, data_file: str = "LOCAL") -> bytes:
    data = label_array().tobytes(order="F")
    packed = zlib.compress(data) if compressed else data
    size = f"CompressedDataSize = {len(packed)}\n" if compressed else ""
    return (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = {compressed}\n{size}TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = -40 30 20\n"
        f"CenterOfRotation = 0 0 0\nElementSpacing = 1.5 1 2\nDimSize = 7 6 5\nElementType = MET_UCHAR\n"
        f"ElementDataFile = {data_file}\n"
    ).encode() + (packed if data_file == "LOCAL" else b"")


def nifti() -> bytes:
    import nibabel

    return nibabel.Nifti1Image(label_array(), AFFINE).to_bytes()


def nifti_extension(text: str | None = None) -> bytes:
    """With XML in a header extension: a label table as TotalSegmentator writes it, or `text`."""
    import nibabel

    image = nibabel.Nifti1Image(label_array(), AFFINE)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, (text or label_table()).encode()))
    return image.to_bytes()


def label_table() -> str:
    labels = "".join(
        f'<Label Key="{value}" Red="1" Green="0.5" Blue="0" Alpha="1"><![CDATA[{name}]]></Label>\n'
        for value, name in ((1, "liver"), (3, "kidney_left"))
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension> <VolumeInformation Index="0"> <LabelTable>\n'
        f"{labels}</LabelTable> <StudyMetaDataLinkSet></StudyMetaDataLinkSet> </VolumeInformation></CaretExtension>"
    )


def mgh() -> bytes:
    import nibabel

    return nibabel.MGHImage(label_array(), AFFINE).to_bytes()


def npy(array: np.ndarray | None = None) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, label_array() if array is None else array)
    return buffer.getvalue()


def npz(compressed: bool = False, **arrays) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **(arrays or {"volume": label_array(), "affine": AFFINE}))
    return buffer.getvalue()


def dicom_slice(number: int, *, patient: str = "NOBODY", count: int = 1) -> bytes:
    """One CT slice, explicit little endian, written by hand."""
    def element(group: int, item: int, kind: bytes, value: bytes) -> bytes:
        value += (b"\0" if kind in (b"UI", b"OW", b"OB") else b" ") * (len(value) % 2)
        size = b"\0\0" + struct.pack("<I", len(value)) if kind in (b"OW", b"OB") else struct.pack("<H", len(value))
        return struct.pack("<HH", group, item) + kind + size + value

    uid = b"1.2.826.0.1.3680043.2.1125.7.%d" % number
    meta = element(2, 1, b"OB", b"\0\1") + element(2, 2, b"UI", b"1.2.840.10008.5.1.4.1.1.2")
    meta += element(2, 3, b"UI", uid) + element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1")
    pixels = label_array()[:, :, number % 5].astype("<u2").T.tobytes()
    body = [
        (8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2"), (8, 0x18, b"UI", uid), (8, 0x60, b"CS", b"CT"),
        (0x10, 0x10, b"PN", patient.encode()), (0x18, 0x50, b"DS", b"2.0"),
        (0x20, 0xD, b"UI", b"1.2.826.0.1.3680043.2.1125.1"), (0x20, 0xE, b"UI", b"1.2.826.0.1.3680043.2.1125.2"),
        (0x20, 0x13, b"IS", b"%d" % number), (0x20, 0x32, b"DS", b"-40\\30\\%d" % (20 + 2 * number)),
        (0x20, 0x37, b"DS", b"1\\0\\0\\0\\1\\0"), (0x28, 2, b"US", struct.pack("<H", 1)),
        (0x28, 4, b"CS", b"MONOCHROME2"), (0x28, 0x10, b"US", struct.pack("<H", 6)),
        (0x28, 0x11, b"US", struct.pack("<H", 7)), (0x28, 0x30, b"DS", b"1\\1.5"),
        (0x28, 0x100, b"US", struct.pack("<H", 16)), (0x28, 0x101, b"US", struct.pack("<H", 16)),
        (0x28, 0x102, b"US", struct.pack("<H", 15)), (0x28, 0x103, b"US", struct.pack("<H", 0)),
        (0x7FE0, 0x10, b"OW", pixels),
    ]  # fmt: skip
    head = element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
    return bytes(128) + b"DICM" + head + b"".join(element(*row) for row in body)


def sdf_blocks():
    from trellis.utils.blocks import SparseSDFBlocks, morton_order

    index = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [3, 2, 1]], dtype=np.int16)
    values = np.clip(np.random.default_rng(0).normal(size=(5, 8, 8, 8)), -0.9, 1).astype(np.float16)
    return SparseSDFBlocks(index[morton_order(index)], values, np.diag([90.0, 90, 90, 1]), 32, label="organ")


def _written(save: Callable[[Path], None], suffix: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        save(path)
        return path.read_bytes()


def sdf(schema: int) -> bytes:
    from trellis.utils.io_utils import save_sparse_sdf

    return _written(lambda path: save_sparse_sdf(path, sdf_blocks(), schema=schema), ".npz")


def tokens(**changes) -> bytes:
    from trellis.pipelines.token_files import Tokens, save_tokens

    fields = {
        "ids": np.array([3, 1, 4, 1, 5], np.int32), "block_index": sdf_blocks().block_index,
        "to_world": np.diag([90.0, 90, 90, 1]), "resolution": 32, "band_voxels": 4, "label": "organ",
        "sha256": "0f" * 32, "codebook_size": 8, "model_hash": "ab" * 32,
    }  # fmt: skip
    return _written(lambda path: save_tokens(path, Tokens(**{**fields, **changes})), ".safetensors")


def weights(suffix: str) -> bytes:
    import torch
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(0)
    tensors = {f"encoder.blocks.{i}.weight": torch.randn(3, 4, generator=generator) for i in range(3)}
    if suffix == ".safetensors":
        return save(tensors)
    buffer = io.BytesIO()
    torch.save({"vae": tensors, "step": 7}, buffer, _use_new_zipfile_serialization=suffix == ".ckpt")
    return buffer.getvalue()


def metadata_csv() -> bytes:
    return f"sha256,label,patient_id,split,r32_num_voxels,error\n{'0f' * 32},organ,p1,train,900,\n".encode()


def config_json() -> bytes:
    return (Path(__file__).parents[2] / "configs" / "vae" / "sparse_sdf_vqvae_64.json").read_bytes()


FORMATS: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "stl": ("mesh", "a.stl", lambda: mesh_bytes(".stl")),
    "stl ascii": ("mesh", "a.stl", ascii_stl),
    "ply": ("mesh", "a.ply", lambda: mesh_bytes(".ply")),
    "ply ascii": ("mesh", "a.ply", ascii_ply),
    "obj": ("mesh", "a.obj", lambda: mesh_bytes(".obj")),
    "off": ("mesh", "a.off", lambda: mesh_bytes(".off")),
    "glb": ("mesh", "a.glb", lambda: mesh_bytes(".glb")),
    "gltf": ("mesh", "a.gltf", gltf),
    "gifti ascii": ("mesh", "a.gii", lambda: gifti("ASCII")),
    "gifti base64": ("mesh", "a.gii", lambda: gifti("Base64Binary")),
    "gifti zlib": ("mesh", "a.gii", lambda: gifti("GZipBase64Binary")),
    "gifti gz": ("mesh", "a.gii.gz", lambda: gzip.compress(gifti("GZipBase64Binary"), mtime=0)),
    "freesurfer": ("mesh", "lh.pial", freesurfer),
    "vtk": ("mesh", "a.vtk", lambda: vtk(True)),
    "vtk ascii": ("mesh", "a.vtk", lambda: vtk(False)),
    "vtp ascii": ("mesh", "a.vtp", lambda: vtp("ascii")),
    "vtp zlib": ("mesh", "a.vtp", lambda: vtp("binary")),
    "vtp raw": ("mesh", "a.vtp", lambda: vtp("appended")),
    "nifti": ("volume", "a.nii", nifti),
    "nifti gz": ("volume", "a.nii.gz", lambda: gzip.compress(nifti(), mtime=0)),
    "nifti extension": ("layers", "a.nii", nifti_extension),
    "mgh": ("volume", "a.mgh", mgh),
    "mgz": ("volume", "a.mgz", lambda: gzip.compress(mgh(), mtime=0)),
    "nrrd": ("volume", "a.nrrd", lambda: nrrd("raw")),
    "nrrd gzip": ("volume", "a.nrrd", lambda: nrrd("gzip")),
    "seg.nrrd": ("layers", "a.seg.nrrd", seg_nrrd),
    "mha": ("volume", "a.mha", mha),
    "mha zlib": ("volume", "a.mha", lambda: mha(True)),
    "mhd": ("volume", "a.mhd", lambda: mha(data_file="a.raw")),
    "npy": ("volume", "a.npy", npy),
    "npz": ("volume", "a.npz", npz),
    "npz zlib": ("intensity", "a.npz", lambda: npz(True)),
    "dicom": ("volume", "series/0.dcm", lambda: dicom_slice(1)),
    "sdf 2": ("sdf", "a.npz", lambda: sdf(2)),
    "sdf 1": ("sdf", "a.npz", lambda: sdf(1)),
    "tokens": ("tokens", "a.safetensors", tokens),
    "weights safetensors": ("weights", "a.safetensors", lambda: weights(".safetensors")),
    "weights zip": ("weights", "a.ckpt", lambda: weights(".ckpt")),
    "weights pickle": ("weights", "a.pth", lambda: weights(".pth")),
    "config": ("config", "a.json", config_json),
    "labels csv": ("table", "a.csv", lambda: b"label,name,r\n0,background,0\n1,liver,9\n2,left kidney,8\n"),
    "labels json": ("table", "a.json", lambda: b'{"labels": {"background": 0, "liver": 1, "kidney": 2}}'),
    "labels txt": ("table", "a.txt", lambda: b"# c\n1 liver 3 4 5 0\n17 Left-Hippocampus 220 216 20 0\n"),
    "splits": ("splits", "a.json", lambda: b'[{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a"]}]'),
    "metadata": ("dataset", "metadata.csv", metadata_csv),
}
"""name -> (entry of robust_entries, file name, bytes of a valid file)"""


def mesh_bytes(suffix: str) -> bytes:
    from trellis.utils.mesh_utils import write_mesh

    return _written(lambda path: write_mesh(path, *tetrahedra()), suffix)


def place(folder: Path, name: str, data: bytes) -> Path:
    """Write a format's file with what must lie beside it; returns the path that its entry takes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "a.mhd":
        (folder / "a.raw").write_bytes(label_array().tobytes(order="F"))
    if name == "metadata.csv":
        (folder / "sparse_sdf").mkdir(exist_ok=True)
        (folder / "sparse_sdf" / f"{'0f' * 32}_r32.npz").write_bytes(sdf(2))
    path.write_bytes(data)
    if path.suffix == ".dcm":
        for number in (0, 2):
            (path.parent / f"{number + 1}.dcm").write_bytes(dicom_slice(number))
        return path.parent
    return path


INTERESTING = (
    b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f",
    b"\xff" * 8, b"\0" * 8, b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"nan", b"-1", b"0", b"1e999", b"99999999999999999999",
    b"-9223372036854775808", b"\n", b"\r\n\r\n", b" ", b"'", b'"', b"<", b"{", b"]", b"../", b"%s", "é".encode(),
)  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four seeded changes: bits flipped, bytes inserted or cut out, the end cut off, fields overwritten."""
    result = bytearray(data)
    head = min(len(data), 400)  # headers matter most: half of the changes hit them
    for _ in range(int(rng.integers(1, 5))):
        size = len(result)
        if not size:
            break
        at = int(rng.integers(min(head, size) if rng.random() < 0.5 else size))
        kind = int(rng.integers(8))
        word = INTERESTING[int(rng.integers(len(INTERESTING)))]
        if kind <= 1:
            result[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            result[at : at + len(word)] = word
        elif kind == 3:
            result[at:at] = word
        elif kind == 4:
            del result[at : at + int(rng.integers(1, 33))]
        elif kind == 5:
            result[at : at + 4] = rng.bytes(4)
        elif kind == 6:
            other = int(rng.integers(size))
            result[at : at + 16] = result[other : other + 16]
        elif rng.random() < 0.3:
            del result[at:]
    return bytes(result)


def mutate_inside(name: str, data: bytes, rng: np.random.Generator) -> bytes:
    """A mutation; of packed formats half of them change the packed content and leave the wrapping whole."""
    if name.endswith((".gz", ".mgz")) and rng.random() < 0.5:
        return gzip.compress(mutate(gzip.decompress(data), rng), 1, mtime=0)
    if name.endswith(".npz") and rng.random() < 0.6:
        return _mutate_member(data, rng)
    return mutate(data, rng)


def _mutate_member(data: bytes, rng: np.random.Generator) -> bytes:
    """A valid zip archive with one damaged member."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        chosen = names[int(rng.integers(len(names)))]
        for member in names:
            content = source.read(member)
            target.writestr(member, mutate(content, rng) if member == chosen else content)
    return buffer.getvalue()
