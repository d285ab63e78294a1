"""TRL's DPOTrainer on the same pairs: `python -m benchmarks.peers.trl_dpo train SPEC`.

float32, TRL's defaults otherwise but for what `DPOConfig` is given below; its reference passes are
part of each step, as they are by default.
"""

import json
import pathlib
import time
from typing import Any

import datasets
import torch
import transformers
import trl

from benchmarks import protocol


class _Clock(transformers.TrainerCallback):
    """Times a run's steps; stops the run after `limit` of them."""

    def __init__(self):
        self.limit: int | None = None
        self.started = self.ended = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.ended = time.perf_counter()
        if self.limit is not None and state.global_step >= self.limit:
            control.should_training_stop = True


class TRLTraining:
    def __init__(self, spec: dict[str, Any]):
        scratch = pathlib.Path(spec["scratch"])
        rows = [json.loads(line) for line in (scratch / "pairs.jsonl").read_text().splitlines()]
        pairs = [
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
        self._clock = _Clock()
        self._trainer = trl.DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                spec["model"], dtype=torch.float32
            ),
            args=trl.DPOConfig(
                output_dir=str(scratch / "trl"),
                per_device_train_batch_size=spec["batch_size"],
                num_train_epochs=1,
                train_sampling_strategy="sequential",
                max_length=2048,
                learning_rate=1e-6,
                beta=0.1,
                bf16=False,
                gradient_checkpointing=spec["gradient_checkpointing"],
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(spec["model"]),
            callbacks=[self._clock],
        )
        self._clock.limit = 1
        self._trainer.train()
        self._clock.limit = None
        self.info = {
            "pairs": len(pairs),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
            "threads": torch.get_num_threads(),
        }

    def repeat(self) -> dict[str, Any]:
        self._trainer.train()
        return {"seconds": self._clock.ended - self._clock.started}


if __name__ == "__main__":
    protocol.serve({"train": TRLTraining})
