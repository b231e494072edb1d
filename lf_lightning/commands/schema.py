"""`lf-lightning schema`: JSON schema of the configuration, so that editors complete and check it while one types."""

from __future__ import annotations

import json
from typing import Any

from lf_lightning.types import InputError

USE = """usage: lf-lightning schema > lf.schema.json

Print the JSON schema of the configuration. Write it to a file once, and name that file in the first line of a YAML:
  # yaml-language-server: $schema=lf.schema.json"""


def main(argv: list[str]) -> int:
    """Print the schema on stdout.

    Args:
        argv: The arguments after `schema`: none, or --help.

    Raises:
        InputError: There are others.
    """
    if argv in (["--help"], ["-h"]):
        print(USE)
        return 0
    if argv:
        raise InputError(
            f"schema: takes no arguments, got {' '.join(argv)}. Write lf-lightning schema > lf.schema.json."
        )
    print(json.dumps(configuration_schema(), indent=1))
    return 0


def configuration_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of a file for `--config`, with the meaning of every option.

    Nothing is required, since a file may hold a part of a configuration: several are merged.
    """
    from lf_lightning.cli import build
    from lf_lightning.lightning_private import parser_schema

    # any configuration will do: only its parser is asked, and no seed is set
    gate = build(["--model", "SFT", "--model.backbone.path", "none", "--seed_everything", "false"], "fit")
    schema = parser_schema(gate.parser)
    schema.pop("required", None)
    options = schema["properties"]
    options.pop("print_shtab", None)
    for linked in ("backbone", "task"):  # the stage decides them
        del options["data"]["properties"][linked]
    return schema
