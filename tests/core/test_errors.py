from __future__ import annotations

import copy

from raydist.core import errors


def test_one_screen_with_every_part() -> None:
    error = errors.DataError(
        "a shard is damaged",
        where="train/shard-00001.arrow.zst",
        found="sha256 ab",
        expected="sha256 cd",
        fix="one\ntwo",
    )
    assert str(error).splitlines() == [
        "DataError: a shard is damaged",
        "  where:    train/shard-00001.arrow.zst",
        "  found:    sha256 ab",
        "  expected: sha256 cd",
        "  fix:      one",
        "            two",
    ]


def test_survives_the_trip_between_processes() -> None:
    error = errors.NonFiniteError("nan", where="step 3", fix="lower the rate")
    rebuilt = copy.deepcopy(error)  # goes through __reduce__, as Ray's serialisation does
    assert type(rebuilt) is errors.NonFiniteError
    assert rebuilt.fields() == error.fields()
    assert str(rebuilt) == str(error)


def test_all_of_them_exit_with_two() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RaydistError)]
    assert len(kinds) >= 9
    assert {kind("x").exit_code for kind in kinds} == {2}


def test_stays_one_screen_whatever_was_found() -> None:
    error = errors.DataError("many\nlines", where="x" * 5000, found="\n".join(f"shard {n}" for n in range(100)))
    lines = str(error).splitlines()
    assert len(lines) == 1 + 1 + 14
    assert max(map(len, lines)) < 520
    assert lines[2].endswith("shard 0")
    assert lines[-1].endswith("... and 87 more lines")
    assert error.fields()["where"] == "x" * 5000
