"""Stands in for `processors/` in a checkout, where that folder lies at the top; an installed package has it here instead.

So there is one copy of its modules, under one name each, wherever they run from. Static tools follow the import below,
hence other modules say `from .processors import …`, never `from .processors.image_loading import …`.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from processors import *  # noqa: F403  (never runs: a second copy would have other classes)
else:
    _folder = Path(__file__).parents[2] / "processors"
    _spec = importlib.util.spec_from_file_location(
        __name__, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
