#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of at most nine minutes.
#
#   bench/gpu/run.sh OUT DATA [PART ...]     PART: tests learners cifar steps feed; all of them by default
#
# DATA holds cifar10.tgz and imagenet_sample.tar. Each part has its own time limit, and writes its own log and JSON
# into OUT as it goes: a call that is cut off leaves the results so far. TINY=1 tries the parts on a CPU, in minutes.
set -uo pipefail
out=$(realpath "${1:?usage: bench/gpu/run.sh OUT DATA [PART ...]}")
data=$(realpath "${2:?usage: bench/gpu/run.sh OUT DATA [PART ...]}")
shift 2
parts=${*:-tests learners cifar steps feed}
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MAE_NB_DATA="$data"

part() {   # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    case " $parts " in *" $name "*) ;; *) return ;; esac
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
    echo "$name: exit $? after $((SECONDS - start)) s of at most $limit"
    tail -n "${TAIL:-12}" "$out/$name.log" | cut -c1-400
}

mkdir -p "$out"
if [ -n "${TINY:-}" ]; then
    sample="$data/imagenet_sample.tar"
    part tests 100 python3 -m pytest -q -m gpu -p no:cacheprovider tests/gpu
    part learners 200 python3 bench/gpu/learners.py --device cpu --steps 4 --rows pretrain linear --json "$out/learners.json"
    part cifar 200 python3 bench/gpu/cifar.py --device cpu --tiny --ways none --workers 0 \
        --out "$out" --json "$out/cifar.json"
    part steps 100 python3 bench/gpu/step.py --models nano --device cpu --turns 1 --steps 1 --json "$out/steps.json"
    part feed 200 python3 bench/feed.py "$sample" --device cpu --model mae_vit_nano_patch4_32 --bs 4 --steps 2 \
        --workers 1 --json "$out/feed.json"
else
    part tests 75 python3 -m pytest -q -m "not slow" -k "gpu or cuda" -p no:cacheprovider --durations 5 tests/gpu tests/data/test_decode.py
    part learners 80 python3 bench/gpu/learners.py --json "$out/learners.json"
    part cifar 250 python3 bench/gpu/cifar.py --deadline 230 --out "$out" --json "$out/cifar.json"
    part steps 130 python3 bench/gpu/step.py --budget 120 --table "$out/steps.md" --json "$out/steps.json"
    part feed 60 python3 bench/feed.py "$data/imagenet_sample.tar" --json "$out/feed.json"
fi
