"""The kernels' source as one string with all headers inlined: the input of NVRTC and the key of its cache."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent
# An installed package has the files in `kernels` beside this one; the repository in `kernels/source`.
FOLDERS = (_PACKAGE / "kernels", _PACKAGE.parents[2] / "kernels" / "source")
MAIN = "decode.cu"
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)


def folder() -> Path:
    """Returns the folder with the kernels' source."""
    return next(folder for folder in FOLDERS if (folder / MAIN).is_file())


@cache
def source() -> str:
    """Returns the whole source: every file once, before its first use."""
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda found: text_of(found[1]), text)

    return text_of(MAIN)


def kernels() -> list[str]:
    """Returns the names of the kernels."""
    found = re.findall(
        r"^extern .*__global__ void (\w+)\(|^(?:KERNEL|MULTIPLY|COUNT|PLACE)\((\w+),", source(), re.MULTILINE
    )
    return [plain or made for plain, made in found]
