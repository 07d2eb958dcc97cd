"""Running the conformance suite against programs in any language; `conformance/README.md` is its guide."""
