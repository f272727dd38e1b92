"""Random numbers depend on their purpose and the image alone."""

from __future__ import annotations

import torch

from instaqnas.seeds import SampleKey, uniform_numbers


def test_numbers_are_uniform_and_independent_between_images_and_positions() -> None:
    numbers = uniform_numbers([SampleKey(0, index) for index in range(20_000)], 4, 0, "test")
    assert numbers.shape == (20_000, 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    shares = torch.stack([column.histc(10, 0, 1) for column in numbers.T]) / 20_000
    torch.testing.assert_close(shares, torch.full((4, 10), 0.1).double(), rtol=0, atol=0.01)  # 4.7 standard deviations
    between = numbers.T.corrcoef() - torch.eye(4)
    neighbours = torch.stack([numbers[:-1, 0], numbers[1:, 0]]).corrcoef()[0, 1]
    assert between.abs().max() < 0.03
    assert neighbours.abs() < 0.03


def test_numbers_of_an_image_do_not_depend_on_its_batch_or_place() -> None:
    together = uniform_numbers([SampleKey(2, 7, 0), SampleKey(2, 8, 1), SampleKey(2, 9, 2)], 13, 5, "test")
    assert torch.equal(uniform_numbers([SampleKey(2, 8, 30)], 13, 5, "test"), together[1:2])


def test_numbers_are_the_same_on_every_machine() -> None:
    """Computed independently: the seed from SHA-256, each number from two 32-bit words of the Mersenne twister."""
    import hashlib

    import numpy as np

    digest = hashlib.sha256(repr((5, "test", 2, 8)).encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    words = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, 4, dtype=np.uint64)
    expected = [((int(words[i]) << 32 | int(words[i + 1])) & (2**53 - 1)) / 2**53 for i in (0, 2)]
    assert uniform_numbers([SampleKey(2, 8)], 2, 5, "test").tolist() == [expected]
