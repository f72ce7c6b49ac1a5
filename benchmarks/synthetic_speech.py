"""Synthetic speech for training: sentences of a text, read by the speech synthesisers of Debian.

apt install espeak-ng flite
python benchmarks/synthetic_speech.py books.txt.xz runs/synthetic [--hours 3]

Writes a folder of WAV files and a manifest, `train.jsonl`, of the corpus `synthetic`; each voice is
a speaker. Speed, and espeak-ng's pitch, are drawn for each sentence. `recipes.py --train
train.jsonl runs/synthetic/train.jsonl` trains on it where a variant's corpora have `synthetic`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import wave
from pathlib import Path
from typing import Final

from tqdm import tqdm

from training.lm_text import TextPart, read_sentences

ACCENTS: Final = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan")
TIMBRES: Final = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
FLITE_VOICES: Final = ("kal16", "awb", "rms", "slt")
FLITE_SHARE: Final = 0.4
WORDS: Final = range(4, 26)
"""Lengths of the sentences that are read, words."""


def main() -> None:
    """Read sentences until there are as many hours as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="a sentence a line; plain, .gz or .xz")
    parser.add_argument("output", type=Path)
    parser.add_argument("--hours", type=float, default=3.0)
    options = parser.parse_args()
    if missing := [name for name in ("espeak-ng", "flite") if shutil.which(name) is None]:
        raise SystemExit(f"{' and '.join(missing)} not found: apt install espeak-ng flite")
    lines = read_sentences([TextPart(options.text)])
    sentences = [line for line in lines if len(line.split()) in WORDS]
    draw = random.Random(0)
    draw.shuffle(sentences)
    audio = options.output / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    with (
        (options.output / "train.jsonl").open("w", encoding="utf-8") as manifest,
        tqdm(total=round(options.hours * 3600), unit="s") as bar,
    ):
        for i, sentence in enumerate(sentences):
            path = audio / f"{i:06}.wav"
            voice = say(sentence, path, draw)
            with wave.open(str(path)) as read:
                duration = read.getnframes() / read.getframerate()
            row = {
                "audio_filepath": f"audio/{path.name}",
                "duration": round(duration, 3),
                "text": sentence,
                "speaker": voice,
                "corpus": "synthetic",
            }
            manifest.write(json.dumps(row) + "\n")
            seconds += duration
            bar.update(round(seconds) - bar.n)
            if seconds >= options.hours * 3600:
                break


def say(sentence: str, path: Path, draw: random.Random) -> str:
    """Have a drawn voice read a sentence into a WAV file; returns the voice's name."""
    if draw.random() < FLITE_SHARE:
        voice = draw.choice(FLITE_VOICES)
        stretch = f"duration_stretch={draw.uniform(0.85, 1.25):.2f}"
        command = ["flite", "-voice", voice, "--setf", stretch, "-t", sentence, "-o", str(path)]
    else:
        voice = f"{draw.choice(ACCENTS)}+{draw.choice(TIMBRES)}"
        speed, pitch = str(draw.randint(130, 200)), str(draw.randint(25, 75))
        command = ["espeak-ng", "-v", voice, "-s", speed, "-p", pitch, "-w", str(path), sentence]
    subprocess.run(command, check=True)
    return voice


if __name__ == "__main__":
    main()
