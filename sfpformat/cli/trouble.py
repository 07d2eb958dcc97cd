"""What a command tells its user when it cannot go on."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileFault, SfpError
from ..io.safetensors import SafetensorsError
from .foreign import describe_file

PathLike = str | os.PathLike[str]


class Trouble(Exception):
    """One line for the user, and the exit code."""

    def __init__(self, words: str, code: int = 2) -> None:
        super().__init__(words)
        self.code = code


@contextmanager
def about(path: PathLike) -> Iterator[None]:
    """Adds the file to what is raised inside; of a file of another kind it says which."""
    try:
        yield
    except SfpError as error:
        words = other_kind(path, error)
        raise Trouble(f"{path}: {error}" if words is None else f"{path}: is {words}") from error
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def other_kind(path: PathLike, error: SfpError) -> str | None:
    """What a file is that could not be opened because it is neither `.sfp` nor safetensors; else None.

    Args:
        error: by which it was refused.
    """
    path = Path(path)
    is_about_it = isinstance(error, SafetensorsError) or (
        isinstance(error, FileFault) and error.code in ("E_MAGIC", "E_TRUNCATED")
    )
    if not is_about_it or path.suffix == ".json":  # what is wrong with an index the error says
        return None
    try:
        return describe_file(path)
    except OSError:
        return None


def require_file(path: PathLike) -> None:
    """Refuses what cannot be read at any place: pipes, devices, folders.

    Raises:
        Trouble: it is not a file.
        OSError: it is not there, or may not be looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Trouble(f"{path}: not a file that can be read at any place (a folder, pipe or device)")


# Suffixes that promise another kind of file; a new name replaces them and keeps all others (``model-0.5B``).
_OTHER_KINDS = (
    *(".sfp", ".safetensors", ".json", ".index", ".jsonl", ".partial", ".tmp"),
    *(".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".npz", ".npy", ".h5"),
    *(".hdf5", ".pb", ".tflite", ".msgpack", ".zip", ".gz", ".zst", ".xz", ".tar"),
    *(".txt", ".xml", ".html", ".htm", ".png", ".svg", ".pdf", ".jpg"),
)


def require_suffix(target: PathLike, *suffixes: str, what: str) -> None:
    """Refuses a name that promises another kind of file than the one that is written; devices have any name.

    Args:
        target: the file to write.
        suffixes: those that are right, the usual one first.
        what: who writes, for the message.

    Raises:
        Trouble: the name ends otherwise; the message says which name to give.
    """
    for path in (Path(target), Path(os.path.realpath(target))):  # a link is followed when it is replaced
        device = path.exists() and not (path.is_file() or path.is_dir())
        if path.suffix.lower() in suffixes or device:
            continue
        if path.is_dir():
            raise Trouble(f"{target}: is a folder; name a file in it, such as {path / f'model{suffixes[0]}'}")
        name = path.name
        while Path(name).suffix.lower() in _OTHER_KINDS:
            name = Path(name).stem
        right = " or ".join(suffixes)
        raise Trouble(f"{path}: {what} writes {right}; name it {path.with_name(name + suffixes[0])}")


def checked_target(target: PathLike, sources: list[Path]) -> Path:
    """The file that a command will replace, with links followed.

    Raises:
        Trouble: it is one of the sources, something else than a file, or in no folder.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise Trouble(f"{target}: cannot be replaced, it is not a file")
    if not path.parent.is_dir():
        raise Trouble(f"{target}: there is no folder {path.parent}")
    for source in sources:
        if path.exists() and path.samefile(source):
            raise Trouble(f"{target}: is what is read; give -o another name")
    return path
