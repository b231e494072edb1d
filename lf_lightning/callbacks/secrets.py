"""What must reach no file: values of environment variables that hold secrets, and passwords in addresses."""

from __future__ import annotations

import os
import re
from typing import Any

from lf_lightning.types import InputError

SECRET = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
"""Names of environment variables that hold secrets: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY ..."""
LOGIN = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)")
"""User and password of an address."""
SHORTEST = 6
"""Characters; a shorter value is no secret, and would be found in harmless words."""


def without_secrets(text: str) -> str:
    """A text with the name of a variable of the environment for its secret, and *** for the login of an address."""
    for name, value in os.environ.items():  # they belong to this process, and to nothing that it writes
        if SECRET.search(name) and len(value.strip()) >= SHORTEST:
            text = text.replace(value.strip(), f"<{name}>")
    return LOGIN.sub("***", text)


def check_no_login(value: Any, where: str = "") -> None:
    """Refuse an address with user and password anywhere in a configuration.

    Args:
        value: The configuration, as nested dictionaries and lists.
        where: Its place in a larger one.

    Raises:
        InputError: As said; the line shows no password.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            check_no_login(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            check_no_login(inner, where)
    elif isinstance(value, str) and LOGIN.search(value):
        raise InputError(
            f"{where}: must hold no password, got {LOGIN.sub('***', value)}. "
            "Leave the login out; give a secret through the environment."
        )
