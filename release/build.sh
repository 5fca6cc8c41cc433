#!/usr/bin/env bash
# Build what is uploaded, into dist/: an sdist; a wheel for Linux on x86-64 and on aarch64, each for every Python; and one
# without the C kernel for other systems. Needs gcc, aarch64-linux-gnu-gcc for the second wheel (left out and said so where
# it is missing), and the extra `release`.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf dist build
python -m build --sdist --outdir dist .

wheel() { # architecture, C compiler
    rm -rf build
    SM3_DIST_WHEEL=any-python CC="$2" LDSHARED="$2 -shared" _PYTHON_HOST_PLATFORM="linux-$1" \
        CFLAGS="-include $PWD/release/old_glibc.h" LDFLAGS="-s" python -m build --wheel --outdir build/raw .
}
wheel x86_64 gcc
auditwheel repair --plat manylinux_2_17_x86_64 --only-plat --wheel-dir dist build/raw/*.whl
if command -v aarch64-linux-gnu-gcc >/dev/null; then
    wheel aarch64 aarch64-linux-gnu-gcc
    # auditwheel knows no other architecture than its own; what it would ask is the newest version of a symbol.
    newest=$(readelf --version-info build/lib*/sm3_dist/kernels/c/_cpu.so | grep -o 'GLIBC_[0-9.]*' | sort -V | tail -n 1)
    [ "$newest" = GLIBC_2.17 ] || { echo "the aarch64 library needs $newest, which is newer than manylinux_2_17" >&2; exit 1; }
    python -m wheel tags --platform-tag manylinux2014_aarch64.manylinux_2_17_aarch64 build/raw/*.whl
    cp build/raw/*manylinux*.whl dist
else
    echo "no aarch64-linux-gnu-gcc: no wheel for aarch64" >&2
fi
rm -rf build
SM3_DIST_WHEEL=pure python -m build --wheel --outdir dist .
rm -rf build
twine check --strict dist/*
check-wheel-contents dist/*.whl
ls -l dist
