"""Names in headers, comments, paths and file names of sources are in no output byte, no log line and not on stderr."""

from __future__ import annotations

import gzip
import io
import logging
import os
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import robust_files as files

from trellis.preparation.privacy import hide_quoted, scrubbed_logs

FOLDERS = ("Quillfeather", "Ostropoler", "Wigglesworth")
HEADERS = (
    "Brimblecombe", "Czernobyliak", "Dunwoodie", "Eszterhazy", "Fotheringay", "Grimthorpe", "Hetherington",
    "Ibrahimovski", "Jellicorse", "Krasznahorkai", "Llewelyn", "Mxyzptlk", "Nightingale", "Oosterhuis", "Pfefferkorn",
    "Quatermaine", "Rumpelstilz", "Szczepanski", "Thistlethwaite", "Uxbridge",
)  # fmt: skip
"""One name a place of a header or comment, so that a leak tells where it came from."""


def nifti() -> bytes:
    """Names in descrip, aux_file, intent_name, db_name and an extension; geometry in conflict, so that it is logged."""
    data = bytearray(files.nifti())
    places = ((148, 80), (228, 24), (328, 16), (14, 18))
    for (offset, size), name in zip(places, HEADERS):
        data[offset : offset + size] = name.encode().ljust(size, b"\0")
    struct.pack_into("<fff", data, 268, 1.0, 2.0, 3.0)  # the qform's offset
    extension = struct.pack("<ii", 48, 6) + HEADERS[4].encode().ljust(40, b"\0")
    struct.pack_into("<f", data, 108, 352 + len(extension))
    return bytes(data[:348]) + b"\1\0\0\0" + extension + bytes(data[352:])


def stl() -> bytes:
    data = files.mesh_bytes(".stl")
    return f"SPACE=LPS {HEADERS[5]}".encode().ljust(80, b"\0") + data[80:]


def good_sources(root: Path) -> None:
    """Every format with a name in it, in patients' folders that are names."""
    one, two, three = (root / f"{name}_Jane" for name in FOLDERS)
    for folder in (one, two, three / f"{FOLDERS[0]}_scan"):
        folder.mkdir(parents=True)
    (one / f"{FOLDERS[0]}_scan.nii.gz").write_bytes(gzip.compress(nifti()))
    (one / "liver.stl").write_bytes(stl())
    ply = files.ascii_ply().replace(b"comment SPACE=LPS", f"comment SPACE=LPS\ncomment {HEADERS[6]}".encode())
    (one / "spleen.ply").write_bytes(ply.replace(b"9.0", b"9.5"))
    obj = f"# {HEADERS[7]}\no {HEADERS[8]}\n".encode() + files.mesh_bytes(".obj")
    (one / "kidney.obj").write_bytes(obj)
    vtk = files.vtk(False).replace(b"title", HEADERS[9].encode())
    (one / "heart.vtk").write_bytes(vtk)
    gifti = files.gifti("ASCII").replace(
        b"<DataArray", f"<MetaData><MD><Name>{HEADERS[10]}</Name><Value>x</Value></MD></MetaData><DataArray".encode(), 1
    )
    (one / "cortex.gii").write_bytes(gifti)
    (two / "brain").write_bytes(files.freesurfer().replace(b"somebody", HEADERS[11].encode()))
    header = f"# {HEADERS[12]}\ncontent: {HEADERS[13]}\nPatient:={HEADERS[14]}"
    (two / f"{FOLDERS[1]}_seg.nrrd").write_bytes(files.nrrd("gzip", header=header))
    (two / "image.mhd").write_bytes(
        files.mha(data_file=f"{FOLDERS[1]}_voxels.raw").replace(b"NDims", f"Comment = {HEADERS[15]}\nNDims".encode())
    )
    (two / f"{FOLDERS[1]}_voxels.raw").write_bytes(files.label_array().tobytes(order="F"))
    (two / f"{FOLDERS[1]}.npz").write_bytes(
        files.npz(volume=files.label_array(), affine=files.AFFINE, patient=np.str_(HEADERS[16]))
    )
    series = three / f"{FOLDERS[0]}_scan"
    for number in (0, 1, 2):
        name = f"{FOLDERS[0]}.{number}.dcm"
        (series / name).write_bytes(files.dicom_slice(number, patient=HEADERS[17]))
    gltf = files.gltf().replace(b'"version": "2.0"', f'"version": "2.0", "generator": "{HEADERS[18]}"'.encode())
    (three / "bone.gltf").write_bytes(gltf)


