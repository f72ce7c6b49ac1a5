"""Normalisation, the mapping to tokens, and the CTC map."""

from __future__ import annotations

import itertools
import math
import random
import re
import unicodedata
from collections import Counter

import pytest

from service.text import (
    BLANK,
    BLANK_TOKEN,
    CHARACTERS,
    collapse,
    decode,
    encode,
    normalise,
)

# words of letters with single inner apostrophes, one space between words
TRANSCRIPT = re.compile(r"|[a-z]+('[a-z]+)*( [a-z]+('[a-z]+)*)*")

ODD_STRINGS = [
    "",
    " ",
    "'",
    "''''",
    "a''b",
    "'a'",
    "' a ' b '",
    "don't 'quote' rock 'n' roll",
    "fo'c's'le",
    "\u2018quoted\u2019 and it\u2019s",
    "\t tabs \n and \r\n lines \x0b\x00\x85 ",
    "Zoë's naïve façade",
    "e\u0301 \u0301 \u0327",
    "٣ apples, १२ more, ①②③",
    "1'000'000 and 1,234,567.89 and 1.2.3.4",
    "007 0 00 0.0 .5 5. ,5 5,",
    "1st2nd3rd4th 11th-12th 0th 00th",
    "9" * 300,
    "9" * 20 + "th." + "9" * 20,
    "100%&+@100%",
    "мир 世界 שלום \U0001f600",
    "½ ² ﬁ Ⅳ \u210c № ™",
    "İıſßẞŉ",
    "-5 - 5 --5 5-5",
    "\u200b\u00ad\ufeff",
]


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Hello, World!", "hello world"),
        ("  two\t spaces \n and lines ", "two spaces and lines"),
        ("it\u2019s", "it's"),
        ("it\u2018s it\u02bcs it\uff07s it`s it\u00b4s", "it's it's it's it's it's"),
        ("\u201cYes,\u201d she said", "yes she said"),
        ("'quoted' \u2018quoted\u2019 ''quoted''", "quoted quoted quoted"),
        ("don't o'clock fo'c's'le", "don't o'clock fo'c's'le"),
        ("the dogs' 'tis rock 'n' roll", "the dogs tis rock n roll"),
        ("Café NAÏVE Ångström señor", "cafe naive angstrom senor"),
        ("cafe\u0301", "cafe"),
        ("İstanbul", "istanbul"),
        ("ﬁne", "fine"),
        ("air-tight \u2014 well\u2013known", "air tight well known"),
        ("a/b_c.d", "a b c d"),
        ("AT&T", "at and t"),
        ("5% + 3 @ noon", "five percent plus three at noon"),
        ("I was 21", "i was twenty one"),
        ("0 10 100 115", "zero ten one hundred one hundred fifteen"),
        ("2024", "two thousand twenty four"),
        ("1st 2nd 3rd 4th", "first second third fourth"),
        ("the 21ST and 12th", "the twenty first and twelfth"),
        ("3.14", "three point one four"),
        ("0.05", "zero point zero five"),
        ("12.", "twelve"),
        ("1,000", "one thousand"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("1,000.5", "one thousand point five"),
        ("1,000th", "one thousandth"),
        ("1,2", "one two"),
        ("1,2345", "one two thousand three hundred forty five"),
        ("007", "zero zero seven"),
        ("mp3 b2b", "mp three b two b"),
        ("999000000001", "nine hundred ninety nine billion one"),
        ("1234567890123", "one two three four five six seven eight nine zero one two three"),
        ("", ""),
        (" \n ", ""),
        ("...!?", ""),
        ("мир 世界", ""),
        ("мир hello 世界", "hello"),
    ],
)
def test_normalise_writes_text_as_spoken(text: str, spoken: str) -> None:
    assert normalise(text) == spoken


@pytest.mark.parametrize(
    ("text", "spoken"),
    [("\u210cello", "hello"), ("№ 5", "no five"), ("ABC™", "abctm")],
)
def test_normalise_keeps_letters_that_decompose_to_capitals(text: str, spoken: str) -> None:
    assert normalise(text) == spoken


