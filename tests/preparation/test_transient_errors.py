"""What fails for want of memory, or of a disk or network for a moment, is tried again by the next run."""

from __future__ import annotations

import errno
import os
import pickle

import pytest
from preparation_shapes import make_patients, write_labels

from trellis.geometry import volume_readers
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.tasks import failure, read_source
from trellis.utils import mesh_utils
from trellis.utils.io_utils import UnreadableFile, is_transient, unreadable

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
TRANSIENT = [
    MemoryError(), OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.ENOMEM, "x"), OSError(errno.EMFILE, "x"), OSError(errno.ENFILE, "x"), OSError(errno.ETIMEDOUT, "x"),
    OSError(errno.EAGAIN, "x"), OSError(errno.ENOSPC, "x"), RuntimeError("Failed to allocate memory for image."),
    RuntimeError("std::bad_alloc"),
]  # fmt: skip
LASTING = [ValueError("bad"), OSError("truncated"), OSError(errno.EACCES, "x"), OSError(errno.EINVAL, "x"), EOFError(),
           RuntimeError("no such header")]  # fmt: skip


def fail_once(monkeypatch, readers: dict, suffix: str, error: Exception) -> None:
    real = readers[suffix]

    def reader(path):
        monkeypatch.setitem(readers, suffix, real)
        raise error

    monkeypatch.setitem(readers, suffix, reader)


@pytest.mark.parametrize("error", [*TRANSIENT, *LASTING], ids=repr)
@pytest.mark.parametrize("kind", ["mesh", "volume"])
def test_only_faults_of_the_machine_are_tried_again(tmp_path, monkeypatch, kind, error):
    root, out = tmp_path / "in", tmp_path / "out"
    if kind == "mesh":
        make_patients(root, 1)
        fail_once(monkeypatch, mesh_utils.READERS, ".stl", error)
    else:
        write_labels(root / "anna" / "seg.nii.gz")
        fail_once(monkeypatch, volume_readers.READERS, ".nii.gz", error)
    first = prepare_dataset(root, out, **OPTIONS)
    assert first.n_failed == 1 and first.failures[0]["stage"] == "read"
    assert prepare_dataset(root, out, **OPTIONS).n_failed == (0 if error in TRANSIENT else 1)


@pytest.mark.parametrize(("number", "again"), [(errno.ESTALE, True), (errno.EACCES, False)])
def test_a_volume_that_cannot_be_opened(tmp_path, monkeypatch, number, again):
    path = write_labels(tmp_path / "seg.nii.gz")

    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UnreadableFile, match="cannot be read: ") as caught:
        volume_readers.read_raw_volume(path)
    assert caught.value.transient is again and failure("0", "read", caught.value)["permanent"] is not again


def test_an_error_that_a_library_raises_for_another(monkeypatch, tmp_path):
    """nibabel says of a file system that does not answer that there is no such file."""
    try:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise FileNotFoundError("No such file or no access") from None
    except FileNotFoundError as error:
        assert is_transient(error) and unreadable("x", error, "words").transient
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert not is_transient(first)


def test_it_comes_back_whole_from_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableFile("a: secret", "a", True)))
    assert (str(error), error.public, error.transient) == ("a: secret", "a", True)
    assert not UnreadableFile("a", "a").transient


def test_a_fault_while_a_table_of_label_names_is_read(tmp_path, monkeypatch):
    """The table is looked at when the sources are found, and read again with its volume."""
    root, out = tmp_path / "in", tmp_path / "out"
    write_labels(root / "anna" / "seg.nii.gz")
    (root / "anna" / "seg.csv").write_text("value,name\n2,liver\n7,spleen\n")
    module = read_source.__globals__
    read_table = module["read_table"]

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    def fails(path):
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "read_bytes", refuse)
            return read_table(path)

    with monkeypatch.context() as patch:
        patch.setitem(module, "read_table", fails)
        assert prepare_dataset(root, out, **OPTIONS).n_failed == 1
    assert prepare_dataset(root, out, **OPTIONS).n_failed == 0
