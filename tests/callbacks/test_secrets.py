"""Secrets of the environment and of addresses, found and taken out."""

from __future__ import annotations

import pytest

from lf_lightning.callbacks.secrets import check_no_login, without_secrets
from lf_lightning.types import InputError


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "TOKEN"])
def test_the_value_of_a_secret_variable_becomes_its_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "planted-value")
    assert without_secrets("got planted-value, twice planted-value") == f"got <{name}>, twice <{name}>"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "MONKEYS", "PWD", "KEYBOARD"])
def test_the_value_of_another_variable_stays(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "planted-value")
    assert without_secrets("got planted-value") == "got planted-value"


def test_a_value_too_short_to_be_a_secret_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "true")
    assert without_secrets("overwrite: true") == "overwrite: true"


def test_the_login_of_an_address_is_taken_out():
    text = "url: https://me:hidden@host:80/a b: http://host:80/x@y:z"
    assert without_secrets(text) == "url: https://***@host:80/a b: http://host:80/x@y:z"


def test_an_address_with_a_login_is_refused_without_showing_it():
    config = {"model": {"rewards": [{"url": "http://ok:80/"}, {"url": "http://me:hidden@host/"}]}}
    with pytest.raises(InputError, match=r"^model\.rewards\.url: must hold no password, got http://\*\*\*@host") as got:
        check_no_login(config)
    assert "hidden" not in str(got.value)
