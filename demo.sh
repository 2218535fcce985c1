#!/usr/bin/env bash
# The main job, from good parts to a measured, served detector. `make demo` runs it inside .venv.
# usage: demo.sh METHOD [DATA]   mentor3ad, cfm or cmdr_iad; a category in MVTec 3D-AD or Eyecandies layout, a
# procedural one is made without it
set -euo pipefail
cd "$(dirname "$0")"
out=demo
method=$1
data=${2:-$out/sample}
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; wait' EXIT

step() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS"; }

mkdir -p $out
train=(--method "$method")
case $method in
    cfm) train+=(--set steps=1000) ;;
    cmdr_iad) train+=(--set steps=48) ;; # of each network: on two cores a step of a decoder takes seconds
esac
if [ $# -lt 2 ]; then
    step "a procedural category"
    m3ad-export sample-data "$data"
    # Its parts vary more than a road does (the loss still falls at the default's end), and they lie alike.
    [ "$method" != mentor3ad ] || train+=(--set guide_steps=1000 --set baseline_frames=12)
fi

step "train $method on good parts"
m3ad-export train "$data" $out/detector "${train[@]}"

step "export to ONNX and prove parity with PyTorch"
m3ad-export bundle $out/detector $out/bundle --data "$data"

step "set the verdict threshold from the validation parts"
m3ad-calibrate threshold $out/bundle --data "$data"

step "engines for RTX cards, ahead of time, without a GPU"
m3ad-export build-engine $out/bundle --target sm86 --target sm89 --target sm120 --precision fp16

step "a Triton repository of the chain: write, check, serve"
m3ad-triton write $out/bundle $out/repository --runtime onnxruntime --layout chain
m3ad-triton check $out/repository
m3ad-triton serve $out/repository --http-port 0 --grpc-port 0 --metrics-port 0 --json >$out/server.json &
server=$!
until [ -s $out/server.json ]; do
    kill -0 $server 2>/dev/null || { echo "error: Triton did not start" >&2; exit 1; }
    sleep 1
done
url=$(python -c 'import json; print(json.load(open("demo/server.json"))["grpc_url"])')

step "evaluate the test parts through the ensemble, every score map of it"
m3ad-client eval "$data" --maps --url "$url" | tee $out/eval.txt

step "measure: served chain, both layouts in this process, the plain dense network as reference, frame by frame in turn"
m3ad-client bench "$data" --bundle $out/bundle --layout fused --layout chain --url "$url" \
    --baseline dense --detector $out/detector --frames 3 --warmup 1 --json >$out/bench.json
kill $server
wait $server || [ $? -eq 130 ] # it was told to stop
server=

step "inspect the test parts with the fused layout in this process: overlays and raw maps"
m3ad-client infer "$data" --bundle $out/bundle --out $out/inspected
m3ad-client report $out/bench.json | tee $out/report.txt

picture=$(find $out/inspected -name '*.overlay.png' | grep -v /good/ | sort | head -1)
step "done: look at $picture, $out/eval.txt, $out/detector/losses.png and $out/threshold.png"