def bad_sources(root: Path) -> None:
    """Sources that fail, with names in the very text that the readers trip over."""
    folder = root / f"{FOLDERS[2]}_John"
    folder.mkdir(parents=True)
    name = HEADERS[19]
    (folder / "a.ply").write_bytes(files.ascii_ply().replace(b"comment SPACE", f"{name} SPACE".encode()))
    (folder / "b.ply").write_bytes(files.ascii_ply().replace(b"9.0 0.0", f"{name} 0.0".encode()))
    (folder / "c.vtk").write_bytes(files.vtk(False).replace(b"ASCII", name.encode()))
    (folder / "d.obj").write_bytes(f"v 1 {name}\n".encode())
    (folder / "e.stl").write_bytes(f"SPACE={name}".encode().ljust(80) + files.mesh_bytes(".stl")[80:])
    (folder / "f.mhd").write_bytes(files.mha(data_file=f"{name}.raw"))
    (folder / "g.nrrd").write_bytes(files.nrrd("raw").replace(b"(1.5,0,0)", f"({name},0,0)".encode()))
    (folder / "h.nhdr").write_bytes(files.nrrd("raw", header=f"data file: {name}.raw"))
    (folder / "i.npz").write_bytes(files.npz(**{name: files.label_array()}))
    gltf = files.gltf().decode()
    at = gltf.index("data:application")
    (folder / "j.gltf").write_text(gltf[:at] + f"{name}.bin" + gltf[gltf.index('"', at) :])
    (folder / "k.gii").write_bytes(files.gifti("ASCII").replace(b"<Data>", f"<Data>{name} ".encode()))
    (folder / "l.vtp").write_bytes(files.vtp("ascii").replace(b'"ascii">', f'"ascii">{name} '.encode(), 1))
    (folder / "m.mha").write_bytes(files.mha().replace(b"MET_UCHAR", name.encode()))
    (folder / "n.npy").write_bytes(files.npy(np.array([[[name]]])))
    (folder / "o.off").write_bytes(f"OFF\n{name} 1 0\n".encode())
    (folder / f"{name}.nii.gz").write_bytes(b"not packed")
    (folder / f"{name}.nii").write_bytes(files.nifti()[:400])
    (folder / "q.nrrd").write_bytes(files.nrrd(name))
    (folder / f"{name}.seg.nrrd").write_bytes(files.nrrd("gzip", header=f"Segment0_Name:=s\nSegment0_Layer:={name}"))
    (folder / "p.ply").write_bytes(files.ascii_ply().replace(b"element face", f"element {name}".encode()))
    (folder / f"{name}_series").mkdir()
    slice_of = files.dicom_slice(1, patient=name)
    (folder / f"{name}_series" / f"{name}.dcm").write_bytes(slice_of[:-60])


