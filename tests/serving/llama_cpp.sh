#!/usr/bin/env bash
# llama.cpp's server, perplexity and converter in a directory of their own, built from the sources that the package
# llama-cpp-python carries. Needs cmake and a C++ compiler; takes minutes.
#
#   tests/serving/llama_cpp.sh DIRECTORY [PYTHON]
#
# The converter is DIRECTORY/llama.cpp/convert_hf_to_gguf.py, run by DIRECTORY/bin/python; the programs lie in
# DIRECTORY/build/bin.
set -euo pipefail

directory=${1:?error: give the directory of the environment}
python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
release=0.3.36

for program in cmake c++; do
    command -v "$program" >/dev/null ||
        { echo "error: no $program here, which builds llama.cpp; on Debian: apt-get install cmake g++" >&2; exit 1; }
done

"$python" -m venv "$directory"
if [ ! -d "$directory/llama.cpp" ]; then
    sources=$(mktemp -d)
    trap 'rm -rf "$sources"' EXIT
    "$directory/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$sources" \
        "llama-cpp-python==$release"
    tar xzf "$sources"/llama_cpp_python-*.tar.gz --directory "$sources" --strip-components 1
    mv "$sources/vendor/llama.cpp" "$directory/llama.cpp"
fi

cmake -S "$directory/llama.cpp" -B "$directory/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF >/dev/null
nice cmake --build "$directory/build" --parallel "${BUILD_JOBS:-2}" --target llama-server llama-perplexity >/dev/null

# The converter's own requirements pin another torch; ours keep it the CPU build.
"$directory/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" \
    torch transformers sentencepiece protobuf numpy pyyaml requests tqdm
