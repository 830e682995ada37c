"""Which tests compare bits: those that are repeated where other kernels compute (see docs/exactness.md).

A test compares bits if its source, or that of a helper of the tests that it calls, says `torch.equal`, numpy's `array_equal`
or `rtol=0, atol=0`. Such a test is marked `bits` when it is collected, so that a new one is repeated too, with no word from
its author. What compares otherwise (numbers printed by another process, say) is marked by hand.
"""

import functools
import inspect
import re
from types import CodeType, FunctionType


_COMPARES = re.compile(r"(\btorch\.equal|array_equal)\(|\brtol=0, atol=0\b|\batol=0, rtol=0\b")


def compares_bits(function: FunctionType) -> bool:
    seen, waiting = set(), [inspect.unwrap(function)]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if _says_so(one):
            return True
        named = (one.__globals__.get(name) for name in _names(one.__code__))
        waiting += [other for other in named if isinstance(other, FunctionType) and other.__module__.startswith("tests.")]
    return False


@functools.cache
def _says_so(function: FunctionType) -> bool:
    return _COMPARES.search(inspect.getsource(function)) is not None


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
