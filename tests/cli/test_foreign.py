"""Files of foreign kinds, and unusual safetensors files that the reference implementation accepts."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

import sfpformat
from sfpformat.cli.foreign import describe

from .test_main import error_of, make, run

Capture = pytest.CaptureFixture[str]


def torch_bytes(legacy: bool = False) -> bytes:
    """A checkpoint as `torch.save` writes it."""
    out = io.BytesIO()
    torch.save({"w": torch.ones(3)}, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def npz_bytes() -> bytes:
    """An archive as `numpy.savez` writes it."""
    out = io.BytesIO()
    np.savez(out, w=np.ones(3))
    return out.getvalue()


def npy_bytes() -> bytes:
    """An array as `numpy.save` writes it."""
    out = io.BytesIO()
    np.save(out, np.ones(3))
    return out.getvalue()


def zip_bytes(member: str) -> bytes:
    """An archive with one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(member, "x")
    return out.getvalue()


# Name of a file, its contents, and a part of the message.
FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "torch": (
        "pytorch_model.bin",
        torch_bytes(),
        "is a pickled PyTorch checkpoint, which sfp does not load",
    ),
    "legacy torch": (
        "m.pth",
        torch_bytes(True),
        "is a pickled PyTorch checkpoint, which sfp does not load",
    ),
    "torch, called safetensors": ("m.safetensors", torch_bytes(), "is a pickled PyTorch checkpoint"),
    "torch, called sfp": ("m.sfp", torch_bytes(), "is a pickled PyTorch checkpoint"),
    "GGUF": ("m.gguf", b"GGUF\3\0\0\0" + bytes(50), "is a GGUF file, a model of llama.cpp"),
    "npz": ("m.npz", npz_bytes(), "is a NumPy archive; load it with numpy.load"),
    "npy": ("m.npy", npy_bytes(), "is a single NumPy array"),
    "ONNX": ("m.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.4.0", "is an ONNX model"),
    "TensorFlow Lite": ("m", b"\x1c\0\0\0TFL3" + bytes(20), "is a TensorFlow Lite model"),
    "Keras": ("m.keras", zip_bytes("config.json"), "is a Keras model"),
    "HDF5": ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(20), "is an HDF5 file"),
    "gzip": (
        "m.safetensors.gz",
        b"\x1f\x8b\x08" + bytes(9),
        "is a compressed file or an archive; unpack it first",
    ),
    "tar": ("m.tar", b"m".ljust(257, b"\0") + b"ustar\0" + bytes(249), "is a compressed file or an archive"),
    "zip": ("m.zip", zip_bytes("a.txt"), "is a zip archive"),
    "Git LFS": (
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "is a Git LFS pointer, not the file itself; fetch the file with 'git lfs pull'",
    ),
    "web page": ("model.safetensors", b"\n<!DOCTYPE html><html><body>Log in", "is a web page: the download"),
    "message": (
        "model.safetensors",
        b"Entry not found\x0a",
        'is text that starts with "Entry not found"',
    ),
    "error": ("model.sfp", b'{"error": "gated"}', "is JSON that starts with"),
    "empty": ("model.safetensors", b"", "is empty, probably a failed download or copy"),
    "empty sfp": ("model.sfp", b"", "is empty, probably a failed download or copy"),
    "zeros": ("model.safetensors", bytes(5000), "is a file that starts with zeros"),
    "noise": ("model", b"\xf0\x01\x02\x03" * 9, "is neither an .sfp nor a safetensors file"),
}


