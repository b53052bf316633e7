#!/usr/bin/env bash
# Collect the wheels that a machine with torch, torchvision and no network still needs, for Linux and Python 3.12.
#
#   bench/gpu/wheels.sh DIR        then, there:  pip install --no-index --no-deps --target SITE DIR/*.whl
set -euo pipefail
dir=${1:?usage: bench/gpu/wheels.sh DIR}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$dir" \
    fastai==2.8.12 fastcore==2.2.41 fastprogress==1.1.6 fastdownload==0.0.8 fasttransform==0.0.5 \
    plum-dispatch==2.9.0 beartype==0.23.1 python-fasthtml==0.14.14 starlette==1.10.0 itsdangerous==2.2.0 python-multipart==0.0.34 \
    simplejpeg==1.9.0 torchao==0.17.0
du -sh "$dir"
