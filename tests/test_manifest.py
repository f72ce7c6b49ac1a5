"""Manifests: what a line holds, and errors that name the file and the line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from service.errors import ManifestError
from service.manifest import Utterance, read_manifest

EXAMPLES = Path(__file__).parent.parent / "examples"
GOOD_LINE = '{"audio_filepath": "good.wav"}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_read_manifest_gives_all_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"audio_filepath": "clips/a.wav", "duration": 1.5, "text": "café", "speaker": "s1", '
        '"corpus": "c"}',
    )
    assert read_manifest(path) == [
        Utterance(
            audio_path=tmp_path / "clips" / "a.wav",
            name="clips/a.wav",
            duration_s=1.5,
            text="café",
            speaker="s1",
            corpus="c",
        )
    ]


def test_read_manifest_needs_the_audio_path_only(tmp_path: Path) -> None:
    (utterance,) = read_manifest(write(tmp_path, '{"audio_filepath": "a.wav", "lang": "en"}'))
    assert utterance == Utterance(tmp_path / "a.wav", "a.wav", None, None, "", "")


def test_read_manifest_takes_null_where_nothing_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, '{"audio_filepath": "a.wav", "duration": null, "text": null}')
    (utterance,) = read_manifest(path)
    assert utterance.duration_s is None
    assert utterance.text is None


def test_read_manifest_keeps_an_empty_text_apart_from_none(tmp_path: Path) -> None:
    (utterance,) = read_manifest(write(tmp_path, '{"audio_filepath": "a.wav", "text": ""}'))
    assert utterance.text == ""


def test_read_manifest_resolves_paths_against_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, '{"audio_filepath": "../a.wav"}', '{"audio_filepath": "/b/c.wav"}')
    monkeypatch.chdir(tmp_path)
    first, second = read_manifest(Path("data/manifest.jsonl"))
    assert first.audio_path.resolve() == tmp_path / "a.wav"
    assert first.name == "../a.wav"
    assert second.audio_path == Path("/b/c.wav")


def test_read_manifest_reads_the_examples() -> None:
    utterances = read_manifest(EXAMPLES / "manifest.jsonl")
    assert len(utterances) == 8
    for utterance in utterances:
        assert utterance.audio_path.is_file()
        assert utterance.duration_s is not None
        assert utterance.duration_s > 3
        assert utterance.text


@pytest.mark.parametrize("blank", ["", "   ", "\t"])
def test_read_manifest_skips_blank_lines(blank: str, tmp_path: Path) -> None:
    path = write(tmp_path, blank, GOOD_LINE, blank, GOOD_LINE, blank)
    assert [u.name for u in read_manifest(path)] == ["good.wav", "good.wav"]


def test_read_manifest_takes_windows_line_ends_and_a_missing_last_one(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(f"{GOOD_LINE}\r\n{GOOD_LINE}".encode())
    assert len(read_manifest(path)) == 2


def test_read_manifest_of_no_lines_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"")
    assert read_manifest(path) == []


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_read_manifest_keeps_a_line_whole_when_text_has_unicode_line_ends(
    sign: str, tmp_path: Path
) -> None:
    row = {"audio_filepath": "a.wav", "text": f"one{sign}two"}  # JSON needs no escape for these
    (utterance,) = read_manifest(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert utterance.text == f"one{sign}two"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "Invalid JSON"),
        ("not json", "Invalid JSON"),
        ('{"audio_filepath": "a.wav"} {}', "Invalid JSON"),
        ('{"audio_filepath": "a.wav", "text": "open}', "Invalid JSON"),
        ("[]", "should be an object"),
        ('"a.wav"', "should be an object"),
        ("{}", "audio_filepath: Field required"),
        ('{"text": "words"}', "audio_filepath: Field required"),
        ('{"audio_filepath": null}', "audio_filepath: Input should be a valid string"),
        ('{"audio_filepath": 3}', "audio_filepath: Input should be a valid string"),
        ('{"audio_filepath": "a.wav", "duration": "long"}', "duration: Input should be a valid"),
        ('{"audio_filepath": "a.wav", "text": ["a"]}', "text: Input should be a valid string"),
    ],
)
def test_read_manifest_names_file_and_line_of_a_bad_line(
    line: str, complaint: str, tmp_path: Path
) -> None:
    path = write(tmp_path, GOOD_LINE, "", line, GOOD_LINE)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path} line 3: ")
    assert complaint in message
    assert 'expected a JSON object with "audio_filepath"' in message


def test_read_manifest_names_the_first_of_several_bad_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "{", GOOD_LINE, "[")
    with pytest.raises(ManifestError, match="line 1:"):
        read_manifest(path)


@pytest.mark.parametrize("data", ["café".encode("latin-1"), GOOD_LINE.encode("utf-16")])
def test_read_manifest_names_a_file_that_is_not_utf8(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=rf"{re.escape(str(path))}.*utf-8"):
        read_manifest(path)


def test_read_manifest_names_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "missing.jsonl"
    with pytest.raises(ManifestError, match=rf"{re.escape(str(path))}.*No such file"):
        read_manifest(path)


def test_read_manifest_names_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=re.escape(str(tmp_path))):
        read_manifest(tmp_path)
