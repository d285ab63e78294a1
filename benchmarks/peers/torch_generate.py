"""transformers' generate in torch: `python -m benchmarks.peers.torch_generate generate SPEC`.

The prompts and response lengths that ours has written to the scratch folder, in their order, padded
on the left to batches; a batch goes on until its longest response is finished.
"""

import json
import pathlib
import time
from typing import Any

import torch
import transformers

from benchmarks import protocol


class TorchGenerate:
    def __init__(self, spec: dict[str, Any]):
        asked = json.loads((pathlib.Path(spec["scratch"]) / "generate.json").read_text())
        self._prompts, self._lengths = asked["prompts"], asked["lengths"]
        self._batch_size = asked["batch_size"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            asked["model"], dtype=getattr(torch, asked["dtype"])
        ).eval()
        self._answer(self._prompts[:1], 4)
        self.info = {
            "responses": len(self._prompts),
            "tokens": sum(self._lengths),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
            "threads": torch.get_num_threads(),
        }

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]], new: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        found = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )
        assert found.shape[1] == longest + new, found.shape

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        for first in range(0, len(self._prompts), self._batch_size):
            rows = slice(first, first + self._batch_size)
            self._answer(self._prompts[rows], max(self._lengths[rows]))
        return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    protocol.serve({"generate": TorchGenerate})
