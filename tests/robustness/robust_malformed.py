"""The corpus of malformed inputs: what each is, the entry that it goes through, and how it must end."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import robust_files as files

REFUSED, RESULT, EITHER = "refused", "result", "either"


@dataclass(frozen=True)
class Malformed:
    """One input: `make(folder)` writes it and returns the path for the entry; `words` must be in the refusal."""

    entry: str
    make: Callable[[Path], Path]
    ends: str = REFUSED
    words: str = ""


CASES: dict[str, Malformed] = {}


def case(
    name: str, entry: str, file_name: str, data: bytes | Callable[[], bytes], words: str = "", ends: str = REFUSED
):  # fmt: skip
    """A case of one file's bytes."""
    def make(folder: Path) -> Path:
        return files.place(folder, file_name, data() if callable(data) else data)

    assert name not in CASES
    CASES[name] = Malformed(entry, make, ends, words)


def folder_case(name: str, entry: str, words: str = "", ends: str = REFUSED):
    """A case that a function sets up in an empty folder."""
    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        assert name not in CASES
        CASES[name] = Malformed(entry, make, ends, words)
        return make

    return register


def entity_bomb() -> str:
    """A label table whose one name would be 10^9 letters."""
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "a" * 10}">' for i in range(9))
    table = '<LabelTable><Label Key="1">&e8;</Label></LabelTable>'
    return f"<!DOCTYPE CaretExtension [{entities}]><CaretExtension>{table}</CaretExtension>"