def every_byte(folder: Path):
    """(where, bytes) of each path's name, each file, and each packed content."""
    for path in sorted(folder.rglob("*")):
        where = str(path.relative_to(folder))
        yield "a file name", where.encode()
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield where, data
        if data[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.namelist():
                    yield f"{where}/{member}", archive.read(member)
        if data[:2] == b"\x1f\x8b":
            yield f"{where} unpacked", gzip.decompress(data)


def leaks(folder: Path, words: str, names) -> list[str]:
    """Where a name is found: as it is in any case, and as UTF-16 and UTF-32 (numpy's texts)."""
    found = []
    for where, data in [*every_byte(folder), ("what was printed", words.encode())]:
        small = data.lower()
        for name in names:
            lower = name.lower()
            if any(lower.encode(code) in small for code in ("ascii", "utf-16le", "utf-32le")):
                line = next((part for part in data.split(b"\n") if lower.encode() in part.lower()), b"")
                found.append(f"{name} in {where}: {line[:300].decode(errors='replace')}")
    return found


def prepare(root: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-c", "from trellis.cli import main; main()", "prepare", str(root), "-o", str(out),
        "--resolutions", "32", "--workers", "1", *options,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=200, cwd=root.parent)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hospital") / "data"
    good_sources(root)
    bad_sources(root)
    return root


def test_no_name_leaves_the_sources(hospital, tmp_path):
    out = tmp_path / "out"
    done = prepare(hospital, out)
    assert done.returncode == 1, done.stderr  # some sources are bad
    table = (out / "metadata.csv").read_text()
    for label in ("liver", "spleen", "kidney", "heart", "cortex", "brain", "bone"):
        assert f",{label}," in table, (label, (out / "errors.csv").read_text())
    assert len((out / "errors.csv").read_text().splitlines()) > 15
    found = leaks(out, done.stdout + done.stderr, FOLDERS + HEADERS)
    assert not found, "\n".join(found)


def encode(inputs: list[Path], out: Path) -> subprocess.CompletedProcess:
    """Encode with a small untrained model that is made for it."""
    code = (
        "import sys; from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE as Model\n"
        "from trellis.models.pretrained import save_pretrained\n"
        "options = dict(model_channels=64, latent_channels=8, num_blocks=1, num_embeddings=32, mlp_ratio=2.0)\n"
        "save_pretrained(Model(resolution=64, **options), sys.argv[2])\n"
        "from trellis.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "encode", str(out.parent / "model"), *map(str, inputs), "-o", str(out)]
    command += ["--resolution", "32"]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=200)


def test_encoding_keeps_names_to_itself_too(hospital, tmp_path):
    """No text of a header is anywhere, on the terminal neither; names of paths are not in what is written."""
    out = tmp_path / "out"
    bad = hospital / f"{FOLDERS[2]}_John"
    inputs = [p for p in sorted(hospital.rglob("*")) if p.is_dir() and any(f.is_file() for f in p.iterdir())]
    broken = tmp_path / FOLDERS[0] / "sparse_sdf" / "x_r32.npz"  # a prepared folder below a name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK" + HEADERS[19].encode())
    done = encode([*inputs, broken.parent.parent], out)
    assert done.returncode == 1, done.stderr
    assert len(list(out.glob("*.safetensors"))) > 10, done.stderr
    rows = (out / "errors.csv").read_text().splitlines()
    assert len(rows) > 20 and all(row.count("<source>") for row in rows[1:]), rows
    found = leaks(out, "", FOLDERS + HEADERS) + leaks(out, done.stdout + done.stderr, HEADERS[:19])
    assert not found, "\n".join(found)
    words = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(words) == len(rows) - 1 and any(f"{bad / 'a.ply'}: not a readable .ply mesh" in line for line in words)
    for line in words:
        where, _, reason = line.removeprefix("failed: ").partition(": ")
        assert str(tmp_path.parent) in where, "the user is told which file it is"
        assert HEADERS[19] not in reason.replace(where, ""), line


def test_names_that_were_asked_for_are_there(hospital, tmp_path):
    out = tmp_path / "out"
    done = prepare(hospital, out, "--keep-source-paths", "--keep-patient-ids")
    assert done.returncode == 1, done.stderr
    table, errors = (out / "metadata.csv").read_text(), (out / "errors.csv").read_text()
    assert f"{FOLDERS[0]}_Jane/{FOLDERS[0]}_scan.nii.gz" in table and f",{FOLDERS[1]}_Jane," in table
    assert f"{FOLDERS[2]}_John/c.vtk" in errors and HEADERS[19] in errors
    others = leaks(out, "", [name for name in HEADERS if name != HEADERS[19]])
    assert not others, "header texts are not kept even then\n" + "\n".join(others)


def test_what_readers_quote_is_hidden():
    assert hide_quoted("a line is not understood: 'Doe, Jane'") == "a line is not understood: <source>"
    assert hide_quoted("""the file's title is "Doe's" here""") == "the file's title is <source> here"
    assert hide_quoted(r"got b'Doe \' Jane', not 'ply'") == "got <source>, not 'ply'"
    assert hide_quoted("fields present: ['Doe', 'volume']") == "fields present: [<source>, 'volume']"
    assert hide_quoted("its faces' order isn't known") == "its faces' order isn't known"


def test_threads_of_one_process_share_the_scrubbing(capfd, caplog):
    """Tasks that overlap: no name passes while any of them runs, and everything is as before at the end."""
    started, done = threading.Event(), threading.Event()
    factory, show = logging.getLogRecordFactory(), warnings.showwarning

    def long_task() -> None:
        with scrubbed_logs([HEADERS[0]]):
            started.set()
            done.wait(10)
            logging.getLogger("nibabel").warning("odd header of %s", HEADERS[0])
            os.write(2, f"C speaks of {HEADERS[0]}\n".encode())

    thread = threading.Thread(target=long_task)
    thread.start()
    assert started.wait(10)
    with scrubbed_logs([HEADERS[1]]):
        os.write(2, f"C speaks of {HEADERS[1]}\n".encode())
        warnings.warn(f"title 'any' of {HEADERS[1]}", stacklevel=1)
    done.set()
    thread.join()
    assert logging.getLogRecordFactory() is factory and warnings.showwarning is show
    os.write(2, b"and the end\n")
    printed = capfd.readouterr().err
    assert "C speaks of <source>" in printed and printed.endswith("and the end\n")
    assert "odd header of <source>" in caplog.text and "title <source> of <source>" in caplog.text
    assert not any(name in printed + caplog.text for name in HEADERS[:2])
