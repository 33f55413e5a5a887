"""Pseudonyms for patients and sources, and texts without the names of files."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

KEY_NAME = ".patient_key"
_KEY_BYTES = 32
_HIDDEN = "<source>"


def load_or_create_key(path: str | Path) -> bytes:
    """The secret that pseudonyms are made with; created with mode 0600 where there is none.

    Whoever has the key and a list of names can find the patients: it must not travel with the dataset.

    Raises:
        ValueError: the file does not hold 64 hexadecimal digits, or others than its owner may read it.
    """
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(_KEY_BYTES) + "\n")
            try:
                os.link(temporary, path)  # fails where another process was first: then its key counts
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    text = path.read_text(encoding="ascii", errors="replace").strip()
    if not re.fullmatch(rf"[0-9a-f]{{{2 * _KEY_BYTES}}}", text):
        raise ValueError(f"{path}: a key file holds {2 * _KEY_BYTES} hexadecimal digits")
    if path.stat().st_mode & 0o077:
        os.chmod(path, 0o600)
    return bytes.fromhex(text)


def pseudonym(key: bytes, kind: str, text: str, digits: int = 16) -> str:
    """HMAC-SHA256 of `text` in hexadecimal digits; `kind` keeps patients and sources apart."""
    return hmac.new(key, f"{kind}:{text}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:digits]


def label_without_patient(label: str, patient: str) -> str:
    """A mesh's label without its patient's name: "doe_jane_liver" of patient "doe_jane" is "liver".

    Of a patient that is a path ("ward/doe") each folder's name is cut out. Names of one or two characters are left in
    (they are numbers or codes). What is left empty becomes "shape".
    """
    names = sorted({patient, *patient.split("/")}, key=len, reverse=True)
    names = [name for name in names if len(name) >= 3 and name.lower() in label.lower()]
    if not names:
        return label
    rest = re.sub("|".join(map(re.escape, names)), " ", label, flags=re.IGNORECASE)
    return re.sub(r"[\s._-]*\s[\s._-]*", "_", rest).strip("_") or "shape"


def scrub(text: str, names: Iterable[str]) -> str:
    """`text` with every given name replaced, the longest first; for messages that are kept.

    A name inside a longer word stays: a file called "trunc" must not make "<source>ated" of "truncated".
    """
    for name in sorted({name for name in names if len(name) > 2}, key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", _HIDDEN, text)
    return text


_QUOTED = re.compile(r"""(?<!\w)b?(['"])(?:\\.|(?!\1(?!\w)).)*(?:\1|\Z)""", flags=re.DOTALL)
_FORMAT_WORDS = frozenset((
    "ply", "end_header", "OFF", "glTF", "solid", "endsolid", "# vtk DataFile", "NRRD", "DICM", "volume", "spacing_mm",
    "affine", "sparse_sdf", "sparse_index", *(f".{end}" for end in (
        "stl", "ply", "obj", "off", "glb", "gltf", "gii", "vtk", "vtp", "nii", "gz", "nii.gz", "mgh", "mgz", "nrrd",
        "nhdr", "mha", "mhd", "npy", "npz",
    )),
))  # fmt: skip
"""What readers quote of their own; everything else between quotes may be text of a header."""


def hide_quoted(text: str) -> str:
    """`text` without what it quotes, save words of the formats themselves: readers quote the text that they trip over,
    and that may be a comment, a title or a name."""
    return _QUOTED.sub(lambda m: m.group() if m.group()[m.start(1) - m.start() + 1 : -1] in _FORMAT_WORDS else _HIDDEN,
                       text)  # fmt: skip


class _Watch:
    """Log records, warnings and file descriptor 2 belong to the process, and tasks may share one as threads: the first
    task puts the scrubbing up, the last one takes it down, and all names since then are scrubbed."""

    def __init__(self) -> None:
        self._lock, self._tasks, self._names, self._undo = threading.Lock(), 0, set[str](), ExitStack()

    def enter(self, names: Sequence[str]) -> None:
        with self._lock:
            self._names = self._names | set(names)
            self._tasks += 1
            if self._tasks == 1:
                self._undo.enter_context(self._scrubbing())

    def leave(self) -> None:
        with self._lock:
            self._tasks -= 1
            if self._tasks == 0:
                self._undo.close()
                self._names = set()

    @contextmanager
    def _scrubbing(self) -> Iterator[None]:
        original, show = logging.getLogRecordFactory(), warnings.showwarning

        def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = original(*args, **kwargs)
            record.msg, record.args = hide_quoted(scrub(record.getMessage(), self._names)), ()
            return record

        def warn(message: Warning | str, category: type[Warning], *rest: Any, **kwargs: Any) -> None:
            logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message)

        logging.setLogRecordFactory(make)
        warnings.showwarning = warn
        try:
            with _held_stderr() as held:
                yield
        finally:
            warnings.showwarning = show
            logging.setLogRecordFactory(original)
        if held:
            os.write(2, os.fsencode(scrub(os.fsdecode(bytes(held)), self._names)))


_watch = _Watch()


@contextmanager
def scrubbed_logs(names: Sequence[str]) -> Iterator[None]:
    """While this is open, what libraries in this process log, warn of or write to stderr loses the given names.

    Log messages and warnings lose what they quote, too. Text that libraries in C and C++ write to stderr themselves is
    held back, and given out at the end.
    """
    if not names:
        yield
        return
    _watch.enter(names)
    try:
        yield
    finally:
        _watch.leave()


@contextmanager
def _held_stderr() -> Iterator[bytearray]:
    """File descriptor 2 goes to a temporary file, of which the first MiB is in the result at the end."""
    result = bytearray()
    try:
        real = os.dup(2)
    except OSError:  # closed
        yield result
        return
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield result
            finally:
                os.dup2(real, 2)
                held.seek(0)
                result += held.read(1 << 20)
    finally:
        os.close(real)


def names_of(path: Path, data_root: Path) -> list[str]:
    """Everything by which a message could name a source: its paths, file name, stem and folders below DATA_ROOT."""
    absolute = Path(os.path.abspath(path))
    relative = Path(os.path.relpath(path, data_root))
    names = [str(path), str(absolute), str(absolute.parent), str(data_root), str(relative), path.name]
    names += [path.name.split(".")[0], path.stem, *relative.parts[:-1]]
    return [*names, *(repr(name)[1:-1] for name in names)]
