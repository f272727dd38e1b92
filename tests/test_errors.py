"""Warnings are one line for the user, with or without logging."""

from __future__ import annotations

import logging
import warnings

import pytest

from instaqnas.errors import exit_on_input_error


@pytest.fixture
def default_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores after the test, which `warnings.catch_warnings` does for the other function.

    Warnings go to the log from the beginning if an earlier test has run a stage.
    """
    logging.captureWarnings(capture=False)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.mark.usefixtures("default_format")
def test_a_warning_is_one_line_without_its_place_in_the_code(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with exit_on_input_error():
            warnings.warn("two boxes dropped", stacklevel=1)
        assert capsys.readouterr().err == "warning: two boxes dropped\n"
        with exit_on_input_error():
            logging.captureWarnings(capture=True)
            try:
                warnings.warn("two boxes dropped", stacklevel=1)
            finally:
                logging.captureWarnings(capture=False)
        assert caplog.messages == ["warning: two boxes dropped"]
