#!/usr/bin/env bash
# Builds lmplz and build_binary from the kenlm source distribution and installs them beside python.
# Needs a C++ compiler, cmake, and Boost, which it installs itself where it may (root on Debian).
# Usage: training/install_lmplz.sh [PYTHON]
set -euo pipefail

python=${1:-.venv/bin/python}
kenlm_version=0.3.0
boost="libboost-program-options-dev libboost-system-dev libboost-thread-dev libboost-test-dev zlib1g-dev"

bin=$("$python" -c 'import sys; print(sys.prefix + "/bin")')
if [ -x "$bin/lmplz" ] && [ -x "$bin/build_binary" ]; then
  echo "lmplz and build_binary are already in $bin"
  exit 0
fi
for tool in cmake c++ make; do
  command -v "$tool" >/dev/null || { echo "install_lmplz: $tool is missing; install it first" >&2; exit 1; }
done
has_boost() { echo '#include <boost/version.hpp>' | c++ -E -x c++ - >/dev/null 2>&1; }
if ! has_boost && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Boost: apt-get install $boost"
  # shellcheck disable=SC2086  # the list is meant to split
  apt-get update -qq && apt-get install -y -qq $boost >/dev/null
fi
if ! has_boost; then
  echo "install_lmplz: Boost is missing; on Debian: sudo apt-get install $boost" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "fetching the source of kenlm $kenlm_version"
"$python" -m pip download --quiet --no-deps --no-build-isolation --no-binary kenlm \
  --dest "$work" "kenlm==$kenlm_version"
tar -xzf "$work/kenlm-$kenlm_version.tar.gz" -C "$work"
echo "compiling lmplz and build_binary (about a minute)"
cmake -S "$work/kenlm-$kenlm_version" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_PYTHON=OFF -DCMAKE_POLICY_VERSION_MINIMUM=3.5 >"$work/log" 2>&1 &&
  cmake --build "$work/build" --target lmplz build_binary --parallel 2 >>"$work/log" 2>&1 ||
  { tail -n 30 "$work/log" >&2; echo "install_lmplz: the build failed; its last lines are above" >&2; exit 1; }
install "$work/build/bin/lmplz" "$work/build/bin/build_binary" "$bin/"
echo "installed lmplz and build_binary in $bin"
