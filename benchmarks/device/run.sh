#!/usr/bin/env bash
# Joins the pieces that pack.py made, unpacks them, and runs a command with them, from the working tree's root:
#
#     bash benchmarks/device/run.sh PIECES SITE COMMAND...
#
# SITE is kept: a second command on the same machine finds it unpacked.
set -euo pipefail
pieces=$1 site=$2
shift 2
root=$(cd "$(dirname "$0")/../.." && pwd)

if [ ! -e "$site/.complete" ]; then
    rm -rf "$site" && mkdir -p "$site"
    cat "$pieces"/?/piece > "$site/.archive"
    # Python unpacks where tar knows no xz
    tar -C "$site" -xJf "$site/.archive" 2> "$site/.tar" ||
        python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$site/.archive" "$site"
    rm -f "$site/.archive" "$site/.tar"
    touch "$site/.complete"
fi

export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH=$site:$root/export:$root/runtime:$root${PYTHONPATH:+:$PYTHONPATH}
# ONNX Runtime looks for CUDA and cuDNN beside itself: the machine's own wheels are elsewhere
libraries=$(python3 - <<'END'
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
folders = spec.submodule_search_locations if spec else []
print(":".join(str(lib) for one in folders for lib in sorted(pathlib.Path(one).rglob("lib")) if lib.is_dir()))
END
)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
cd "$root"
exec "$@"
