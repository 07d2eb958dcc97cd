"""The error class of commands, and checks of the files that the user names."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileFault, RemoteError, SfpError
from ..io.paths import file_path
from ..io.remote.location import Location, is_url
from ..io.safetensors import SafetensorsError
from .foreign import HEAD_BYTES, describe_file, is_like_safetensors

PathLike = str | os.PathLike[str] | Location


class CommandError(Exception):
    """The command cannot do what the user asked. Carries a message of one line, and the exit code."""

    def __init__(self, words: str, code: int = 2) -> None:
        super().__init__(words)
        self.code = code


def message_of(error: Exception) -> str:
    """Returns the text for the user that describes an error."""
    if isinstance(error, (CommandError, SfpError)):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {error} (a bug in sfp; SFP_DEBUG=1 prints the traceback)"


@contextmanager
def path_in_errors(path: PathLike) -> Iterator[None]:
    """Adds the path of a file to errors raised inside.

    For a file of another format, the message describes that format.

    Raises:
        CommandError: in place of an `SfpError`.
    """
    try:
        yield
    except SfpError as error:
        if isinstance(error, RemoteError):  # it names the file
            raise CommandError(str(error)) from error
        words = other_kind(path, error)
        raise CommandError(f"{path}: {error}" if words is None else f"{path}: is {words}") from error
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def other_kind(path: PathLike, error: SfpError) -> str | None:
    """Describes a file that was refused because it is of another format; else None.

    Args:
        path: the file.
        error: the error that refused it.
    """
    if isinstance(path, Location) or is_url(path):
        return None
    path = Path(path)
    is_about_it = isinstance(error, SafetensorsError) or (
        isinstance(error, FileFault) and error.code in ("E_MAGIC", "E_TRUNCATED")
    )
    if not is_about_it or path.suffix == ".json":  # for an index, the error is specific enough
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if isinstance(error, FileFault) and is_like_safetensors(head):
            return "a safetensors file; 'sfp pack' converts it to .sfp"
        return describe_file(path)
    except OSError:
        return None


def local_path(path: PathLike, what: str) -> Path:
    """Returns a path on this machine.

    Raises:
        CommandError: it is a URL.
    """
    found = file_path(path)
    if isinstance(found, Location):
        raise CommandError(f"{found}: {what} reads files on this machine only; download the file first")
    return found


def require_file(path: PathLike) -> None:
    """Checks that a path is a regular file, and not a pipe, device or folder. A file behind a URL passes.

    Raises:
        CommandError: it is not a regular file.
        OSError: it does not exist, or cannot be accessed.
    """
    if isinstance(path, Location):
        return
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CommandError(f"{path}: not a regular file (a folder, pipe or device)")


# Suffixes of other kinds of files; a suggested name replaces them and keeps all others (``model-0.5B``).
_OTHER_KINDS = (
    *(".sfp", ".safetensors", ".json", ".index", ".jsonl", ".partial", ".tmp"),
    *(".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".onnx", ".npz", ".npy", ".h5"),
    *(".hdf5", ".pb", ".tflite", ".msgpack", ".zip", ".gz", ".zst", ".xz", ".tar"),
    *(".txt", ".xml", ".html", ".htm", ".png", ".svg", ".pdf", ".jpg"),
)


def require_suffix(target: str | os.PathLike[str], *suffixes: str, what: str) -> None:
    """Checks that the name of an output file has the right suffix. Devices may have any name.

    Args:
        target: the file to write.
        suffixes: the allowed suffixes, the usual one first.
        what: the command or option, for the message.

    Raises:
        CommandError: the suffix is wrong, and the message suggests a name; or the name is empty.
    """
    if not os.fspath(target):
        raise CommandError(f"{what}: the name of the file to write is empty")
    for path in (Path(target), Path(os.path.realpath(target))):  # writing follows links
        device = path.exists() and not (path.is_file() or path.is_dir())
        if path.suffix.lower() in suffixes or device:
            continue
        if path.is_dir():
            raise CommandError(
                f"{target}: is a folder; name a file in it, such as {path / f'model{suffixes[0]}'}"
            )
        name = path.name
        while Path(name).suffix.lower() in _OTHER_KINDS:
            name = Path(name).stem
        right = " or ".join(suffixes)
        raise CommandError(f"{path}: {what} writes {right}; name it {path.with_name(name + suffixes[0])}")


def checked_target(target: str | os.PathLike[str], sources: list[Path]) -> Path:
    """Returns the path of an output file with links resolved.

    Raises:
        CommandError: it is one of the sources, is not a regular file, or its folder does not exist.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and not path.is_file():
        raise CommandError(f"{target}: is not a regular file and cannot be replaced")
    if not path.parent.is_dir():
        raise CommandError(f"{target}: there is no folder {path.parent}; make it first")
    for source in sources:
        if path.exists() and path.samefile(source):
            raise CommandError(f"{target}: is an input file; give -o another name")
    return path
