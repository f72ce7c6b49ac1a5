#!/usr/bin/env bash
# Installs the clients that the server must serve, each in an environment of its own:
#   install.sh PYTHON FOLDER
set -euo pipefail
python=$1
folder=$2
for client in riva:nvidia-riva-client==2.28.0 google:google-cloud-speech==2.41.0; do
  name=${client%%:*}
  package=${client#*:}
  [ -e "$folder/$name/.$package" ] && continue
  echo "== installing $package"
  "$python" -m venv --clear "$folder/$name"
  "$folder/$name/bin/python" -m pip install --disable-pip-version-check --quiet "$package"
  touch "$folder/$name/.$package"
done