@pytest.mark.parametrize("text", ODD_STRINGS)
def test_normalise_is_idempotent_on_odd_strings(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


@pytest.mark.parametrize("text", ODD_STRINGS)
def test_normalise_gives_only_words_on_odd_strings(text: str) -> None:
    assert TRANSCRIPT.fullmatch(normalise(text))


def test_normalise_gives_only_words_on_random_strings() -> None:
    rng = random.Random(0)
    signs = [*"aB9.,'%&+-@ \t", "\u2019", "é", "\u0301", "th", "st", "½", "ß", "世"]
    results = set()
    for _ in range(2_000):
        text = normalise("".join(rng.choices(signs, k=rng.randint(1, 12))))
        assert TRANSCRIPT.fullmatch(text)
        assert normalise(text) == text
        results.add(text)
    assert len(results) > 1_000


def test_normalise_gives_only_words_on_every_character_in_a_word() -> None:
    for code in range(0x3000):
        text = normalise(f"a{chr(code)}b 1{chr(code)}2")
        assert TRANSCRIPT.fullmatch(text), hex(code)


def test_normalise_is_blind_to_unicode_form() -> None:
    text = "Crème brûlée à la façon de Zoë №"
    forms = {normalise(unicodedata.normalize(form, text)) for form in ("NFC", "NFD", "NFKC")}
    assert len(forms) == 1


def test_characters_hold_blank_first_and_all_that_normalise_gives() -> None:
    assert BLANK == 0
    assert CHARACTERS[BLANK] == "<blank>"
    assert set(CHARACTERS[1:]) == set("abcdefghijklmnopqrstuvwxyz '")
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 29


def test_encode_gives_ids_of_the_token_list() -> None:
    assert encode("ab a", ["<blank>", "b", " ", "a"]) == [3, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "a", "don't stop", "of course hilda is irish"])
def test_decode_inverts_encode(text: str) -> None:
    ids = encode(text, CHARACTERS)
    assert len(ids) == len(text)
    assert BLANK not in ids
    assert decode(ids, CHARACTERS) == text


def test_decode_inverts_encode_on_normalised_odd_strings() -> None:
    for text in map(normalise, ODD_STRINGS):
        assert decode(encode(text, CHARACTERS), CHARACTERS) == text


def test_decode_gives_single_spaces() -> None:
    space, a = CHARACTERS.index(" "), CHARACTERS.index("a")
    assert decode([space, a, space, space, a, space], CHARACTERS) == "a a"
    assert decode([space], CHARACTERS) == ""
    assert decode([], CHARACTERS) == ""


@pytest.mark.parametrize(
    ("text", "missing"), [("Hello", "['H']"), ("café 7", "['7', 'é']"), ("a\nb", "['\\n']")]
)
def test_encode_names_the_characters_on_unnormalised_text(text: str, missing: str) -> None:
    with pytest.raises(ValueError, match="normalise") as caught:
        encode(text, CHARACTERS)
    assert missing in str(caught.value)


def test_encode_takes_no_blank_from_text() -> None:
    with pytest.raises(ValueError, match="no token"):
        encode("<blank>", CHARACTERS)


def collapse_by_pattern(path: tuple[int, ...]) -> list[int]:
    """Write the path as a string, shorten each run of one sign, delete the blanks."""
    runs = re.sub(r"(.)\1+", r"\1", "".join(map(str, path)))
    return [int(sign) for sign in runs.replace(str(BLANK), "")]


_PIECES = (BLANK_TOKEN, "\u2581", "\u2581th", "the", "e", "h", "t", "\u2581the", "m", "\u2581them")


def test_encode_cuts_words_into_the_fewest_pieces() -> None:
    said = [_PIECES[i] for i in encode("the them eth", _PIECES)]
    assert said == ["\u2581the", "\u2581them", "\u2581", "e", "t", "h"]


def test_decode_joins_pieces_to_words() -> None:
    assert decode(encode("the them eth", _PIECES), _PIECES) == "the them eth"


def test_encode_names_the_word_that_has_no_pieces() -> None:
    with pytest.raises(ValueError, match="no tokens for '\u2581max'"):
        encode("them max", _PIECES)


def test_collapse_equals_definition_for_all_short_paths() -> None:
    for n_frames in range(7):
        for path in itertools.product(range(4), repeat=n_frames):
            assert collapse(path) == collapse_by_pattern(path)


def test_collapse_gives_each_label_sequence_its_known_number_of_paths() -> None:
    n_frames = 7
    n_paths = Counter(
        tuple(collapse(path)) for path in itertools.product(range(3), repeat=n_frames)
    )
    assert n_paths[(1, 1, 1, 1)] == 1  # a blank has to stand between repeats
    for labels, count in n_paths.items():
        n_repeats = sum(a == b for a, b in itertools.pairwise(labels))
        slack = n_frames - len(labels) - n_repeats
        assert count == math.comb(n_frames + len(labels) - n_repeats, slack), labels


def test_collapse_keeps_repeats_that_a_blank_separates() -> None:
    assert collapse([5, 5, 0, 5, 0, 0, 7, 7]) == [5, 5, 7]
    assert collapse([0, 0]) == []
    assert collapse([]) == []
