"""Edit Flows written plainly: aligned columns as lists, every flip pattern enumerated, edits applied to strings.

A text is a tuple of symbols behind an invisible begin token; place 0 is that token, place i + 1 is symbol i. A labelled edit is
``(operation, place, symbol)``.
"""

import itertools
from collections import defaultdict

BLANK = None


def remove_blanks(columns):
    return tuple(symbol for symbol in columns if symbol is not BLANK)


def edit_of(noised, goal, column):
    """The labelled edit that puts ``goal``'s symbol into one column, or None where it is there."""
    if noised[column] == goal[column]:
        return None
    place = len(remove_blanks(noised[: column + 1]))
    if noised[column] is BLANK:
        return ("insert", place, goal[column])
    if goal[column] is BLANK:
        return ("delete", place, None)
    return ("substitute", place, goal[column])


def applied(text, edit):
    operation, place, symbol = edit
    text = list(text)
    if operation == "insert":
        text.insert(place, symbol)
    elif operation == "delete":
        del text[place - 1]
    else:
        text[place - 1] = symbol
    return tuple(text)


def patterns(z0, z1, kappa):
    """Every ``z_t`` with its probability."""
    for flips in itertools.product([False, True], repeat=len(z0)):
        probability = 1.0
        for flipped in flips:
            probability *= kappa if flipped else 1 - kappa
        yield tuple(b if flipped else a for a, b, flipped in zip(z0, z1, flips, strict=True)), flips, probability


def law(pairs, kappa):
    """``p_t(x)`` of weighted aligned pairs ``(weight, z0, z1)``."""
    result = defaultdict(float)
    for weight, z0, z1 in pairs:
        for noised, _, probability in patterns(z0, z1, kappa):
            result[remove_blanks(noised)] += weight * probability
    return dict(result)


def law_slope(pairs, kappa):
    """``d p / d kappa``, by the product rule."""
    result = defaultdict(float)
    for weight, z0, z1 in pairs:
        for noised, flips, probability in patterns(z0, z1, kappa):
            slope = sum(1 / kappa if flipped else -1 / (1 - kappa) for flipped in flips)
            result[remove_blanks(noised)] += weight * probability * slope
    return dict(result)


def labelled_flux(pairs, kappa, *, backward=False):
    """``(text, edit) -> p_t(text) * rate`` per unit of kappa: 1 / (1 - kappa) per missing column, 1 / kappa backward."""
    result = defaultdict(float)
    for weight, z0, z1 in pairs:
        for noised, flips, probability in patterns(z0, z1, kappa):
            for column, flipped in enumerate(flips):
                edit = edit_of(noised, z0 if backward else z1, column) if flipped == backward else None
                if edit is not None:
                    rate = 1 / kappa if backward else 1 / (1 - kappa)
                    result[remove_blanks(noised), edit] += weight * probability * rate
    return dict(result)


def flux(labelled):
    """``(text, text) -> flux``: several labelled edits may lead to the same text."""
    result = defaultdict(float)
    for (text, edit), value in labelled.items():
        result[text, applied(text, edit)] += value
    return dict(result)