@pytest.mark.parametrize(("name", "data", "told"), FOREIGN.values(), ids=FOREIGN)
def test_every_command_names_the_kind_of_a_foreign_file(
    name: str, data: bytes, told: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    make(Path("good.safetensors"))
    Path("in").mkdir()
    assert run("pack", "good.safetensors", "-o", "good.sfp") == 0
    before = sorted(os.listdir())
    capsys.readouterr()
    for words in (
        ("pack", name, "-o", "new.sfp"),
        ("pack", "good.safetensors", "-o", "new.sfp", "--importance", name),
        ("unpack", name, "-o", "new.safetensors"),
        ("info", name),
        ("diff", name, "good.sfp"),
        ("diff", "good.sfp", name),
        ("bench", name),
    ):
        line = error_of(capsys, *words)
        assert line.startswith(f"sfp: error: {name}: {told}"), words
        assert len(line) < 320
    if name != "model":  # of which nothing is known
        line = error_of(capsys, "prune", name, "--sparsity", "0.5", "-o", "new.sfp")
        assert line.startswith(f"sfp: error: {name}: {told}")
        assert run("verify", name) == 1
        assert f"\n{name}: {told}" in capsys.readouterr().out
        assert run("verify", name, "--json") == 1
        assert json.loads(capsys.readouterr().out)[0]["kind"].startswith(told.removeprefix("is "))
    assert sorted(os.listdir()) == before


def test_pickles_are_recognised_without_being_loaded(tmp_path: Path, capsys: Capture) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for legacy in (False, True):
        torch.save({"w": Trap()}, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
        error_of(capsys, "pack", tmp_path / "m.bin", "-o", tmp_path / "m.sfp")
        assert run("verify", tmp_path / "m.bin") == 1
        capsys.readouterr()
    assert os.listdir(tmp_path) == ["m.bin"]


def test_sfp_and_safetensors_files_are_not_mistaken_for_foreign_files(tmp_path: Path) -> None:
    assert run("pack", make(tmp_path / "m.safetensors"), "-o", tmp_path / "m.sfp") == 0
    for name in ("m.safetensors", "m.sfp"):
        data = (tmp_path / name).read_bytes()
        for length in (*range(9, 40), len(data) - 1, len(data)):
            for called in (name, "m.onnx"):
                assert describe(data[: min(length, 512)], called, length) is None


def test_a_folder_with_foreign_models_is_refused_with_their_kind(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.json").write_text("{}")
    target = tmp_path / "m.sfp"
    assert error_of(capsys, "pack", tmp_path, "-o", target).endswith("and no index of shards\n")
    (tmp_path / "pytorch_model.bin").write_bytes(torch_bytes())
    told = error_of(capsys, "pack", tmp_path, "-o", target)
    assert "no index of shards; pytorch_model.bin is a pickled PyTorch checkpoint" in told
    for folder in ("unet", "vae"):
        (tmp_path / folder).mkdir()
        make(tmp_path / folder / "model.safetensors")
    told = error_of(capsys, "pack", tmp_path, "-o", target)
    assert told.endswith("no index of shards; name one of its folders: 'unet', 'vae'\n")


def test_a_truncated_download_is_reported_as_cut_off(tmp_path: Path, capsys: Capture) -> None:
    source = make(tmp_path / "m.safetensors")
    data = source.read_bytes()
    for length in (4, 8, 100, len(data) - 1):
        source.write_bytes(data[:length])
        told = error_of(capsys, "pack", source, "-o", tmp_path / "m.sfp")
        assert "cut off" in told or "only 4 bytes" in told


# --------------------------------------------------------------------------- safetensors at their edges


def raw(path: Path, fields: dict[str, Any], data: bytes = bytes(48)) -> Path:
    """A safetensors file with any header, which the reference implementation can open."""
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with safe_open(path, "pt") as file:
        assert len(list(file.keys())) == len(set(fields) - {"__metadata__"})
    return path


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (12,), start: int = 0) -> dict[str, Any]:
    """The header's entry for a tensor of 48 bytes."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + 48]}


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_smaller_than_a_byte_are_restored(dtype: str, tmp_path: Path, capsys: Capture) -> None:
    shape = (3, 32) if dtype == "F4" else (2, 32)
    source = raw(
        tmp_path / "m.safetensors", {"w": tensor(dtype, shape), "x": tensor(start=48)}, bytes(range(96))
    )
    target = tmp_path / "m.sfp"
    assert run("pack", source, "-o", target, "--verify") == 0
    with sfpformat.open(target) as file:
        info = file.info("w")
        assert (info.dtype, info.unknown) == ("U8", {"x-safetensors": {"dtype": dtype, "shape": list(shape)}})
        assert file.get_tensor("w").tobytes() == bytes(range(48))
        assert file.info("x").unknown == {}
    assert run("verify", target, "--canonical") == 0
    assert run("diff", source, target) == 0
    assert run("unpack", target, "-o", tmp_path / "n.safetensors") == 0
    with safe_open(tmp_path / "n.safetensors", "pt") as file:
        assert file.get_slice("w").get_dtype() == dtype
        assert file.get_slice("w").get_shape() == list(shape)
    assert run("diff", source, tmp_path / "n.safetensors") == 0
    capsys.readouterr()
    assert run("info", target) == 0
    assert f"U8 of {dtype}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "kept",
    [
        {"dtype": "F5", "shape": [96]},
        {"dtype": "F4", "shape": [95]},
        {"dtype": "F4", "shape": ["96"]},
        {"dtype": "F4"},
        {"dtype": ["F4"], "shape": [96]},
        "F4",
    ],
)
def test_a_key_that_does_not_fit_its_tensor_counts_as_unknown(kept: object, tmp_path: Path) -> None:
    with sfpformat.Writer(tmp_path / "m.sfp") as writer:
        writer.add("w", np.zeros(48, np.uint8), other={"x-safetensors": kept})
        writer.add("f", np.zeros(4096, np.float32), other={"x-safetensors": {"dtype": "F4", "shape": [96]}})
    assert run("unpack", tmp_path / "m.sfp", "-o", tmp_path / "n.safetensors") == 0
    with safe_open(tmp_path / "n.safetensors", "np") as file:
        assert file.get_slice("w").get_dtype() == "U8"
        assert file.get_slice("f").get_dtype() == "F32"


def test_bool_bytes_other_than_0_and_1_are_packed_as_1(tmp_path: Path, capsys: Capture) -> None:
    source = raw(tmp_path / "m.safetensors", {"w": tensor("BOOL", (48,))}, b"\xff\0\1" * 16)
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--verify") == 0
    told = capsys.readouterr().err
    assert told == "sfp: warning: tensor 'w': 16 BOOL values are neither 0 nor 1; they are read as 1\n"
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.get_tensor("w").tolist() == [True, False, True] * 16


def test_names_and_metadata_that_sfp_cannot_hold_are_refused_before_writing(
    tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "m.sfp"
    for fields, told in (
        ({"": tensor()}, "a tensor has an empty name, which .sfp does not allow; rename it"),
        ({"a\0": tensor()}, "'a\\x00' cannot be a tensor's name: names are UTF-8 without U+0000; rename it"),
        (
            {"layer." * 200 + "w": tensor()},
            "(1,201 characters): name_bytes would be 1,201, but readers accept at most 1,024",
        ),
        (
            {"__metadata__": {"a": "\0"}, "w": tensor()},
            "metadata 'a': .sfp requires UTF-8 without U+0000; replace it with --metadata a=VALUE",
        ),
        (
            {"__metadata__": {"a\0": ""}, "w": tensor()},
            ".sfp requires UTF-8 without U+0000; omit all metadata with --no-metadata",
        ),
    ):
        line = error_of(capsys, "pack", raw(tmp_path / "m.safetensors", fields), "-o", target)
        assert f"{tmp_path / 'm.safetensors'}: " in line
        assert told in line
        assert len(line) - len(str(tmp_path)) < 400
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_name_over_the_limit_is_packed_with_a_higher_limit(tmp_path: Path) -> None:
    source, limit = raw(tmp_path / "m.safetensors", {"layer." * 200 + "w": tensor()}), "name_bytes=1201"
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--verify", "--limit", limit) == 0
    assert run("diff", source, tmp_path / "m.sfp", "--limit", limit) == 0


def test_metadata_that_sfp_cannot_hold_can_be_replaced_or_omitted(tmp_path: Path) -> None:
    source = raw(tmp_path / "m.safetensors", {"__metadata__": {"a": "\0", "b": "c"}, "w": tensor()})
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--metadata", "a=x") == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.metadata() == {"a": "x", "b": "c"}
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--no-metadata", "--metadata", "d=x") == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.metadata() == {"d": "x"}


def test_null_metadata_and_recent_dtypes_are_packed(tmp_path: Path) -> None:
    fields = {"__metadata__": None, "w": tensor("F8_E8M0", (48,)), "x": tensor("F8_E5M2FNUZ", (48,), 48)}
    source = raw(tmp_path / "m.safetensors", fields, bytes(range(96)))
    assert run("pack", source, "-o", tmp_path / "m.sfp", "--verify") == 0
    with sfpformat.open(tmp_path / "m.sfp") as file:
        assert file.get_tensor("w").dtype == ml_dtypes.float8_e8m0fnu
        assert file.get_tensor("x").tobytes() == bytes(range(48, 96))