def nifti(**fields: tuple[str, object]) -> bytes:
    """The valid volume with header fields overwritten: at offset `o40` the struct format and its value."""
    data = bytearray(files.nifti())
    for name, (kind, value) in fields.items():
        struct.pack_into("<" + kind, data, int(name[1:]), value)
    return bytes(data)


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy_header(shape: str, descr: str = "'|u1'", rest: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + rest


PIECE = bytes(16 << 20)


def gzip_bomb(prefix: bytes, zeros: int) -> bytes:
    """`prefix` and many zeros, as gzip members one after another (packing one of them is enough)."""
    return gzip.compress(prefix, mtime=0) + gzip.compress(PIECE, 9, mtime=0) * (zeros // len(PIECE))


def zip_bomb(name: str, prefix: bytes, zeros: int, others: dict[str, bytes]) -> bytes:
    """An archive whose first member is `prefix` and many zeros; its packed pieces are flushed apart, so that one is
    enough."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = packer.compress(prefix) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(PIECE) + packer.flush(zlib.Z_FULL_FLUSH)
    count = zeros // len(PIECE)
    packed = head + piece * count + packer.flush()
    checksum = zlib.crc32(prefix)
    for _ in range(count):
        checksum = zlib.crc32(PIECE, checksum)
    size = len(prefix) + count * len(PIECE)
    facts = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, checksum, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + facts + name.encode() + packed
    entries = b"PK\x01\x02" + struct.pack("<H", 20) + facts + bytes(2 + 2 + 2 + 4 + 4) + name.encode()
    for other, data in others.items():
        own = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(other), 0)
        place = bytes(10) + struct.pack("<I", len(local))
        local += b"PK\x03\x04" + own + other.encode() + data
        entries += b"PK\x01\x02" + struct.pack("<H", 20) + own + place + other.encode()
    total = 1 + len(others)
    return local + entries + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, total, total, len(entries), len(local), 0)


def objects() -> np.ndarray:
    return np.array([{"a": 1}], dtype=object)


# meshes
case("stl empty", "mesh", "a.stl", b"", "empty")
case("stl of no triangles", "mesh", "a.stl", bytes(84), "no triangles")
case("stl cut", "mesh", "a.stl", lambda: files.mesh_bytes(".stl")[:-7], "truncated")
case("stl count 2^32-1", "mesh", "a.stl", bytes(80) + b"\xff" * 4 + bytes(50), "4294967295")
case("stl ascii cut", "mesh", "a.stl", lambda: files.ascii_stl()[:300], "truncated")
case("stl non-ASCII name, empty", "mesh", "Größe 肝臓 ‮.stl", b"", "empty")
case("stl name not UTF-8", "mesh", os.fsdecode(b"l\xe9ber.stl"), b"", "empty")
case("ply NaN vertex", "mesh", "a.ply", lambda: files.ascii_ply().replace(b"9.0 0.0", b"nan 0.0"), "NaN or infinity")
case("ply wrong magic", "mesh", "a.ply", b"plx\nformat ascii 1.0\nend_header\n", "starts with 'ply'")
case("ply 10^18 vertices", "mesh", "a.ply",
     lambda: files.ascii_ply().replace(b"vertex 12", b"vertex 1000000000000000000"), "truncated")  # fmt: skip
case("ply list of 2^31 corners", "mesh", "a.ply", b"ply\nformat binary_little_endian 1.0\nelement face 1\n"
     b"property list uint int vertex_indices\nend_header\n\xff\xff\xff\x7f", "truncated")  # fmt: skip
case("ply huge coordinate", "mesh", "a.ply", lambda: files.ascii_ply().replace(b"9.0 0.0", b"1e400 0.0"), "infinity")
case("obj NaN", "mesh", "a.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN")
case("obj index too large", "mesh", "a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 99999999999999999999\n", "face indices")
case("obj index 0", "mesh", "a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "vertex 0")
case("off negative counts", "mesh", "a.off", b"OFF\n-3 -1 0\n", "numbers of vertices and faces")
case("off absurd counts", "mesh", "a.off", b"OFF\n900000000000 900000000000 0\n0 0 0\n", "truncated")
case("off absurd face", "mesh", "a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n2000000000 0 1 2\n", "corners")
case("off word for a size", "mesh", "a.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\nx 0 1 2\n", "a.off")
case("glb cut", "mesh", "a.glb", lambda: files.mesh_bytes(".glb")[:-20], "truncated")
case("glb accessor of 10^12", "mesh", "a.glb", lambda: _glb_with(b'"count":12', b'"count":1000000000000'), "a.glb")
case("gltf buffer outside", "mesh", "a.gltf", lambda: files.gltf().replace(
    b"data:application/octet-stream;base64,", b"../../x/"), "a.gltf")  # fmt: skip
case("gltf buffer from /etc", "mesh", "a.gltf",
     b'{"asset":{"version":"2.0"},"buffers":[{"byteLength":9,"uri":"/etc/passwd"}]}', "a.gltf")  # fmt: skip
case("gltf deep nesting", "mesh", "a.gltf", b"[" * 200000, "a.gltf")
case("gltf node cycle", "mesh", "a.gltf", lambda: files.gltf().replace(
    b'"nodes": [{"mesh": 0}]', b'"nodes": [{"mesh": 0, "children": [1]}, {"children": [0]}]'), ends=EITHER)  # fmt: skip
case("gifti billion laughs", "mesh", "a.gii", lambda: _laughs(files.gifti("ASCII")), "a.gii")
case("gifti external entity", "mesh", "a.gii", lambda: files.gifti("ASCII").replace(
    b"<GIFTI", b'<!DOCTYPE G [<!ENTITY x SYSTEM "file:///etc/passwd">]><GIFTI').replace(
    b"<Data>", b"<Data>&x;", 1), ends=EITHER)  # fmt: skip
case("gifti gz bomb", "mesh", "a.gii.gz", lambda: gzip_bomb(b"<?xml version='1.0'?><GIFTI>", 512 << 20),
     "zero bytes")  # fmt: skip
case("gifti absurd Dim0", "mesh", "a.gii", lambda: files.gifti("Base64Binary").replace(
    b'Dim0="12"', b'Dim0="999999999999"'), "a.gii")  # fmt: skip
case("gifti external file", "mesh", "a.gii", lambda: files.gifti("Base64Binary").replace(
    b'Encoding="Base64Binary"', b'Encoding="ExternalFileBinary"').replace(
    b'ExternalFileName=""', b'ExternalFileName="/etc/passwd"'), "a.gii")  # fmt: skip
case("freesurfer cut", "mesh", "lh.pial", lambda: files.freesurfer()[:90], "truncated")
case("freesurfer negative counts", "mesh", "lh.pial", b"\xff\xff\xfehi\n\n" + struct.pack(">ii", -1, -5), "truncated")
case("freesurfer quads, absurd", "mesh", "lh.pial", b"\xff\xff\xff\x7f\xff\xff\x7f\xff\xff" + bytes(30), "lh.pial")
case("vtk 10^15 points", "mesh", "a.vtk", lambda: files.vtk(True).replace(b"POINTS 12", b"POINTS 999999999999999"),
     "truncated")  # fmt: skip
case("vtk cells out of range", "mesh", "a.vtk", lambda: files.vtk(False).replace(b"3 0 2 1", b"3 0 2 7000"),
     "faces must name vertices")  # fmt: skip
case("vtp absurd points", "mesh", "a.vtp", lambda: files.vtp("ascii").replace(
    b'NumberOfPoints="12"', b'NumberOfPoints="99999999999"'), "a.vtp")  # fmt: skip
case("vtp offsets run wild", "mesh", "a.vtp", lambda: files.vtp("ascii").replace(b" 33 36", b" 33 99999999"), "a.vtp")
case("vtp appended cut", "mesh", "a.vtp", lambda: files.vtp("appended")[:-80], "a.vtp")
case("folder called a.stl", "mesh", "a.stl/inside.txt", b"", "")
case("mesh without suffix", "mesh", "mesh", b"hello", "file without suffix")

# volumes
case("nifti empty", "volume", "a.nii", b"", "a.nii")
case("nifti cut", "volume", "a.nii", lambda: files.nifti()[:400], "truncated")
case("nifti gz cut", "volume", "a.nii.gz", lambda: gzip.compress(files.nifti(), mtime=0)[:-30], "a.nii.gz")
case("nifti wrong magic", "volume", "a.nii", lambda: nifti(o344=("4s", b"n+9\0"), o0=("i", 77)), "a.nii")
case("nifti 32767 cubed", "volume", "a.nii", lambda: nifti(o42=("h", 32767), o44=("h", 32767), o46=("h", 32767)),
     "at most")  # fmt: skip
case("nifti zero size", "volume", "a.nii", lambda: nifti(o44=("h", 0)), "at least one voxel")
case("nifti negative size", "volume", "a.nii", lambda: nifti(o44=("h", -6)), "a.nii")
case("nifti negative spacing", "volume", "a.nii", lambda: nifti(o80=("f", -1.5), o252=("h", 0), o254=("h", 0)),
     "no voxel spacing")  # fmt: skip
case("nifti NaN affine", "volume", "a.nii", lambda: nifti(o280=("f", np.nan)), "finite")
case("nifti infinite offset", "volume", "a.nii", lambda: nifti(o292=("f", np.inf)), "finite")
case("nifti flat affine", "volume", "a.nii", lambda: nifti(o280=("f", 0.0)), "spacing must be above 0")
case("nifti data offset 10^30", "volume", "a.nii", lambda: nifti(o108=("f", 1e30)), "a.nii")
case("nifti negative data offset", "volume", "a.nii", lambda: nifti(o108=("f", -400.0)), "a.nii")
case("nifti NaN data offset", "volume", "a.nii", lambda: nifti(o108=("f", np.nan)), "a.nii")
case("nifti complex voxels", "volume", "a.nii", lambda: nifti(o70=("h", 32), o72=("h", 64)), "one number per voxel")
case("nifti NaN slope", "volume", "a.nii", lambda: nifti(o112=("f", np.nan)), ends=EITHER)
case("nifti slope 1e38", "volume", "a.nii", lambda: nifti(o112=("f", 1e38)), "2147483647")
case("nifti of zeros", "volume", "a.nii", lambda: files.nifti()[:352] + bytes(210), "no labels")
case("nifti gz bomb, small volume", "volume", "a.nii.gz", lambda: gzip_bomb(files.nifti(), 1 << 30), ends=EITHER)
case("nifti gz, header announces 1 GB", "volume", "a.nii.gz", lambda: gzip.compress(
    nifti(o42=("h", 1000), o44=("h", 1000), o46=("h", 1000)), mtime=0), "truncated")  # fmt: skip
case("nifti label table of entities", "volume", "a.nii", lambda: files.nifti_extension(entity_bomb()),
     ends=RESULT)  # fmt: skip
case("nifti extension of 2^31 bytes", "volume", "a.nii", lambda: files.nifti()[:348] + b"\1\0\0\0"
     + struct.pack("<ii", 2**31 - 16, 6) + bytes(300), ends=EITHER)  # fmt: skip
case("mgz cut", "volume", "a.mgz", lambda: gzip.compress(files.mgh(), mtime=0)[:-200], "a.mgz")
case("mgh wrong version", "volume", "a.mgh", b"\0\0\0\x07" + bytes(400), "a.mgh")
case("mgh absurd size", "volume", "a.mgh", lambda: files.mgh()[:4] + struct.pack(">3i", 30000, 30000, 30000)
     + files.mgh()[16:], "a.mgh")  # fmt: skip
case("nrrd wrong magic", "volume", "a.nrrd", b"NRRX0004\ntype: uchar\n\n", "starts with 'NRRD'")
case("nrrd absurd sizes", "volume", "a.nrrd", lambda: files.nrrd("raw").replace(
    b"sizes: 7 6 5", b"sizes: 2000000 2000000 2000000"), "a.nrrd")  # fmt: skip
case("nrrd in furlongs", "volume", "a.nrrd",
     lambda: files.nrrd("raw", header='space units: "furlong" "furlong" "furlong"'), "furlong")  # fmt: skip
case("nrrd zero size", "volume", "a.nrrd", lambda: files.nrrd("raw").replace(b"sizes: 7 6 5", b"sizes: 7 0 5"),
     "a.nrrd")  # fmt: skip
case("nrrd NaN direction", "volume", "a.nrrd", lambda: files.nrrd("raw").replace(b"(1.5,0,0)", b"(nan,0,0)"), "a.nrrd")
case("nrrd cut", "volume", "a.nrrd", lambda: files.nrrd("raw")[:-50], "a.nrrd")
case("nrrd gzip cut", "volume", "a.nrrd", lambda: files.nrrd("gzip")[:-30], "a.nrrd")
case("nrrd dimension 99", "volume", "a.nrrd", lambda: files.nrrd("raw").replace(b"dimension: 3", b"dimension: 99"),
     "a.nrrd")  # fmt: skip
case("nrrd data file outside", "volume", "a.nhdr", lambda: files.nrrd("raw", header="data file: ../../etc/passwd"),
     "beside it")  # fmt: skip
case("nrrd data file absolute", "volume", "a.nhdr", lambda: files.nrrd("raw", header="data file: /etc/passwd"),
     "beside it")  # fmt: skip
case("seg.nrrd layer 7 of 1", "layers", "a.seg.nrrd", lambda: files.nrrd(
    "gzip", header="Segment0_Name:=x\nSegment0_Layer:=7"), "layer 7")  # fmt: skip
case("seg.nrrd word for a label", "layers", "a.seg.nrrd", lambda: files.nrrd(
    "gzip", header="Segment0_Name:=x\nSegment0_LabelValue:=many"), "a.seg.nrrd")  # fmt: skip
case("mha negative spacing", "volume", "a.mha", lambda: files.mha().replace(b"= 1.5 1 2", b"= -1.5 1 2"),
     "above 0")  # fmt: skip
case("nrrd negative spacings", "volume", "a.nrrd", lambda: files.nrrd("raw").replace(
    b"space directions: (1.5,0,0) (0,1,0) (0,0,2)", b"spacings: 1.5 -1 2")
    .replace(b"space: left-posterior-superior\n", b"")
    .replace(b"space origin: (-40,30,20)\n", b""), "above 0")  # fmt: skip
case("mha absurd size", "volume", "a.mha", lambda: files.mha(True).replace(b"= 7 6 5", b"= 90000 90000 90000"), "a.mha")
case("mha size that does not fit", "volume", "a.mha", lambda: files.mha().replace(b"= 7 6 5", b"= 700 60 50"), "a.mha")
case("mha data outside", "volume", "a.mhd", lambda: files.mha(data_file="../../../etc/passwd"), "beside it")
case("mha list of files", "volume", "a.mhd", lambda: files.mha(data_file="LIST"), "list of files")
case("mha no header", "volume", "a.mha", b"\0" * 500, "DimSize")
case("npy of objects", "volume", "a.npy", lambda: _npy_of_objects(), "objects")
case("npy absurd shape", "volume", "a.npy", npy_header("(100000, 100000, 100000)", rest=bytes(50)), "a.npy")
case("npy negative shape", "volume", "a.npy", npy_header("(-7, -6, 5)", rest=bytes(210)), "a.npy")
case("npy zero size", "volume", "a.npy", npy_header("(0, 6, 5)"), "at least one voxel")
case("npy code in the header", "volume", "a.npy", npy_header("(__import__('os').getpid(), 1, 1)", rest=bytes(9)),
     "a.npy")  # fmt: skip
case("npy structured", "volume", "a.npy", lambda: files.npy(np.zeros((2, 2, 2), [("a", "u1"), ("b", "f4")])), "numbers")
case("npy NaN labels", "volume", "a.npy", lambda: files.npy(np.full((3, 3, 3), np.nan)), "NaN")
case("npz of objects", "volume", "a.npz", lambda: files.npz(volume=objects(), spacing_mm=np.ones(3)), "objects")
case("npz spacing of objects", "volume", "a.npz", lambda: files.npz(
    volume=files.label_array(), spacing_mm=np.array([None] * 3)), "objects")  # fmt: skip
case("npz negative spacing", "volume", "a.npz", lambda: files.npz(
    volume=files.label_array(), spacing_mm=np.array([1, -1, 1.0])), "positive")  # fmt: skip
case("npz NaN affine", "volume", "a.npz", lambda: files.npz(
    volume=files.label_array(), affine=np.full((4, 4), np.nan)), "finite")  # fmt: skip
case("npz without spacing", "volume", "a.npz", lambda: files.npz(volume=files.label_array()), "no voxel spacing")
case("npz bomb", "volume", "a.npz", lambda: zip_bomb(
    "volume.npy", npy_header("(1024, 1024, 1024)"), 1 << 30, {"spacing_mm.npy": files.npy(np.ones(3))}),
    "one value everywhere")  # fmt: skip
case("npz absurd member header", "volume", "a.npz", lambda: zip_of(
    {"volume.npy": npy_header("(1290, 1290, 1290)", rest=bytes(50)), "spacing_mm.npy": files.npy(np.ones(3))}),
    "a.npz")  # fmt: skip
case("npz member ../../x.npy", "volume", "a.npz", lambda: zip_of({"../../x.npy": files.npy()}), "volume")
case("npz encrypted flag", "volume", "a.npz", lambda: _flagged(files.npz()), "a.npz")
case("npz that is a text", "volume", "a.npz", b"PK\x03\x04 hello", "a.npz")
case("volume of an unknown suffix", "volume", "a.xyz", b"", "no volume reader")

# sparse SDFs and prepared folders
case("sdf pickled", "sdf", "a.npz", lambda: files.npz(schema_version=objects()), "objects")
case("sdf cut", "sdf", "a.npz", lambda: files.sdf(2)[:-40], "a.npz")
case("sdf a single array", "sdf", "a.npz", files.npy, "single array")
case("sdf bomb", "sdf", "a.npz", lambda: zip_bomb("block_sdf.npy", npy_header("(1, 8)"), 1 << 30, {}),
     "unpack")  # fmt: skip
case("sdf resolution 500", "sdf", "a.npz", lambda: _sdf_with(resolution=np.int64(500)), "500")
case("sdf resolution 2^62", "sdf", "a.npz", lambda: _sdf_with(resolution=np.int64(2**62)), "resolution")
case("sdf resolution NaN", "sdf", "a.npz", lambda: _sdf_with(resolution=np.float64("nan")), "a.npz")
case("sdf no blocks", "sdf", "a.npz", lambda: _sdf_with(
    block_index=np.zeros((0, 3), np.int16), block_sdf=np.zeros((0, 8, 8, 8), np.float16)), ends=EITHER)  # fmt: skip
case("sdf NaN", "sdf", "a.npz", lambda: _sdf_with(block_sdf=np.full((5, 8, 8, 8), np.nan, np.float16)), "NaN")
case("sdf blocks out of the cube", "sdf", "a.npz", lambda: _sdf_with(
    block_index=np.array([[0, 0, i] for i in range(5)], np.int16)), "[0, 4)")  # fmt: skip
case("sdf NaN to_world", "sdf", "a.npz", lambda: _sdf_with(to_world=np.full((4, 4), np.nan)), "to_world")
case("sdf 1 voxel at 2^31", "sdf", "a.npz", lambda: files.npz(
    sparse_sdf=np.zeros(1, "f4"), sparse_index=np.array([[2**31 - 1] * 3]), resolution=32), "a.npz")  # fmt: skip
case("metadata path traversal", "dataset", "metadata.csv", b"sha256,label,split\n../../../etc/passwd,x,train\n",
     "plain id")  # fmt: skip
case("metadata absolute path", "dataset", "metadata.csv", b"sha256,label,split\n/etc/passwd,x,train\n", "plain id")
case("metadata patient in two splits", "dataset", "metadata.csv",
     b"sha256,label,patient_id,split\na,x,p,train\nb,x,p,test\n", "two splits")  # fmt: skip
case("metadata count is a word", "dataset", "metadata.csv",
     f"sha256,label,split,r32_num_voxels\n{'0f' * 32},x,train,many\n".encode(), "many")  # fmt: skip
case("metadata not UTF-8", "dataset", "metadata.csv", b"sha256,label\n\xff\xfe,x\n", "metadata.csv")
case("metadata field of 1 MB", "dataset", "metadata.csv", b"sha256,label\n" + b"a" * (1 << 20) + b",x\n",
     "metadata.csv")  # fmt: skip
case("metadata empty", "dataset", "metadata.csv", b"", "sha256 is missing")
case("label table not a table", "table", "a.csv", b"\0\1\2\3", "a.csv")
case("label table of commas", "table", "a.csv", b",,,\n , ,\n", "no label name")
case("label table negative value", "table", "a.json", b'{"liver": -1}', "0 or more, got -1")
case("label table two names", "table", "a.csv", b"1,liver\n1,spleen\n", "two names")
case("label table deep JSON", "table", "a.json", b"[" * 100000, "a.json")
case("splits deep JSON", "splits", "a.json", b"[" * 100000, "a.json")
case("splits a name twice", "splits", "a.json", b'{"train": ["a"], "test": ["a"]}', "two splits")

# configs, weights, tokens
case("config misspelled key", "config", "a.json", lambda: files.config_json().replace(b'"optimizer"', b'"optimiser"'),
     "optimizer")  # fmt: skip
case("config cut", "config", "a.json", lambda: files.config_json()[:200], "JSON")
case("config deep nesting", "config", "a.json", b'{"models":' * 100000, "a.json")
case("config a list", "config", "a.json", b"[1, 2]", "object")
case("config NaN rate", "config", "a.json", lambda: files.config_json().replace(b"0.25", b"NaN", 1),
     "a.json", ends=EITHER)  # fmt: skip
case("config not UTF-8", "config", "a.json", b'{"models": "\xff"}', "a.json")
for _suffix in (".safetensors", ".ckpt", ".pth"):
    case(f"weights{_suffix} cut in half", "weights", f"a{_suffix}",
         lambda s=_suffix: files.weights(s)[: len(files.weights(s)) // 2], "weights")  # fmt: skip
case("weights that run code", "weights", "a.pth", b"cos\nsystem\n(S'touch escaped'\ntR.", "weights")
case("weights zip of text", "weights", "a.ckpt", lambda: zip_of({"archive/data.pkl": b"cos\nsystem\n."}), "a.ckpt")
case("weights header of 2^63", "weights", "a.safetensors", b"\xff" * 7 + b"\x7f{}", "a.safetensors")
case("weights of nothing", "weights", "a.safetensors", struct.pack("<Q", 2) + b"{}", "no tensors")
case("weights by another name", "weights", "a.exe", b"", "weights must be")
case("tokens cut", "tokens", "a.safetensors", lambda: files.tokens()[:-10], "a.safetensors")
case("tokens of weights", "tokens", "a.safetensors", lambda: files.weights(".safetensors"), "not of tokens")
case("tokens of another model", "decode", "a.safetensors", files.tokens, "model")
case("tokens header of 2^60", "tokens", "a.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "no valid header")
case("tokens with negative ids", "tokens", "a.safetensors", lambda: files.tokens().replace(
    struct.pack("<5i", 3, 1, 4, 1, 5), struct.pack("<5i", 3, 1, -4, 1, 5)), "ids must lie")  # fmt: skip
case("resolution 500", "resolution", "resolution", b"500", ends=REFUSED, words="500")


@folder_case("unreadable mesh", "mesh", "Permission denied")
def _unreadable_mesh(folder: Path) -> Path:
    path = files.place(folder, "a.stl", b"x")
    path.chmod(0)
    return path


@folder_case("unreadable volume", "volume", "Permission denied")
def _unreadable_volume(folder: Path) -> Path:
    path = files.place(folder, "a.nii", files.nifti())
    path.chmod(0)
    return path


for _name, _entry in (("a.npz", "sdf"), ("a.safetensors", "tokens"), ("a.json", "config"), ("a.pth", "weights"),
                      ("a.csv", "table"), ("b.json", "splits"), ("metadata.csv", "dataset")):  # fmt: skip
    def _unreadable(folder: Path, name: str = _name) -> Path:
        path = files.place(folder, name, b"x")
        path.chmod(0)
        return path

    folder_case(f"unreadable {_entry}", _entry)(_unreadable)

for _name, _entry in (("a.nii", "volume"), ("a.stl", "mesh"), ("mesh", "mesh"), ("a.npz", "sdf"), ("a.json", "config"),
                      ("a.pth", "weights"), ("a.safetensors", "tokens")):  # fmt: skip
    def _pipe(folder: Path, name: str = _name) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    def _endless(folder: Path, name: str = _name) -> Path:
        (folder / name).symlink_to("/dev/zero")
        return folder / name

    folder_case(f"a pipe called {_name} as {_entry}", _entry)(_pipe)
    folder_case(f"a link to an endless device called {_name} as {_entry}", _entry)(_endless)


@folder_case("a link to itself", "mesh", "a.stl")
def _loop(folder: Path) -> Path:
    (folder / "a.stl").symlink_to(folder / "a.stl")
    return folder / "a.stl"


@folder_case("dicom: two series", "volume", "one DICOM series")
def _two_series(folder: Path) -> Path:
    path = files.place(folder, "series/0.dcm", files.dicom_slice(1))
    other = files.dicom_slice(1).replace(b"1125.2", b"1125.9")
    (path / "other.dcm").write_bytes(other)
    return path


@folder_case("dicom: two slices at one place", "volume", "place")
def _two_at_one_place(folder: Path) -> Path:
    path = files.place(folder, "series/0.dcm", files.dicom_slice(1))
    (path / "3.dcm").write_bytes(files.dicom_slice(2).replace(b"-40\\30\\24", b"-40\\30\\22"))
    return path


@folder_case("dicom: absurd rows", "volume")
def _dicom_rows(folder: Path) -> Path:
    field = struct.pack("<HH2sHH", 0x28, 0x10, b"US", 2, 6)
    data = files.dicom_slice(1)
    assert field in data
    return files.place(folder, "series/0.dcm", data.replace(field, field[:-2] + b"\xff\xff"))


@folder_case("dicom: cut", "volume")
def _dicom_cut(folder: Path) -> Path:
    return files.place(folder, "series/0.dcm", files.dicom_slice(1)[:-60])


@folder_case("a published folder with half its weights", "pretrained", "model.safetensors")
def _half_published(folder: Path) -> Path:
    from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
    from trellis.models.pretrained import save_pretrained

    save_pretrained(SparseSDFVQVAE(model_channels=64, latent_channels=4, num_blocks=1, num_embeddings=8), folder / "m")
    weights = folder / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder / "m"


@folder_case("a data root of loops, pipes and unreadable files", "prepare", ends=RESULT)
def _wild_root(folder: Path) -> Path:
    """One good volume and one good mesh, among everything that must not stop them."""
    data = folder / "root" / "data"
    (data / "p1").mkdir(parents=True)
    (folder / "root" / "expected_shapes").write_text("3")
    (data / "p1" / "good.nii").write_bytes(files.nifti())  # two labels
    (data / "p2 é 肝").mkdir()
    (data / "p2 é 肝" / "närrisch.stl").write_bytes(files.mesh_bytes(".stl"))
    (data / os.fsdecode(b"p3 \xff")).mkdir()
    (data / os.fsdecode(b"p3 \xff") / os.fsdecode(b"\xe9.stl")).write_bytes(b"")
    (data / "p1" / "loop").symlink_to(data)
    (data / "p1" / "self").symlink_to(data / "p1" / "self")
    (data / "p1" / "dangling.stl").symlink_to("nowhere")
    os.mkfifo(data / "p1" / "pipe")
    os.mkfifo(data / "p1" / "pipe.stl")
    os.mkfifo(data / "p1" / "pipe.nii.gz")
    (data / "p1" / "endless").symlink_to("/dev/zero")
    (data / "p1" / "endless.nii").symlink_to("/dev/zero")
    closed = data / "p1" / "closed.nii"
    closed.write_bytes(files.nifti())
    closed.chmod(0)
    (data / "p4").mkdir()
    (data / "p4" / "bomb.nii.gz").write_bytes(gzip_bomb(b"", 64 << 20))
    (data / "p4" / "zeros.npz").write_bytes(files.npz(volume=np.zeros((3, 3, 3)), spacing_mm=np.ones(3)))
    (data / "p4" / "objects.npz").write_bytes(files.npz(volume=objects()))
    (data / "p4" / "dataset.json").write_bytes(b"[" * 100000)
    return folder / "root"


def _glb_with(old: bytes, new: bytes) -> bytes:
    """A GLB whose JSON is changed, its lengths corrected."""
    data = files.mesh_bytes(".glb")
    length = struct.unpack_from("<I", data, 12)[0]
    text = json.dumps(json.loads(data[20 : 20 + length]), separators=(",", ":")).encode()
    assert old in text
    text = text.replace(old, new)
    text += b" " * (-len(text) % 4)
    rest = data[20 + length :]
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest


def _laughs(data: bytes) -> bytes:
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 11))
    head = f'<!DOCTYPE GIFTI [<!ENTITY l0 "ha">{entities}]><GIFTI'.encode()
    return data.replace(b"<GIFTI", head).replace(b"<Data>", b"<Data>&l10;", 1)


def _npy_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, objects(), allow_pickle=True)
    return buffer.getvalue()


def _flagged(data: bytes) -> bytes:
    """An archive whose members claim to be encrypted."""
    result = bytearray(data)
    at = result.find(b"PK\x01\x02")
    result[at + 8] |= 1
    result[6] |= 1
    return bytes(result)


def _sdf_with(**changes) -> bytes:
    blocks = files.sdf_blocks()
    arrays = {
        "schema_version": 2, "resolution": 32, "band_voxels": 4, "block_index": blocks.block_index,
        "block_sdf": blocks.block_sdf, "to_world": blocks.to_world,
    }  # fmt: skip
    return files.npz(**{**arrays, **changes})
