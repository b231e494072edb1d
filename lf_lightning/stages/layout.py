"""Which layout a run takes: what the configuration asks for, if the model keeps documents of one row apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lf_lightning.console import say
from lf_lightning.models import Backbone
from lf_lightning.models.probe import branches_are_isolated, documents_are_isolated
from lf_lightning.stages.ranks import Ranks
from lf_lightning.types import Isolation


def settle_layout(models: Sequence[Backbone], data: Any, ranks: Ranks, *, known: Isolation | None) -> Isolation | None:
    """Ask the models, tell the data the verdict, and switch the attention to the layout that follows.

    Args:
        models: The policy, after any sharding, and other models that run on the same batches; all must agree.
        data: The DataModule; None where the user brings loaders, which then decide by themselves.
        ranks: All must agree.
        known: An earlier verdict of this run, which a resume does not ask for again.

    Returns:
        In which layouts documents of one row are apart; None where nobody asked.
    """
    if data is None:
        return known
    verdict = known or Isolation(
        padded=ranks.all_agree(all(documents_are_isolated(model, "padded") for model in models)),
        padding_free=ranks.all_agree(all(documents_are_isolated(model, "padding_free") for model in models)),
        branches=ranks.all_agree(all(branches_are_isolated(model) for model in models)),
    )
    layout = data.resolve_layout(verdict)
    for model in models:
        model.set_layout(layout)
    seen = "" if verdict.padding_free else " (in one row this model's documents would see each other)"
    say(f"data.layout: {layout}{seen}")
    return verdict
