"""Results as flat rows, and the description of their fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .measure import Contender, Record, Refusal, Spread

Value = float | int | str | Spread | None

# Field of a result -> its description. Measured fields are objects with median, low and high (quartiles).
FIELDS = {
    "section": "lossless, sparse, load, memory or startup",
    "contender": "sfp, or the peer's name",
    "engine": "the engine of sfp; null for peers",
    "preset": "the preset of sfp; null for peers",
    "threads": "the maximum number of threads",
    "case": "the pruned share, or the way to load or start; null if the section has only one",
    "raw_bytes": "bytes of the decoded tensors",
    "size_bytes": "packed bytes: for sfp the whole file, for peers the encoded tensors",
    "size_ratio": "packed bytes over raw bytes",
    "bits_per_weight": "packed bits over weights, pruned ones included",
    "error_db": "10 log10 of the mean squared error over the mean square of the surviving weights",
    "encode_mb_s": "10^6 raw bytes per second",
    "encode_mweights_s": "10^6 weights per second",
    "decode_mb_s": "10^6 raw bytes per second, including opening the file",
    "decode_mweights_s": "10^6 weights per second",
    "best_size_peer": "the peer with the fewest bytes at the same thread count",
    "best_encode_peer": "the peer that encodes fastest at the same thread count",
    "best_decode_peer": "the peer that decodes fastest at the same thread count",
    "size_vs_best": "size over that of best_size_peer; below 1 is smaller",
    "encode_vs_best": "speed over that of best_encode_peer, round by round; above 1 is faster",
    "decode_vs_best": "speed over that of best_decode_peer, round by round",
    "size_vs_zipnn": "size over ZipNN's",
    "encode_vs_zipnn": "speed over ZipNN's, round by round",
    "decode_vs_zipnn": "speed over ZipNN's, round by round",
    "load_s": "seconds from the path to arrays in memory, with the file in the page cache",
    "load_mb_s": "10^6 raw bytes per second",
    "load_vs_safetensors": "speed over that of the fastest safetensors loader, round by round",
    "break_even_disk_mb_s": "the disk speed below which sfp loads faster; null if at every or no speed",
    "output_bytes": "bytes of the loaded arrays",
    "peak_extra_bytes": "peak memory while loading, minus the memory before and the loaded arrays",
    "peak_method": "VmHWM (reset before loading), or ru_maxrss (a lower bound if the peak was earlier)",
    "process_s": "seconds of a whole Python process",
    "over_numpy_s": "these seconds minus those of a process that only imports numpy, round by round",
}


@dataclass(frozen=True)
class Result:
    """The result of one contender in one section.

    Attributes:
        section: name of the section.
        contender: the contender.
        values: field of `FIELDS` -> value.
    """

    section: str
    contender: Contender
    values: dict[str, Value]

    def spread(self, field: str) -> Spread | None:
        """Returns a measured field, or None."""
        value = self.values.get(field)
        return value if isinstance(value, Spread) else None

    def number(self, field: str) -> float | None:
        """Returns a field that is one number, or the median of a measured field; else None."""
        value = self.values.get(field)
        if isinstance(value, Spread):
            return value.median
        return value if isinstance(value, (int, float)) else None

    def to_json(self) -> dict[str, object]:
        """Returns a flat JSON object."""
        who = self.contender
        values = {
            name: value.to_json() if isinstance(value, Spread) else value
            for name, value in self.values.items()
        }
        return {
            "section": self.section,
            "contender": who.name,
            "engine": who.engine,
            "preset": who.preset,
            "threads": who.threads,
            "case": who.case,
            **values,
        }


def refusal_json(section: str, refusal: Refusal) -> dict[str, object]:
    """Returns an excluded contender as a flat JSON object."""
    return {**Result(section, refusal.contender, {}).to_json(), "reason": refusal.reason}


def codec_results(section: str, records: Sequence[Record]) -> list[Result]:
    """Returns the results of records with the samples ``encode_s`` and ``decode_s``.

    Their facts are ``raw_bytes``, ``weights``, ``size_bytes``, and ``error_db`` if there is an error.
    """
    return [Result(section, record.contender, _codec_values(record, records)) for record in records]


def _codec_values(record: Record, records: Sequence[Record]) -> dict[str, Value]:
    facts = record.facts
    values: dict[str, Value] = {
        "raw_bytes": int(facts["raw_bytes"]),
        "size_bytes": int(facts["size_bytes"]),
        "size_ratio": facts["size_bytes"] / facts["raw_bytes"],
        "bits_per_weight": 8 * facts["size_bytes"] / facts["weights"],
    }
    if "error_db" in facts:
        values["error_db"] = facts["error_db"]
    for work in ("encode", "decode"):
        seconds = record.samples[f"{work}_s"]
        values[f"{work}_mb_s"] = Spread.of([facts["raw_bytes"] / s / 1e6 for s in seconds])
        values[f"{work}_mweights_s"] = Spread.of([facts["weights"] / s / 1e6 for s in seconds])
    peers = peers_beside(record.contender, records)
    if not peers:
        return values
    smallest = min(peers, key=lambda peer: peer.facts["size_bytes"])
    values["best_size_peer"] = smallest.contender.name
    values["size_vs_best"] = facts["size_bytes"] / smallest.facts["size_bytes"]
    for work in ("encode", "decode"):
        fastest = min(peers, key=_median_of(f"{work}_s"))
        values[f"best_{work}_peer"] = fastest.contender.name
        values[f"{work}_vs_best"] = speed_ratio(record, fastest, f"{work}_s")
    zipnn = next((peer for peer in peers if peer.contender.name == "zipnn"), None)
    if zipnn is not None:
        values["size_vs_zipnn"] = facts["size_bytes"] / zipnn.facts["size_bytes"]
        for work in ("encode", "decode"):
            values[f"{work}_vs_zipnn"] = speed_ratio(record, zipnn, f"{work}_s")
    return values


def _median_of(measure: str) -> Callable[[Record], float]:
    return lambda record: Spread.of(record.samples[measure]).median


def peers_beside(contender: Contender, records: Sequence[Record]) -> list[Record]:
    """Returns each peer's record in the same case, with the same number of threads if possible, else one."""
    found: dict[str, Record] = {}
    for record in records:
        who = record.contender
        if who.is_sfp or who.case != contender.case or who.threads not in (1, contender.threads):
            continue
        if who.threads == contender.threads or who.name not in found:
            found[who.name] = record
    return list(found.values())


def speed_ratio(record: Record, reference: Record, measure: str) -> Spread:
    """Returns the speed relative to a reference, paired by round, so that slow rounds affect both."""
    pairs = zip(record.samples[measure], reference.samples[measure], strict=True)
    return Spread.of([theirs / ours for ours, theirs in pairs])
