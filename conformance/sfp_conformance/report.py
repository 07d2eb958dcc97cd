"""Reports of results: JUnit XML for build servers, and a page of HTML for people."""

from __future__ import annotations

import html
from collections import Counter, defaultdict
from collections.abc import Iterable
from xml.etree import ElementTree

from .judge import BAD, PASS, SKIP, UNSUPPORTED
from .run import Outcome, Results
from .suite import Suite

_LEFT_OUT = (UNSUPPORTED, SKIP)
_SHOWN = 3  # failures shown per clause; the others are collapsed
_STYLE = """
:root { color-scheme: light dark; --ok: #2e7d32; --bad: #c62828; --skip: #8a6d00; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; width: 5rem }
code { font-size: .9em }
td:first-child code { white-space: nowrap }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem } a { color: inherit }
.chips a { display: inline-block; border: 1px solid var(--bad); border-radius: 1rem; padding: .1rem .7rem;
  margin: .15rem .3rem .15rem 0; text-decoration: none; white-space: nowrap }
.chips b { color: var(--bad) }
.ok { color: var(--ok) } .bad { color: var(--bad); font-weight: 600 }
.skip { color: var(--skip) } .none { opacity: .45 }
.verdict { font-size: 1.2rem; padding: .6rem 1rem; border-left: .4rem solid }
input { font: inherit; padding: .3rem .5rem; width: 20rem; margin: .3rem 0 }
details { margin: .1rem 0 } summary { cursor: pointer }
"""
_SCRIPT = """
document.querySelector('input').addEventListener('input', e => {
  const words = e.target.value.toLowerCase();
  for (const row of document.querySelectorAll('tr[data-words]'))
    row.hidden = !row.dataset.words.includes(words);
});
"""


def counted(outcomes: Iterable[Outcome]) -> Counter[str]:
    """Counts the outcomes."""
    return Counter(outcome.verdict.outcome for outcome in outcomes)


def junit(results: Results) -> bytes:
    """Returns the results as JUnit XML: a suite per role, a test per case."""
    root = ElementTree.Element("testsuites", time=f"{results.seconds:.3f}")
    by_role: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in results.outcomes:
        by_role[outcome.role].append(outcome)
    for role, outcomes in by_role.items():
        failed = sum(o.bad for o in outcomes)
        skipped = sum(o.verdict.outcome in _LEFT_OUT for o in outcomes)
        numbers = {"tests": str(len(outcomes)), "failures": str(failed), "skipped": str(skipped)}
        suite = ElementTree.SubElement(root, "testsuite", {"name": f"sfp {role}", **numbers})
        for o in outcomes:
            test = ElementTree.SubElement(
                suite, "testcase", name=o.case.id, classname=o.case.clauses[0], time=f"{o.seconds:.6f}"
            )
            if o.bad:
                ElementTree.SubElement(test, "failure", type=o.verdict.outcome, message=_printable(o.words))
            elif o.verdict.outcome in _LEFT_OUT:
                ElementTree.SubElement(test, "skipped", message=_printable(o.words))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _printable(words: str) -> str:
    """Replaces unprintable characters, some of which XML forbids, by question marks."""
    return "".join(c if c.isprintable() else "?" for c in words)


def page(results: Results) -> str:
    """Returns the results as one self-contained page: first the failures, then all clauses."""
    bad = results.bad
    passed = '<p class="verdict ok">All cases passed.</p>'
    failed = f'<p class="verdict bad">{len(bad)} of {len(results.outcomes)} cases failed.</p>'
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>SFP conformance</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>SFP conformance</h1>",
        failed if bad else passed,
        _programs(results),
        _failures(bad),
        "<h2>Clauses</h2><input placeholder='clause, case, word …' aria-label=filter>",
        _matrix(results),
        f"<script>{_SCRIPT}</script></html>",
    ]
    return "\n".join(parts)


