"""Find the one reduction axis of an Einsum's weight, where the equation has a plain one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["einsum_site"]


def einsum_site(equation: str, ranks: Sequence[int | None], weight: int) -> tuple[int | None, int | None, str | None]:
    """Return (reduction axis, output axis, why not) of operand `weight`.

    Plain means: two operands, no letter twice in one of them, and exactly one letter that both have and
    the output has not. That is a matrix product, batched or not.

    Args:
        equation: for instance `bij,jk->bik`; spaces are ignored, the output part may be left out.
        ranks: of the operands, `None` when unknown; needed for an ellipsis before the axis.
        weight: index of the operand that is the weight.
    """
    text = "".join(equation.split())
    left, arrow, output = text.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or weight >= 2:
        return None, None, f"Einsum '{equation}' with {len(terms)} operands: not a plain product"
    if not arrow:  # the standard's implicit output: letters that occur once
        letters = left.replace(",", "").replace(".", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    plain = [term.replace("...", "") for term in terms]
    if any(len(set(term)) != len(term) or not term.isalpha() for term in plain if term):
        return None, None, f"Einsum '{equation}': a letter twice in one operand, not a plain product"
    own, other = plain[weight], plain[1 - weight]
    reduced = [letter for letter in own if letter in other and letter not in output]
    if len(reduced) != 1:
        return None, None, f"Einsum '{equation}' with {len(reduced)} reduction axes: not a plain product"
    summed_alone = [letter for letter in own if letter not in other and letter not in output]
    if summed_alone:
        return None, None, f"Einsum '{equation}' sums the weight alone over '{summed_alone[0]}'"
    axis = _axis_of(reduced[0], terms[weight], ranks[weight])
    if axis is None:
        return None, None, f"Einsum '{equation}' with an operand of unknown rank"
    free = [letter for letter in own if letter in output and letter not in other]
    return axis, _axis_of(free[0], terms[weight], ranks[weight]) if len(free) == 1 else None, None


def _axis_of(letter: str, term: str, rank: int | None) -> int | None:
    before, dots, after = term.partition("...")
    if letter in before:
        return before.index(letter)
    if not dots:
        return None
    return None if rank is None else rank - len(after) + after.index(letter)
