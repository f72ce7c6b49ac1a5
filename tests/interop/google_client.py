"""What programs do with google-cloud-speech; runs in that package's own environment.

python google_client.py ADDRESS recognize|stream|long [FILE ...] [--boost PHRASE] [--ca PEM]

Prints JSON.
"""

import argparse
import json
from pathlib import Path

import grpc
from google.cloud import speech
from google.cloud.speech_v1.services.speech.transports import SpeechGrpcTransport


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("command", choices=["recognize", "stream", "long"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--punctuation", action="store_true")
    parser.add_argument("--boost", action="append", default=[])
    arguments = parser.parse_args()
    channel = grpc.insecure_channel(arguments.address)
    client = speech.SpeechClient(transport=SpeechGrpcTransport(channel=channel))
    work = {"recognize": recognize, "stream": stream, "long": long_running}[arguments.command]
    print(json.dumps([work(client, path, arguments) for path in arguments.files]))


def make_config(arguments):
    return speech.RecognitionConfig(
        language_code="en-US",
        model="latest_long",
        use_enhanced=True,
        enable_word_time_offsets=True,
        enable_word_confidence=True,
        enable_automatic_punctuation=arguments.punctuation,
        speech_contexts=[speech.SpeechContext(phrases=arguments.boost, boost=10.0)],
    )


def recognize(client, path, arguments):
    audio = speech.RecognitionAudio(content=path.read_bytes())
    return describe(client.recognize(config=make_config(arguments), audio=audio).results)


def long_running(client, path, arguments):
    audio = speech.RecognitionAudio(content=path.read_bytes())
    operation = client.long_running_recognize(config=make_config(arguments), audio=audio)
    found = describe(operation.result(timeout=120).results)
    return {**found, "progress": operation.metadata.progress_percent}


def describe(results):
    words = [w for r in results for w in r.alternatives[0].words]
    return {
        "transcript": "".join(r.alternatives[0].transcript for r in results),
        "words": [
            (w.word, w.start_time.total_seconds(), w.end_time.total_seconds(), w.confidence)
            for w in words
        ],
        "language": results[0].language_code,
    }


def stream(client, path, arguments):
    config = speech.StreamingRecognitionConfig(config=make_config(arguments), interim_results=True)
    content = path.read_bytes()
    requests = (
        speech.StreamingRecognizeRequest(audio_content=content[start : start + 3200])
        for start in range(0, len(content), 3200)
    )
    finals, n_interim = [], 0
    for response in client.streaming_recognize(config, requests):
        for result in response.results:
            if result.is_final:
                finals.append(result.alternatives[0].transcript)
            else:
                n_interim += 1
    return {"transcript": "".join(finals), "n_interim": n_interim}


if __name__ == "__main__":
    main()
