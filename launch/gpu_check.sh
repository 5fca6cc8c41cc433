#!/usr/bin/env bash
# Everything that needs a GPU: tests/gpu, the times of a step beside other optimizers, and the memory of training.
#
#     bash launch/gpu_check.sh [DIRECTORY]
#
# Needs python3 with torch and triton, and pytest for the tests; nothing is installed or fetched. The C library, which
# looks at tensors in each step, is compiled as an installation does, if there are setuptools and a compiler. Takes about
# four minutes: each part has its limit. Results go to the terminal and, with the single times, into DIRECTORY. The exit
# status is that of the first part that failed. PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$out/triton}"
status=0

part() { # NAME SECONDS COMMAND...: run it, keep what it says, go on whatever becomes of it
    local name=$1 limit=$2 before=$SECONDS
    shift 2
    echo "+ $name: $*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local ended=${PIPESTATUS[0]}
    [ "$ended" -eq 124 ] && echo "$name: stopped after $limit s"
    [ "$ended" -ne 0 ] && [ "$status" -eq 0 ] && status=$ended
    echo "$name: $((SECONDS - before)) s, exit status $ended"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())" ||
    { echo "gpu_check.sh needs torch, triton and a GPU that torch sees" >&2; exit 1; }

if "$python" -c "import setuptools.command.bdist_wheel" 2> /dev/null; then # (optimizing takes a minute and more on a slow or busy machine)
    part library 240 "$python" setup.py -q build_ext --inplace
else
    echo "library: left out, for setuptools is not installed, or below 77; without it the host takes longer"
fi

if has pytest; then
    # Other versions of other packages warn of other things: warnings are shown. Where one counts, the test says so.
    tests=("$python" -m pytest -q -o addopts= -W default -p no:cacheprovider tests/gpu)
    has xdist && tests+=(-n 6 --dist loadgroup)
    has pytest_timeout && tests+=(--timeout 80)
    part tests 110 "${tests[@]}"
else
    echo "tests: left out, for pytest is not installed: pip install pytest"
    status=1
fi
bench() { # NAME SECONDS OPTIONS...
    part "$1" "$2" "$python" launch/bench.py step --device cuda --threads 8 --json "$out/$1.json" "${@:3}"
}
ours=("SM3, triton" "recipe, triton" Adafactor Muon muon-like torch-SM3 FlashAdamW bitsandbytes "AdamW(foreach)")
bench gpt2 50 --models gpt2 --rounds 15 --only "${ours[@]}"
bench decoder 45 --models decoder --dtypes bfloat16 --rounds 9 --only "SM3, triton" "recipe, triton" FlashAdamW bitsandbytes
bench small 45 --models small resnet50 --rounds 9 --only "SM3, triton" "recipe, triton"
part memory 60 "$python" launch/memory.py --device cuda --out "$out/memory" --models 1.3b \
    --ways recipe-bf16-momentum8-backward
exit "$status"
