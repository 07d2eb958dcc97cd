"""Chapters 6, 17 and 21: the directory's encoding, its root, features."""

from __future__ import annotations

from sfp_conformance.forge import Forge, Pairs, Raw, pack
from sfp_conformance.slow_reader import MessagePack

from .gallery import ALL, ONE, PLAIN, parts
from .suite import Edit, Suite

FORBIDDEN = {
    "nil": b"\xc0",
    "never-used": b"\xc1",
    "false": b"\xc2",
    "true": b"\xc3",
    "minus-1": b"\xff",
    "minus-32": b"\xe0",
    "int-8": b"\xd0\x01",
    "int-16": b"\xd1\x00\x01",
    "int-32": b"\xd2\x00\x00\x00\x01",
    "int-64": b"\xd3" + bytes(8),
    "float-32": b"\xca" + bytes(4),
    "float-64": b"\xcb" + bytes(8),
    "fixext-1": b"\xd4\x01\x00",
    "fixext-2": b"\xd5\x01\x00\x00",
    "fixext-4": b"\xd6\x01" + bytes(4),
    "fixext-8": b"\xd7\x01" + bytes(8),
    "fixext-16": b"\xd8\x01" + bytes(16),
    "ext-8": b"\xc7\x01\x01\x00",
    "ext-16": b"\xc8\x00\x01\x01\x00",
    "ext-32": b"\xc9\x00\x00\x00\x01\x01\x00",
}
LONG = {
    "uint-8-for-fixint": b"\xcc\x7f",
    "uint-8-for-0": b"\xcc\x00",
    "uint-16-for-uint-8": b"\xcd\x00\xff",
    "uint-32-for-uint-16": b"\xce\x00\x00\xff\xff",
    "uint-64-for-uint-32": b"\xcf" + bytes(4) + b"\xff" * 4,
    "uint-64-for-0": b"\xcf" + bytes(8),
    "str-8-for-fixstr": b"\xd9\x1f" + b"x" * 31,
    "str-8-for-empty": b"\xd9\x00",
    "str-16-for-str-8": b"\xda\x00\xff" + b"x" * 255,
    "str-32-for-str-16": b"\xdb\x00\x00\xff\xff" + b"x" * 65535,
    "bin-16-for-bin-8": b"\xc5\x00\xff" + b"x" * 255,
    "bin-32-for-bin-16": b"\xc6\x00\x00\xff\xff" + b"x" * 65535,
    "array-16-for-fixarray": b"\xdc\x00\x0f" + b"\1" * 15,
    "array-16-for-empty": b"\xdc\x00\x00",
    "array-32-for-array-16": b"\xdd\x00\x00\xff\xff" + b"\1" * 65535,
    "map-16-for-fixmap": b"\xde\x00\x01\xa1a\1",
    "map-32-for-fixmap": b"\xdf\x00\x00\x00\x01\xa1a\1",
}
STRINGS = {
    "ff": b"\xff",
    "lone-continuation": b"\x80",
    "cut-short": b"\xc3",
    "overlong-2": b"\xc0\xaf",
    "overlong-3": b"\xe0\x80\xaf",
    "overlong-4": b"\xf0\x80\x80\xaf",
    "overlong-nul": b"\xc0\x80",
    "first-surrogate": b"\xed\xa0\x80",
    "last-surrogate": b"\xed\xbf\xbf",
    "surrogate-pair": b"\xed\xa0\x80\xed\xb0\x80",
    "above-10ffff": b"\xf4\x90\x80\x80",
    "five-bytes": b"\xf8\x88\x80\x80\x80",
    "nul": b"\0",
    "nul-inside": b"a\0b",
}
CLAIMS = {
    "array-16": b"\xdc\xff\xff",
    "array-32": b"\xdd\xff\xff\xff\xff",
    "map-16": b"\xde\xff\xff",
    "map-32": b"\xdf\xff\xff\xff\xff",
    "str-8": b"\xd9\xff",
    "str-32": b"\xdb\xff\xff\xff\xff",
    "bin-32": b"\xc6\xff\xff\xff\xff",
    "nested-arrays": b"\xdd\x00\x01\x00\x00" * 10,
    "map-of-five-pairs-in-nine-bytes": b"\x85" + b"\xa0" * 9,
}


def unknown(value: object) -> Edit:
    """Returns an edit that adds a key to the root."""
    return lambda file: file.root.update({"x-a": value})


