"""The SSD loss against a naive loop and hand-worked cases."""

from __future__ import annotations

import math

import pytest
import torch

from instaqnas.detector.multibox_loss import hard_negatives, image_losses, multibox_loss


def naive_loss(offsets: list, logits: list, targets: list, labels: list) -> tuple[float, float]:
    box, classes, positives = 0.0, 0.0, 0
    for image in range(len(labels)):
        losses = []
        for p, label in enumerate(labels[image]):
            log_sum = math.log(sum(math.exp(v) for v in logits[image][p]))
            losses.append(log_sum - logits[image][p][label])
        own = [p for p, label in enumerate(labels[image]) if label > 0]
        others = sorted((p for p in range(len(losses)) if p not in own), key=lambda p: -losses[p])
        classes += sum(losses[p] for p in own) + sum(losses[p] for p in others[: 3 * len(own)])
        for p in own:
            for got, want in zip(offsets[image][p], targets[image][p], strict=True):
                d = abs(got - want)
                box += 0.5 * d * d if d < 1 else d - 0.5
        positives += len(own)
    return box / max(1, positives), classes / max(1, positives)


def random_case() -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    offsets, targets = (torch.randn(4, 30, 4, dtype=torch.float64, generator=random) for _ in range(2))
    logits = 2 * torch.randn(4, 30, 5, dtype=torch.float64, generator=random)
    labels = torch.randint(1, 5, (4, 30), generator=random) * (torch.rand(4, 30, generator=random) < 0.1)
    labels[1] = 0
    labels[2, :12] = 1  # more positives than a quarter: fewer than 3:1 negatives are left
    return offsets, logits, targets, labels


def test_loss_equals_a_naive_loop() -> None:
    case = random_case()
    losses = multibox_loss(*case)
    box, classes = naive_loss(*(tensor.tolist() for tensor in case))
    torch.testing.assert_close(losses["box"].item(), box, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["class"].item(), classes, rtol=1e-5, atol=0)


def test_one_object_by_hand() -> None:
    """One positive and, of five negatives with different logits, the three hardest."""
    logits = torch.zeros(1, 6, 2)
    logits[0, :, 1] = torch.tensor([0.0, 5.0, 4.0, 3.0, -9.0, -9.0])
    offsets, targets = torch.zeros(1, 6, 4), torch.zeros(1, 6, 4)
    targets[0, 0] = torch.tensor([0.5, 2.0, 0.0, 0.0])
    losses = multibox_loss(offsets, logits, targets, torch.tensor([[1, 0, 0, 0, 0, 0]]))
    assert math.isclose(losses["box"].item(), 0.125 + 1.5, rel_tol=1e-6)
    expected = math.log(2) + sum(math.log(1 + math.exp(v)) for v in (5, 4, 3))
    assert math.isclose(losses["class"].item(), expected, rel_tol=1e-6)


def test_hard_negatives_are_counted_per_image() -> None:
    positive = torch.tensor([[True, False, False, False, False], [False] * 5])
    chosen = hard_negatives(torch.tensor([[9.0, 1, 4, 2, 3], [9, 9, 9, 9, 9]]), positive)
    assert chosen.tolist() == [[False, False, True, True, True], [False] * 5]


def test_images_without_objects_contribute_nothing() -> None:
    logits, offsets = torch.randn(2, 8, 3), torch.randn(2, 8, 4)
    losses = multibox_loss(offsets, logits, offsets, torch.zeros(2, 8, dtype=torch.int64))
    assert losses["box"].item() == losses["class"].item() == 0


def test_infinite_targets_of_the_background_reach_neither_loss_nor_gradient() -> None:
    offsets = torch.randn(1, 8, 4, requires_grad=True)
    logits = torch.randn(1, 8, 3, requires_grad=True)
    targets = torch.full((1, 8, 4), -math.inf)
    targets[0, 2] = 0.0
    labels = torch.zeros(1, 8, dtype=torch.int64)
    labels[0, 2] = 1
    losses = multibox_loss(offsets, logits, targets, labels)
    (losses["box"] + losses["class"]).backward()
    assert losses["box"].isfinite()
    assert offsets.grad.isfinite().all()
    assert logits.grad.isfinite().all()


def test_gradients_reach_positives_and_their_hard_negatives_only() -> None:
    logits = torch.tensor([[[0.0, 0], [0, 1], [0, 5], [0, 3], [0, 2], [0, 4]]], requires_grad=True)
    offsets = torch.zeros(1, 6, 4, requires_grad=True)
    losses = multibox_loss(offsets, logits, torch.ones(1, 6, 4), torch.tensor([[1, 0, 0, 0, 0, 0]]))
    (losses["box"] + losses["class"]).backward()
    assert (logits.grad[0].abs().sum(1) > 0).tolist() == [True, False, True, True, False, True]
    assert (offsets.grad[0].abs().sum(1) > 0).tolist() == [True, False, False, False, False, False]


