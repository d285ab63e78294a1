"""From preference files to rows: sources, tokenization, batching, and the prepared dataset."""