def whole(directory: bytes) -> Edit:
    """Returns an edit that replaces the directory's bytes."""
    return lambda file: setattr(file, "directory", directory)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    file = Forge.of(suite.cases[PLAIN].data)
    file.root["x-a"] = 1
    base = suite.valid("DIR-005-key-in-the-root", "a writer's own key in the root", file.build())
    for slug, raw in FORBIDDEN.items():
        suite.invalid(f"MSG-001-{slug}", f"a value of the type {slug}", base, unknown(Raw(raw)))
    keys: dict[str, object] = {"integer": 1, "binary": b"a", "array": [], "nil": Raw(b"\xc0")}
    for slug, key in keys.items():
        words = f"a map key of the type {slug}"
        suite.invalid(f"MSG-001-key-{slug}", words, base, unknown(Pairs([(key, 1)])))
    for slug, raw in LONG.items():
        suite.invalid(
            f"MSG-002-{slug}", f"an encoding that is not the shortest: {slug}", base, unknown(Raw(raw))
        )
        suite.valid(
            f"MSG-002-{slug}-mended",
            "the same value in the shortest encoding",
            _with_unknown(_Lenient(raw).value()),
        )
    for slug, raw in STRINGS.items():
        own = bytes([0xA0 + len(raw)]) + raw
        suite.invalid(f"MSG-003-{slug}", f"a string with {slug}", base, unknown(Raw(own)))
        if slug in ("lone-continuation", "nul", "overlong-2"):
            keyed = Raw(b"\x81" + own + b"\1")
            suite.invalid(f"MSG-003-{slug}-in-a-key", f"a key with {slug}", base, unknown(keyed))
    _text(suite)
    _keys(suite, base)
    _ends(suite, base)
    _root(suite)


def _with_unknown(value: object) -> bytes:
    file = Forge(root={"x-a": value}, parts=[parts()["flags"]])
    return file.build()


class _Lenient(MessagePack):
    """Parses MessagePack and accepts encodings that are not the shortest."""

    def sized(self, width: int, least: int) -> int:
        return int.from_bytes(self.take(width), "big")


