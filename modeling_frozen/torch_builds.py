# SPDX-License-Identifier: Apache-2.0
"""The error message where torchvision, torchaudio or torchcodec can't be imported, because it was built for another torch.

transformers imports them wherever they are installed, whether or not a model needs them, and then reports its own classes as
missing. Imported only when something has failed already.
"""

import importlib.metadata
import sys
from collections.abc import Iterator


_BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def explain(error: BaseException) -> ImportError | None:
    """The error to raise instead of one that came out of importing such a package; None where another is the cause."""
    for link in _chain(error):
        traceback = link.__traceback__
        while traceback is not None:
            package = str(traceback.tb_frame.f_globals.get("__name__")).partition(".")[0]
            if package in _BUILT_FOR_TORCH:
                torch = getattr(sys.modules.get("torch"), "__version__", "torch that is installed")
                return ImportError(
                    f"{package} {importlib.metadata.version(package)} can't be imported beside torch {torch} "
                    f"({type(link).__name__}: {link}), and transformers imports it because it is installed. It was built for "
                    f"another torch; the builds on PyPI are for CUDA. Either `pip uninstall {package}`, for nothing here "
                    f"needs it, or install the one for your torch, from the same index as torch (see pytorch.org)."
                    " [errors.md#versions]",
                    name=package,
                )
            traceback = traceback.tb_next
    return None
