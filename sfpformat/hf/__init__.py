"""Models of transformers in folders with an `.sfp` file: ``from_pretrained`` and ``save_pretrained``.

Needs transformers 5 or later (``pip install 'sfpformat[hf]'``). A folder is what transformers writes: the
configuration, the tokenizer and so on, but with the weights in ``model.sfp`` or in shards with
``model.sfp.index.json``. Loading a folder never executes code from it.

The import of this module also makes ``from_pretrained`` of transformers' own classes, and so pipelines,
sentence-transformers and peft, load such folders (`sfpformat.hf.automatic`).

Example::

    import sfpformat.hf

    sfpformat.hf.save_pretrained(model, "small/", tokenizer)
    model = sfpformat.hf.from_pretrained("small/")
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "sfpformat.hf needs transformers: pip install 'sfpformat[hf]'", name="transformers"
    )

from . import automatic
from .loading import from_pretrained
from .saving import save_pretrained

automatic.install()

__all__ = ["from_pretrained", "save_pretrained"]
