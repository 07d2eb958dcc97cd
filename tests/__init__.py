"""Tests of sfpformat. Each names its clauses of SPEC.md: see `tests.support.clauses`."""
