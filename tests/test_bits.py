"""Tests that compare bits are recognised by what they say, or by what a helper of theirs says."""

import functools

import numpy as np
import pytest
import torch

from tests.helpers.bits import compares_bits
from tests.helpers.tiny import same_logits


def says_so(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def to_zero(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def of_arrays(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(a, b)


def calls_one(pairs: list) -> bool:
    return all(says_so(a, b) for a, b in pairs)


def calls_one_of_another_file(a: object, b: object) -> bool:
    return (lambda: same_logits(a, b))()


def round_and_round(a: torch.Tensor, n: int) -> torch.Tensor:
    return round_and_round(a, n - 1) if n else close(a, a)


def close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return a


def test_comparisons_of_bits_are_recognised() -> None:
    wrapped = functools.wraps(says_so)(lambda a, b: None)
    for function in (says_so, to_zero, of_arrays, calls_one, calls_one_of_another_file, wrapped):
        assert compares_bits(function), function.__name__
    for other in (close, round_and_round):
        assert not compares_bits(other), other.__name__


def test_and_marked_when_collected(request: pytest.FixtureRequest) -> None:
    assert calls_one([(torch.ones(1), torch.ones(1))])
    assert request.node.get_closest_marker("bits")


def test_others_are_not(request: pytest.FixtureRequest) -> None:
    close(torch.ones(1), torch.ones(1))
    assert not request.node.get_closest_marker("bits")