def test_equal_losses_still_give_three_negatives_per_positive() -> None:
    positive = torch.zeros(2, 20, dtype=torch.bool)
    positive[0, 3] = positive[1, 5] = positive[1, 6] = True
    chosen = hard_negatives(torch.ones(2, 20), positive)
    assert chosen.sum(1).tolist() == [3, 6]
    assert not (chosen & positive).any()


def test_a_positive_is_never_a_negative_even_where_negatives_run_out() -> None:
    positive = torch.tensor([[True, False, True, False]])
    chosen = hard_negatives(torch.tensor([[9.0, 0.1, 8.0, 0.2]]), positive)
    assert chosen.tolist() == [[False, True, False, True]]


def test_both_parts_are_divided_by_the_positives_of_the_batch() -> None:
    case = random_case()
    twice = multibox_loss(*(torch.cat([tensor, tensor]) for tensor in case))
    torch.testing.assert_close(twice, multibox_loss(*case))


def test_an_image_without_objects_changes_neither_loss_nor_gets_a_gradient() -> None:
    offsets, logits, targets, labels = random_case()
    offsets.requires_grad_()
    logits.requires_grad_()
    losses = multibox_loss(offsets, logits, targets, labels)
    others = [0, 2, 3]  # image 1 has none
    expected = multibox_loss(offsets[others], logits[others], targets[others], labels[others])
    torch.testing.assert_close(losses, expected)
    (losses["box"] + losses["class"]).backward()
    assert not offsets.grad[1].any()
    assert not logits.grad[1].any()
    assert logits.grad[others].any()


def test_targets_of_the_background_do_not_matter_at_all() -> None:
    offsets, logits, targets, labels = random_case()
    expected = multibox_loss(offsets, logits, targets, labels)
    for poison in (math.inf, -math.inf, math.nan):
        poisoned = torch.where((labels > 0)[..., None], targets, poison)
        assert multibox_loss(offsets, logits, poisoned, labels) == expected


# --- The loss of each image -------------------------------------------------------------------------------------------


def test_the_loss_of_an_image_equals_a_naive_loop_over_it_alone() -> None:
    case = random_case()
    losses = image_losses(*case)
    alone = [naive_loss(*([rows] for rows in image)) for image in zip(*(t.tolist() for t in case), strict=True)]
    positives = (case[3] > 0).sum(1)
    expected = torch.tensor([box + classes for box, classes in alone]) * positives
    assert expected[1] == 0  # no objects
    assert len(expected.unique()) == 4
    torch.testing.assert_close(losses, expected)


def test_the_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    case = random_case()
    whole = image_losses(*case)
    for image in range(4):
        torch.testing.assert_close(image_losses(*(tensor[image : image + 1] for tensor in case))[0], whole[image])


def test_the_loss_of_an_image_ignores_targets_of_the_background() -> None:
    offsets, logits, targets, labels = random_case()
    expected = image_losses(offsets, logits, targets, labels)
    for poison in (math.inf, -math.inf, math.nan):
        poisoned = torch.where((labels > 0)[..., None], targets, poison)
        assert torch.equal(image_losses(offsets, logits, poisoned, labels), expected)


def test_images_without_objects_teach_by_their_hardest_negatives() -> None:
    """By hand: softmax of (0, 0), (0, ln 3) and (0, ln 7) gives background the probabilities 1/2, 1/4 and 1/8."""
    logits = torch.tensor([[[0.0, 0], [0, math.log(3)], [0, math.log(7)]]], requires_grad=True)
    empty = torch.zeros(1, 3, dtype=torch.int64)
    offsets = torch.zeros(1, 3, 4)
    assert multibox_loss(offsets, logits, offsets, empty)["class"].item() == 0
    losses = multibox_loss(offsets, logits, offsets, empty, min_negatives=2)
    assert losses["class"].item() == pytest.approx(math.log(4) + math.log(8))
    assert image_losses(offsets, logits, offsets, empty, min_negatives=2).tolist() == pytest.approx([math.log(32)])
    losses["class"].backward()
    assert (logits.grad[0, 0] == 0).all()
    assert (logits.grad[0, 1:, 1] > 0).all()  # descent lowers the score of the class


def test_images_with_objects_have_three_negatives_a_positive_whatever_the_minimum_below() -> None:
    loss = torch.arange(8.0)[None]
    positive = torch.zeros(1, 8, dtype=torch.bool)
    positive[0, 7] = True
    for least, chosen in ((0, [4, 5, 6]), (3, [4, 5, 6]), (5, [2, 3, 4, 5, 6]), (99, [0, 1, 2, 3, 4, 5, 6])):
        assert hard_negatives(loss, positive, least)[0].nonzero().flatten().tolist() == chosen
