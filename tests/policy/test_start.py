"""Between two fixed configurations: ends, and the order in between."""

from __future__ import annotations

import torch

from instaqnas.policy.network import PolicyNet
from instaqnas.policy.start import PROBABILITY, SPREAD, start_between

LOW, HIGH = [0, 1, 0, 2, 0], [2, 1, 1, 0, 0]
WORTH = [0.3, 9.0, 0.9, -0.5, 9.0]  # of the positions that move the third goes first, then the first, then the fourth


def likeliest(effort: float) -> list[int]:
    logits, direction = start_between(LOW, HIGH, WORTH, 3)
    return (logits + effort * direction).argmax(-1).tolist()


def test_at_the_ends_the_likeliest_choices_are_those_of_the_two_configurations() -> None:
    logits, direction = start_between(LOW, HIGH, WORTH, 3)
    assert likeliest(-1) == LOW
    assert likeliest(1) == HIGH
    for effort, configuration in ((-1, LOW), (1, HIGH)):
        probability = (logits + effort * direction).softmax(-1)[range(5), configuration]
        torch.testing.assert_close(probability[[1, 4]], torch.full((2,), PROBABILITY))
        assert (probability > 0.5).all()


def test_positions_go_over_in_the_order_of_worth() -> None:
    steps = [likeliest(effort) for effort in torch.linspace(-SPREAD, SPREAD, 99).tolist()]
    assert [steps[i] for i in range(99) if i == 0 or steps[i] != steps[i - 1]] == [
        [0, 1, 0, 2, 0],
        [0, 1, 1, 2, 0],
        [2, 1, 1, 2, 0],
        [2, 1, 1, 0, 0],
    ]


def test_equal_configurations_are_one() -> None:
    logits, direction = start_between(LOW, LOW, WORTH, 3)
    assert not direction.any()
    assert logits.argmax(-1).tolist() == LOW


@torch.no_grad()
def test_a_network_begins_there_and_keeps_its_effort_in_its_state() -> None:
    torch.manual_seed(0)
    policy, other = (PolicyNet(5, 3, pool=2, width=4, bits=(32, 32), effort=[-1.0, 0, 1]).eval() for _ in range(2))
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    before, efforts = policy(images) - policy.efforts(images)[:, None, None] * policy.effort, policy.efforts(images)
    logits, direction = start_between(LOW, HIGH, WORTH, 3)
    policy.begin(logits, direction)
    assert torch.equal(policy.efforts(images), efforts)
    torch.testing.assert_close(policy(images), before + logits + efforts[:, None, None] * direction)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other(images), policy(images))
