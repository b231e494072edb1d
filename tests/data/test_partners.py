"""Whose response stands against a prompt: worked out by hand."""

from __future__ import annotations

from lf_lightning.data.partners import fixed_partners, step_partners, with_partners
from lf_lightning.types import Span, Unit


def units(*documents: int) -> list[Unit]:
    return [Unit((Span(document, 0, 3),)) for document in documents]


def test_the_next_unit_of_the_step_is_the_partner_and_of_the_last_the_first() -> None:
    assert step_partners([7, 3, 5, 2], 4) == [3, 5, 2, 7]
    assert step_partners([7, 3, 5, 2, 9, 8], 3) == [3, 5, 7, 9, 8, 2]
    assert step_partners([7, 3, 5, 2, 9], 3) == [3, 5, 7, 9, 2]


def test_a_step_of_one_unit_has_no_partner() -> None:
    assert step_partners([7, 3, 5], 2) == [3, 7, None]
    assert step_partners([7, 3], 1) == [None, None]
    assert step_partners([], 4) == []


def test_fixed_partners_are_the_rows_before_and_of_the_first_the_last() -> None:
    assert fixed_partners([4, 6, 9]) == {4: 9, 6: 4, 9: 6}
    assert fixed_partners([4]) == {4: None}


def test_fixed_partners_rotate_inside_groups_of_1000() -> None:
    partners = fixed_partners(range(2002))
    assert (partners[0], partners[1], partners[999]) == (999, 0, 998)
    assert (partners[1000], partners[1001], partners[1999]) == (1999, 1000, 1998)
    assert (partners[2000], partners[2001]) == (2001, 2000)
    assert len(partners) == 2002


def test_a_remainder_of_one_joins_the_group_before_it() -> None:
    partners = fixed_partners(range(2001))
    assert (partners[0], partners[1000], partners[1001], partners[2000]) == (999, 2000, 1000, 1999)
    assert fixed_partners(range(1001))[0] == 1000
    assert all(partner != document for document, partner in partners.items())


def test_units_keep_their_spans_and_get_partners() -> None:
    by_step = with_partners(units(9, 4, 6), [4, 6, 9], kl_pairs="step", step_size=2)
    assert by_step == [Unit((Span(9, 0, 3),), 4), Unit((Span(4, 0, 3),), 9), Unit((Span(6, 0, 3),), None)]
    fixed = with_partners(units(9, 4, 6), [4, 6, 9], kl_pairs="dataset", step_size=2)
    assert [unit.partner for unit in fixed] == [6, 9, 4]
