"""Describes files that are neither `.sfp` nor safetensors, with advice for the user.

Rules: the first bytes of a file decide; its name only if these are inconclusive. Nothing is unpickled or
decompressed.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..container.preamble import MAGIC

# Enough bytes for all magic numbers below; that of a tar archive is at offset 257.
HEAD_BYTES = 512

_PICKLE = (
    "a pickled PyTorch checkpoint, which sfp does not load because pickles run code; load it with "
    "torch.load(FILE, weights_only=True) and write its tensors with safetensors.torch.save_file or "
    "sfpformat.torch.save_file"
)
_NPZ = "a NumPy archive; load it with numpy.load and write its arrays with sfpformat.numpy.save_file"
_NPY = "a single NumPy array; load it with numpy.load and write it with sfpformat.numpy.save_file"
_HDF5 = "an HDF5 file, as written by Keras; read it with h5py and write it with sfpformat.numpy.save_file"
_GGUF = "a model of llama.cpp; pack the safetensors checkpoint from which it was made"
_ONNX = "an ONNX model; pack the safetensors checkpoint from which it was exported"
_TFLITE = "a TensorFlow Lite model; pack the safetensors checkpoint from which it was made"
_TENSORFLOW = "a TensorFlow graph or checkpoint; write its tensors with safetensors first"
_FLAX = "a Flax checkpoint; write its arrays with safetensors.flax.save_file first"
_ARCHIVE = "a compressed file or an archive; unpack it first"
_LFS = "a Git LFS pointer, not the file itself; fetch the file with 'git lfs pull'"
_PAGE = "a web page: the download failed or needed a login; download the file again"
_ZEROS = "a file that starts with zeros, probably an unfinished download; download it again"

# Magic number (first bytes) -> description of the file.
_MAGIC_NUMBERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", _LFS),
    (b"GGUF", f"a GGUF file, {_GGUF}"),
    (b"lmgg", f"a GGML file, {_GGUF}"),
    (b"fmgg", f"a GGML file, {_GGUF}"),
    (b"tjgg", f"a GGML file, {_GGUF}"),
    (b"\x93NUMPY", _NPY),
    (b"\x89HDF\r\n\x1a\n", _HDF5),
    (b"\x1f\x8b", _ARCHIVE),  # gzip
    (b"\x28\xb5\x2f\xfd", _ARCHIVE),  # zstandard
    (b"\xfd7zXZ\0", _ARCHIVE),
    (b"BZh", _ARCHIVE),
    (b"7z\xbc\xaf\x27\x1c", _ARCHIVE),
)
# Suffix -> description of the file, for files without a known magic number.
_SUFFIXES = {
    ".onnx": _ONNX,
    ".pb": _TENSORFLOW,
    ".index": _TENSORFLOW,
    ".msgpack": _FLAX,
}


def is_like_safetensors(head: bytes) -> bool:
    """Returns whether a file begins as safetensors do: a length with three zero high bytes, then JSON."""
    return head[5:8] == bytes(3) and head[8:].lstrip()[:1] == b"{"


def describe(head: bytes, name: str, size: int) -> str | None:
    """Describes a file that is neither `.sfp` nor safetensors, as the end of "FILE is ...".

    Args:
        head: the first `HEAD_BYTES` bytes of the file.
        name: the name of the file.
        size: the size of the file in bytes.

    Returns:
        None if the file is not recognised, or may be `.sfp` or safetensors.
    """
    if head.startswith(MAGIC[:4]) or is_like_safetensors(head):
        return None
    if not size:
        return "empty, probably a failed download or copy; get the file again"
    for magic, words in _MAGIC_NUMBERS:
        if head.startswith(magic):
            return words
    if head.startswith(b"PK\x03\x04"):
        return _of_zip(head)
    if head[4:8] == b"TFL3":
        return _TFLITE
    if head[257:262] == b"ustar":
        return _ARCHIVE
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # PROTO of a pickle
        return _PICKLE
    if len(head) >= 16 and not any(head):
        return _ZEROS
    return _of_text(head, size) or _SUFFIXES.get(Path(name).suffix.lower())


def _of_zip(head: bytes) -> str:
    """Describes a zip archive by the name of its first member."""
    length = int.from_bytes(head[26:28], "little")
    member = head[30 : 30 + length].decode(errors="replace")
    if member.endswith(("/data.pkl", "/version", "/.format_version", "/byteorder")):
        return _PICKLE
    if member.endswith(".npy"):
        return _NPZ
    if member.endswith((".h5", "config.json", "metadata.json")):
        return "a Keras model; write its arrays with safetensors or sfpformat.numpy.save_file first"
    return "a zip archive; unpack it first"


def _of_text(head: bytes, size: int) -> str | None:
    """Describes a text file: a web page, JSON, or a server's message. Returns None for other files."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not only a character that the end of the head cuts
            return None
        text = head[: error.start].decode()
    if any(not c.isprintable() and not c.isspace() for c in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype", "<html", "<?xml", "<head", "<body")):
        return _PAGE
    shown = json.dumps(" ".join(text.split())[:60], ensure_ascii=False)
    if start.startswith(("{", "[")):
        return f"JSON that starts with {shown}, not a file of tensors"
    if size < 1 << 20:
        return f"text that starts with {shown}, not a file of tensors; download the file again"
    return None


def describe_file(path: Path) -> str | None:
    """Calls `describe` with the first bytes of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        return describe(head, path.name, file.seek(0, 2))