def _programs(results: Results) -> str:
    rows = []
    for role in dict.fromkeys(o.role for o in results.outcomes):
        said = results.programs.get(role, {})
        name = f"{said.get('name', 'unnamed')} {said.get('version', '')}".strip()
        counts = counted(o for o in results.outcomes if o.role == role)
        cells = "".join(_number(counts[word], _class_of(word)) for word in (PASS, *_LEFT_OUT, *BAD))
        rows.append(f"<tr><th>{role}<td>{html.escape(name)}{cells}")
    heads = "".join(f"<th class=n>{word}" for word in (PASS, *_LEFT_OUT, *BAD))
    return f"<table><tr><th>role<th>program{heads}{''.join(rows)}</table>"


def _failures(bad: list[Outcome]) -> str:
    """Lists the failing clauses, most failures first, and the failed cases of each."""
    by_clause: dict[str, list[Outcome]] = defaultdict(list)
    for o in bad:
        by_clause[o.case.clauses[0]].append(o)
    ordered = sorted(by_clause.items(), key=lambda item: (-len(item[1]), item[0]))
    if not ordered:
        return ""
    chips = "".join(f"<a href='#fail-{clause}'>{clause} <b>{len(own)}</b></a>" for clause, own in ordered)
    groups = "".join(_failing_clause(clause, own) for clause, own in ordered)
    return f"<h2>Failing clauses</h2><p class=chips>{chips}</p>{groups}"


def _failing_clause(clause: str, bad: list[Outcome]) -> str:
    rows = [_failure(o) for o in bad]
    head = "<table><tr><th>role<th>what<th>case<th>why"
    shown, others = (f"{head}{''.join(some)}</table>" for some in (rows[:_SHOWN], rows[_SHOWN:]))
    more = f"<details><summary>{len(rows) - _SHOWN} more</summary>{others}</details>"
    return f"<h3 id='fail-{clause}'>{clause}</h3>{shown}{more if len(rows) > _SHOWN else ''}"


def _failure(o: Outcome) -> str:
    return (
        f"<tr data-words='{_words(o)}'><td>{o.role}<td class=bad>{o.verdict.outcome}"
        f"<td>{html.escape(o.case.why)}<br><code>{html.escape(o.case.id)}</code><td>{html.escape(o.words)}"
    )


def _matrix(results: Results) -> str:
    """Returns a table with a row per clause: counts of outcomes, and the cases."""
    by_clause: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in results.outcomes:
        for clause in outcome.case.clauses:
            by_clause[clause].append(outcome)
    rows = [_row(results.suite, clause, by_clause[clause]) for clause in results.suite.clauses]
    head = "<tr><th>clause<th class=n>passed<th class=n>failed<th class=n>not run<th>cases"
    return f"<table>{head}{''.join(rows)}</table>"


def _row(suite: Suite, clause: str, outcomes: list[Outcome]) -> str:
    if not outcomes:
        why = "no case was selected, or no file can test it"
        return f"<tr class=none data-words='{clause.lower()}'><td><code>{clause}</code><td colspan=4>{why}"
    failed = [o for o in outcomes if o.bad]
    skipped = [o for o in outcomes if o.verdict.outcome in _LEFT_OUT]
    passed = len(outcomes) - len(failed) - len(skipped)
    listed = "".join(
        f"<div class={_class_of(o.verdict.outcome)}>{html.escape(o.case.id)} ({o.role})"
        f"{html.escape(': ' + '; '.join(o.verdict.notes)) if o.verdict.notes else ''}</div>"
        for o in failed + [o for o in outcomes if not o.bad]
    )
    words = " ".join([clause.lower(), *(_words(o) for o in outcomes[:40])])
    return (
        f"<tr data-words='{words}'><td><code>{clause}</code>{_number(passed, 'ok')}"
        f"{_number(len(failed), 'bad')}{_number(len(skipped), 'skip')}"
        f"<td><details><summary>{len(outcomes)}</summary>{listed}</details>"
    )


def _words(o: Outcome) -> str:
    return html.escape(f"{o.case.id} {o.case.why} {' '.join(o.case.clauses)}".lower(), quote=True)


def _number(n: int, kind: str) -> str:
    return f"<td class='n {kind if n else 'none'}'>{n}"


def _class_of(outcome: str) -> str:
    return "ok" if outcome == PASS else "skip" if outcome in _LEFT_OUT else "bad"
