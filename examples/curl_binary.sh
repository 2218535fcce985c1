#!/bin/sh
# Inspect one frame with curl and Triton's binary extension: the request's JSON, then the raw bytes of both inputs.
# curl_binary.sh http://HOST:PORT CATEGORY RGB.raw XYZ.raw HEIGHT WIDTH [THRESHOLD]
# RGB.raw holds HEIGHT x WIDTH x 3 bytes, XYZ.raw as many little-endian floats in metres, NaN or (0, 0, 0) at holes.
set -eu
bytes() { wc -c < "$1" | tr -d ' '; }
head=$(printf '{"parameters": {%s}, "outputs": [{"name": "score"}, {"name": "verdict"}, {"name": "defects"}], "inputs": [
{"name": "rgb", "datatype": "UINT8", "shape": [%d, %d, 3], "parameters": {"binary_data_size": %d}},
{"name": "xyz", "datatype": "FP32", "shape": [%d, %d, 3], "parameters": {"binary_data_size": %d}}]}' \
    "${7:+\"threshold\": \"$7\"}" "$5" "$6" "$(bytes "$3")" "$5" "$6" "$(bytes "$4")")
{ printf '%s' "$head" && cat "$3" "$4"; } |
    curl --silent --show-error --fail-with-body --noproxy localhost,127.0.0.1 \
        --header "Inference-Header-Content-Length: $(printf '%s' "$head" | wc -c | tr -d ' ')" \
        --header 'Content-Type: application/octet-stream' \
        --data-binary @- "$1/v2/models/$2/infer"
