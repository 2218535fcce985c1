#!/bin/sh
# Inspect one frame with curl and JSON: curl_json.sh http://HOST:PORT CATEGORY RGB.raw XYZ.raw HEIGHT WIDTH [THRESHOLD]
# RGB.raw holds HEIGHT x WIDTH x 3 bytes, XYZ.raw as many little-endian floats in metres. For small frames: a number takes
# about ten bytes in JSON, and a Triton 2.51 dies of SIGSEGV at the 15 MB that a frame of 640 x 480 makes.
set -eu
if [ "$(($5 * $6))" -gt 65536 ]; then
    echo "a frame of $6 x $5 is too large for JSON, at most 65536 pixels are sent so; use curl_binary.sh" >&2
    exit 1
fi
numbers() { od -An -v -w16 -t "$1" "$2" | sed 's/-\{0,1\}nan/0/g; s/^ *//; s/  */,/g' | paste -sd, -; } # a hole is 0
request=$(mktemp)
trap 'rm -f "$request"' EXIT
{
    printf '{"parameters": {%s}, ' "${7:+\"threshold\": \"$7\"}"
    printf '"outputs": [{"name": "score"}, {"name": "verdict"}, {"name": "defects"}], "inputs": ['
    printf '{"name": "rgb", "datatype": "UINT8", "shape": [%d, %d, 3], "data": [' "$5" "$6"
    numbers u1 "$3"
    printf ']}, {"name": "xyz", "datatype": "FP32", "shape": [%d, %d, 3], "data": [' "$5" "$6"
    numbers f4 "$4"
    printf ']}]}'
} > "$request"
curl --silent --show-error --fail-with-body --noproxy localhost,127.0.0.1 \
    --data-binary "@$request" "$1/v2/models/$2/infer"
