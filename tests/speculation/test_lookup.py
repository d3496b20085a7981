"""Lookup drafts against a search through the whole text."""

import random

import pytest

from zigzag_ext.speculation.lookup import MAX_MATCH, Lookup


def searched(tokens, min_match, most):
    """What `Lookup.draft` has to give: the latest earlier occurrence, extended backwards, copied into itself where it repeats."""
    for end in range(len(tokens) - 1, min_match - 1, -1):
        if tokens[end - min_match : end] == tokens[-min_match:]:
            match = min_match
            while match < min(end, MAX_MATCH) and tokens[end - 1 - match] == tokens[-1 - match]:
                match += 1
            text = list(tokens)
            for n in range(min(most, match)):
                text.append(text[end + n])
            return text[len(tokens) :]
    return []


@pytest.mark.parametrize("vocab", [2, 5, 50])
@pytest.mark.parametrize("min_match", [1, 3, 5])
def test_drafts_are_those_of_a_search(vocab, min_match):
    rng = random.Random(vocab * 10 + min_match)
    tokens = [rng.randrange(vocab) for _ in range(60)]
    lookup, found = Lookup(tokens, min_match), 0
    for _ in range(150):
        draft = lookup.draft(7)
        assert draft == searched(lookup.tokens, min_match, 7)
        found += bool(draft)
        lookup.extend([rng.randrange(vocab) for _ in range(rng.randrange(1, 5))])
    assert found or vocab == 50


def test_a_prompt_is_filed_as_its_tokens_would_be():
    tokens = [random.Random(0).randrange(200_000) for _ in range(500)]
    grown = Lookup(tokens[:1], 3)
    grown.extend(tokens[1:])
    assert grown.places == Lookup(tokens, 3).places


def test_a_draft_is_no_longer_than_its_match():
    assert Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4], 3).draft(7) == [5, 6, 7]
    assert Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4], 3).draft(7) == [5, 6, 7, 8]
    assert Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4], 3).draft(2) == [5, 6]


def test_no_match_no_draft():
    assert Lookup([1, 2, 3, 4, 5], 3).draft(7) == [] == Lookup([1, 2], 3).draft(7) == Lookup([], 3).draft(7)


def test_equal_hashes_of_other_runs_are_no_match():
    lookup = Lookup([1, 2, 3, 4, 9, 9, 9], 3)
    lookup.places[lookup._key()] = 3
    assert lookup.draft(7) == []