def _text(suite: Suite) -> None:
    texts = ["é", "e\u0301", "\u007f", "\u0080", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff"]
    texts += ["\U00010000", "\U0010ffff", "\ufeff", "\u202e", "\x1b[2J", "../../etc/passwd", "%n", "{{7*7}}"]
    texts += ['"\\\n\r\t\x01', ""]
    file = Forge(root={"metadata": {text: text[::-1] for text in texts}}, parts=[parts()["flags"]])
    suite.valid("MSG-003-every-kind-of-string", "strings from U+0001 to U+10FFFF", file.build(), "R-STR-004")
    for size in (31, 32, 255, 256, 65535, 65536):
        long = Forge(root={"metadata": {"k": "x" * size}}, parts=[parts()["flags"]])
        suite.valid(f"MSG-002-string-{size}", f"a string of {size} bytes", long.build())
    for size in (0, 255, 256, 65536):
        suite.valid(f"MSG-002-binary-{size}", f"a binary of {size} bytes", _with_unknown(bytes(size)))
    for size in (0, 15, 16, 65535, 65536):
        suite.valid(f"MSG-002-array-{size}", f"an array of {size}", _with_unknown([7] * size))
    for size in (0, 15, 16):
        many = {format(i, "05d"): 1 for i in range(size)}
        suite.valid(f"MSG-002-map-{size}", f"a map of {size} pairs", _with_unknown(many))
    for number in (0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        suite.valid(f"MSG-002-integer-{number}", f"the integer {number}", _with_unknown(number))


def _keys(suite: Suite, base: str) -> None:
    for slug, first, second in (
        ("letters", "b", "a"),
        ("prefix", "aa", "a"),
        ("bytes-not-letters", "é", "z"),
        ("empty-last", "a", ""),
        ("utf-16-order", "\U00010000", "\uff61"),
    ):
        pairs = Pairs([(first, 1), (second, 2)])
        twin = suite.valid(
            f"MSG-004-{slug}", "keys in the order of their bytes", _with_unknown(Pairs(pairs[::-1]))
        )
        suite.invalid(f"MSG-004-{slug}", "keys out of order", twin, unknown(pairs))
    again = unknown(Pairs([("a", 1), ("b", 1), ("a", 1)]))
    words = "a key that is repeated after another key"
    suite.invalid("MSG-004-again-further-on", words, base, again, plainly="R-MSG-005")
    suite.invalid("MSG-005-root", "a key twice in an unknown map", base, unknown(Pairs([("a", 1), ("a", 1)])))
    for name in ("mask", "fingerprints", "scale", "importance"):

        def twice(file: Forge, name: str = name) -> None:
            entry = file.part("uniform").entry
            pairs = sorted(entry[name].items())
            entry[name] = Pairs([pairs[0], *pairs])

        suite.invalid(f"MSG-005-{name}", f"a key twice in {name}", ONE["uniform"], twice)

    def last_twice(file: Forge) -> None:
        pairs = sorted(file.parts[0].full_entry().items())
        file.root["tensors"] = [Pairs([*pairs, pairs[-1]])]

    suite.invalid("MSG-005-entry", "a key twice in a tensor entry", ONE["uniform"], last_twice)


def _ends(suite: Suite, base: str) -> None:
    for slug, more in (("zero", b"\0"), ("map", b"\x80"), ("never-used", b"\xc1"), ("many", bytes(100))):

        def longer(file: Forge, more: bytes = more) -> object:
            return whole(file.directory_bytes() + more)(file)

        words = f"{len(more)} bytes after the root inside the directory"
        suite.invalid(f"MSG-006-{slug}", words, PLAIN, longer)
    size = len(Forge.of(suite.cases[PLAIN].data).directory_bytes())
    for length in (0, 1, 9, size // 2, size - 2, size - 1):

        def short(file: Forge, length: int = length) -> None:
            file.directory = file.directory_bytes()[:length]

        suite.invalid(f"MSG-007-first-{length}-bytes", "a directory that ends within its value", PLAIN, short)
    for slug, raw in CLAIMS.items():
        words = f"a count or length beyond the end of the directory: {slug}"
        suite.invalid(f"MSG-007-claim-{slug}", words, base, unknown(Raw(raw)), tags=["hostile"])


def _root(suite: Suite) -> None:
    for slug, raw in (("array", b"\x90"), ("integer", b"\x01"), ("string", b"\xa0"), ("binary", b"\xc4\x00")):
        suite.invalid(f"DIR-001-{slug}", f"a root of the type {slug}", PLAIN, whole(raw))
    no_tensors = whole(pack({"metadata": {"a": "b"}}))
    suite.invalid("DIR-002-no-tensors", "a root without `tensors`", PLAIN, no_tensors)
    wrong: dict[str, tuple[str, object]] = {
        "features-string": ("features", "delta"),
        "features-of-integers": ("features", [1]),
        "metadata-array": ("metadata", ["a"]),
        "metadata-integer": ("metadata", {"a": 1}),
        "metadata-binary": ("metadata", {"a": b"b"}),
        "metadata-map": ("metadata", {"a": {"b": "c"}}),
        "tensors-map": ("tensors", {}),
        "tensors-of-integers": ("tensors", [1]),
        "tensors-of-strings": ("tensors", ["name"]),
    }
    for slug, (key, value) in wrong.items():
        edit = _root_edit(key, value)
        suite.invalid(f"DIR-003-{slug}", f"a root value of the wrong type: {slug}", PLAIN, edit)
    suite.invalid("DIR-004-features", "`features` that are empty", PLAIN, _root_edit("features", []))
    suite.invalid("DIR-004-metadata", "`metadata` that are empty", PLAIN, _root_edit("metadata", {}))
    names = {"later": ["later"], "private": ["x-mine"], "empty-name": [""], "four": ["a", "aa", "b", "é"]}
    for slug, features in names.items():
        edit = _root_edit("features", features)
        suite.invalid(f"FEA-001-{slug}", "an unknown feature", PLAIN, edit, tags=["future"])
    orders = {"order": ["b", "a"], "twice": ["a", "a"], "prefix": ["aa", "a"], "bytes": ["é", "z"]}
    for slug, features in orders.items():
        edit = _root_edit("features", features)
        suite.invalid(f"FEA-002-{slug}", "features that are not in ascending order", PLAIN, edit)
    _unknown_keys(suite)


def _root_edit(key: str, value: object) -> Edit:
    return lambda file: file.root.update({key: value})


def _unknown_keys(suite: Suite) -> None:
    more = {"x-mine": {"a": [1, "b", b"c"]}, "A": 0, "zz": "later"}
    file = Forge.of(suite.cases[ALL].data)
    for part in file.parts:
        for fields in (part.entry, *(v for v in part.entry.values() if isinstance(v, dict))):
            fields.update(more)
    file.root |= more
    words = "unknown keys in every map"
    suite.valid("DIR-005-in-every-map", words, file.build(), "R-DIR-006")
    file = Forge.of(suite.cases[PLAIN].data)
    file.root["metadata"] = {"sfp.reserved": "a", "format": "pt", "": ""}
    suite.valid("DIR-005-reserved-metadata", "metadata with reserved and empty keys", file.build())
