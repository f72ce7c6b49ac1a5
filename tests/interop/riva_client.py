"""What programs do with nvidia-riva-client; runs in that package's own environment.

python riva_client.py ADDRESS models|offline|stream [FILE ...] [--punctuation] [--boost PHRASE]

Prints JSON.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import riva.client
import riva.client.proto.riva_asr_pb2 as rasr


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("command", choices=["models", "offline", "stream"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--punctuation", action="store_true")
    parser.add_argument("--boost", action="append", default=[])
    parser.add_argument("--api-key")
    arguments = parser.parse_args()
    metadata = [["authorization", f"Bearer {arguments.api_key}"]] if arguments.api_key else None
    auth = riva.client.Auth(uri=arguments.address, metadata_args=metadata)
    service = riva.client.ASRService(auth)
    if arguments.command == "models":
        print(json.dumps(list_models(service)))
        return
    work = recognise if arguments.command == "offline" else stream
    with ThreadPoolExecutor(len(arguments.files)) as pool:
        found = list(pool.map(lambda path: work(service, path, arguments), arguments.files))
    print(json.dumps(found))


def list_models(service):
    response = service.stub.GetRivaSpeechRecognitionConfig(
        rasr.RivaSpeechRecognitionConfigRequest(), metadata=service.auth.get_auth_metadata()
    )
    return [
        {"name": m.model_name, "type": m.parameters["type"], "code": m.parameters["language_code"]}
        for m in response.model_config
    ]


def make_config(arguments):
    config = riva.client.RecognitionConfig(
        language_code="en-US",
        max_alternatives=1,
        profanity_filter=False,
        enable_automatic_punctuation=arguments.punctuation,
        verbatim_transcripts=True,
        enable_word_time_offsets=True,
    )
    riva.client.add_word_boosting_to_config(config, arguments.boost, 4.0)
    return config


def recognise(service, path, arguments):
    config = make_config(arguments)
    riva.client.add_audio_file_specs_to_config(config, path)
    response = service.offline_recognize(path.read_bytes(), config)
    return {
        "transcript": "".join(r.alternatives[0].transcript for r in response.results),
        "words": [
            (w.word, w.start_time, w.end_time, w.confidence)
            for r in response.results
            for w in r.alternatives[0].words
        ],
        "audio_processed": response.results[-1].audio_processed,
    }


def stream(service, path, arguments):
    config = riva.client.StreamingRecognitionConfig(
        config=make_config(arguments), interim_results=True
    )
    riva.client.add_audio_file_specs_to_config(config, path)
    riva.client.add_endpoint_parameters_to_config(config, -1, -1.0, 800, -1, -1.0, -1.0)
    finals, n_interim = [], 0
    with riva.client.AudioChunkFileIterator(path, 1600) as chunks:
        for response in service.streaming_response_generator(chunks, config):
            for result in response.results:
                if result.is_final:
                    finals.append(result.alternatives[0].transcript)
                else:
                    n_interim += 1
    return {"transcript": "".join(finals), "n_interim": n_interim}


if __name__ == "__main__":
    main()
