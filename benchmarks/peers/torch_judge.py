"""The straightforward judge pass in torch: `python -m benchmarks.peers.torch_judge judge SPEC`.

transformers in float32 with eager attention and `output_attentions=True`; one prompt at a time,
both orders, on the same prompts as ours.
"""

import json
import pathlib
import time
from typing import Any

import torch
import transformers

from benchmarks import protocol


class TorchJudge:
    def __init__(self, spec: dict[str, Any]):
        asked = json.loads((pathlib.Path(spec["scratch"]) / "judge_prompts.json").read_text())
        self._prompts = [[torch.tensor([ids]) for ids in orders] for orders in asked["prompts"]]
        self._layers, (self._a, self._b) = asked["layers"], asked["letters"]
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            asked["model"], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._judge(self._prompts[0])
        self.info = {
            "pairs": len(self._prompts),
            "tokens": sum(ids.shape[1] for orders in self._prompts for ids in orders),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
            "threads": torch.get_num_threads(),
        }

    @torch.inference_mode()
    def _judge(self, orders: list[torch.Tensor]) -> list[float]:
        """Log-odds of the chosen response's letter, by order; the attention rows are made too."""
        verdicts = []
        for ids, sign in zip(orders, (1.0, -1.0), strict=True):
            output = self._model(input_ids=ids, output_attentions=True, use_cache=False)
            torch.stack([output.attentions[i][0, :, -1].mean(dim=0) for i in self._layers])
            logits = output.logits[0, -1]
            verdicts.append(sign * float(logits[self._a] - logits[self._b]))
        return verdicts

    def repeat(self) -> dict[str, Any]:
        start = time.perf_counter()
        verdicts = [self._judge(orders) for orders in self._prompts]
        return {"seconds": time.perf_counter() - start, "verdicts": verdicts}


if __name__ == "__main__":
    protocol.serve({"judge": TorchJudge})
