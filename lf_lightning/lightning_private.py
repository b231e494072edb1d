"""The only place that touches what Lightning and jsonargparse keep to themselves: one function each, a test each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.strategies import ModelParallelStrategy


def global_seed() -> int:
    """The value of the last `seed_everything`, 0 before any; lightning 2.6 keeps it in PL_GLOBAL_SEED only."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def share_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Let all ranks share the model as data-parallel ones; lightning 2.6 takes their number only before it is known."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


def parser_schema(parser: ArgumentParser) -> dict[str, Any]:
    """JSON schema of the files that a parser takes; jsonargparse 4.53 keeps its generator in a private module.

    It departs from that generator in three ways: classes of torch are not described (a megabyte of them), a class may
    be given by its short name, and classes that nobody has imported yet may be named by their path.
    """
    from jsonargparse._completions_jsonschema import ParserJsonschema

    class Schema(ParserJsonschema):
        def class_ref(self, class_type: Any, action: Any, subclass: bool) -> dict[str, Any]:
            """A type that is described once, under $defs."""
            if class_type.__module__.split(".")[0] in ("torch", "torchmetrics"):
                return {"type": ["object", "string"]}
            reference: dict[str, Any] = super().class_ref(class_type, action, subclass)
            return reference

        def class_path_schema(self, class_path: str, action: Any) -> dict[str, Any]:
            """A known class, by its path or by its name."""
            schema: dict[str, Any] = super().class_path_schema(class_path, action)
            schema["properties"]["class_path"] = {"enum": [class_path, class_path.rsplit(".", 1)[-1]]}
            return schema

        def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
            """Any known class, or one of the user's own."""
            definition: dict[str, Any] = super().subclass_def(class_type, action)
            other: dict[str, Any] = self.unknown_class_path_schema()
            other["properties"]["class_path"]["pattern"] = r"^(?!lf_lightning\.|lightning\.).+\."
            if "anyOf" in definition:
                definition["anyOf"].append(other)
            return definition

    schema: dict[str, Any] = Schema().generate(parser)  # type: ignore[no-untyped-call]  # jsonargparse's
    return schema
