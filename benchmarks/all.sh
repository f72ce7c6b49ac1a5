#!/bin/sh
# Measures a bundle anew: most of what README.md and docs/ say of the shipped one, a log a command in OUT.
# `voxgate tune`, which comes before, and the half-hour soak of a server are not in it.
#
#   benchmarks/all.sh accuracy DEV.jsonl LM.arpa.gz OUT [BUNDLE]   # may share the machine with others
#   benchmarks/all.sh timing   DEV.jsonl LM.arpa.gz OUT [BUNDLE]   # wants it for itself
#
# LM.arpa.gz is the bundle's language model unquantised (`voxgate lm build --arpa`). A command whose
# log is there is left out, so a run that was stopped goes on.
set -u
part=$1 dev=$2 arpa=$3 out=$4 bundle=${5:-bundles/en-small}
PATH=$(dirname "$0")/../.venv/bin:$PATH
benchmarks=$(dirname "$0")
mkdir -p "$out"
words=$out/words.jsonl
export VOXGATE_BUNDLE="$bundle"

measure() { # NAME COMMAND…
  name=$1
  shift
  [ -e "$out/$name.log" ] && return
  echo "$(date +%H:%M:%S) $name"
  if "$@" > "$out/$name.unfinished" 2>&1; then
    mv "$out/$name.unfinished" "$out/$name.log"
  else
    echo "$name failed: see $out/$name.unfinished" >&2
  fi
}

benchmark() { # NAME SCRIPT ARGUMENT…
  name=$1 script=$2
  shift 2
  measure "$name" python "$benchmarks/$script.py" "$@"
}

case $part in
  accuracy)
    benchmark forced-alignment forced_alignment "$dev" "$words"
    benchmark accuracy accuracy "$dev"
    benchmark streaming-curve streaming_curve "$dev" --plot "$out/streaming-curve.svg"
    benchmark word-times word_times "$dev" "$words"
    benchmark endpointing endpointing "$dev" "$words"
    benchmark endpointing-520 endpointing "$dev" "$words" --set stop_history_ms=520
    benchmark endpointing-one-pass endpointing "$dev" "$words" --no-second-pass --set stop_history_ms=520
    benchmark long-recordings long_recordings "$dev" "$words"
    benchmark batching-beam batching "$dev"
    benchmark batching-greedy batching "$dev" --decoder greedy
    benchmark quantised-lm quantised_lm "$dev" "$arpa"
    benchmark phrases phrases "$dev" "$arpa"
    benchmark domains domains examples/domains/barista.yaml --commands 200 --foreign "$dev"
    ;;
  timing)
    measure evaluate-greedy voxgate evaluate "$dev" --threads 1 --decoder greedy
    measure evaluate-beam voxgate evaluate "$dev" --threads 1 --decoder beam
    measure evaluate-rescored voxgate evaluate "$dev" --threads 1 --decoder rescored
    benchmark latency-greedy streaming_latency "$dev" "$words"
    benchmark latency-beam streaming_latency "$dev" "$words" --decoder beam
    benchmark latency-rescored streaming_latency "$dev" "$words" --decoder rescored
    benchmark rescoring rescoring "$dev" "$bundle/rescorer.onnx" --corpus librispeech-dev-clean
    benchmark server-start server_start
    voxgate serve --port 50061 > "$out/server.log" 2>&1 &
    server=$!
    sleep 60
    load() { # NAME OPTION…
      name=$1
      shift
      measure "$name" voxgate bench serve "$dev" --address 127.0.0.1:50061 --server-pid $server "$@"
    }
    load serve-1 --streams 1
    load serve-offline --api offline --streams 8
    load serve-50 --streams 50 --seconds 20
    load serve-capacity --find-capacity --tries 3
    load serve-capacity-greedy --find-capacity --tries 3 --decoder greedy
    kill $server
    benchmark decoders decoders "$dev" --utterances 100
    benchmark stream-soak stream_soak "$dev" "$words"
    ;;
  *)
    echo "expected accuracy or timing, not '$part'" >&2
    exit 2
    ;;
esac
