"""The short form of kill_and_resume.py: the search alone, killed twice, once of that while it saves."""

from __future__ import annotations

import pytest
from kill_and_resume import LOSSES, Trainings, differing, fingerprint


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    trainings = Trainings(tmp_path_factory.mktemp("kills"), pretrain_epochs=1)
    for stage in ("pretrain_fp32", "pretrain_quant", "search"):
        trainings.undisturbed(stage)
    return trainings


@pytest.mark.slow
def test_a_search_that_was_killed_and_resumed_ends_as_an_undisturbed_one(trainings: Trainings) -> None:
    left, kills = trainings.disturbed("search", workers=0, kills=2, in_save=1)
    assert len(kills) == 2
    assert any(kill.in_save for kill in kills)
    assert differing(fingerprint(trainings.reference / "search"), fingerprint(left)) == []


@pytest.mark.slow
def test_a_lost_item_of_a_checkpoint_is_noticed(trainings: Trainings) -> None:
    half = trainings.half_a_search()
    expected = fingerprint(trainings.reference / "search")
    assert differing(expected, fingerprint(trainings.search_with_loss(half, lambda state: None))) == []
    left = trainings.search_with_loss(half, LOSSES["moments of the policy's optimizer"])
    assert {"last.pt networks", "last.pt optimizers"} <= set(differing(expected, fingerprint(left)))
