"""The contenders of ``step.py``, one per process: raydist's own step, and transformers' Trainer.

Both start from the same Hugging Face directory, read the same rows in the same order, in float32 on one thread, and take
their steps when an order says so: ``{"steps": 5}`` on stdin is answered by ``{"seconds": ..., "cpu_seconds": ..., "loss":
...}``, the time from the first fetch of a batch to the end of the last optimizer step, and the mean loss. With ``"profile":
true`` the answer also tells the share of each operator in the CPU time.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BETAS, EPS, WEIGHT_DECAY, CLIP_NORM, LEARNING_RATE = (0.9, 0.95), 1e-8, 0.1, 1.0, 3e-4


class Pacer:
    """Reads orders, times the steps between, answers."""

    def begin(self) -> bool:
        """Waits for the next order and starts the clock; False when there are no more."""
        line = sys.stdin.readline()
        if not line:
            return False
        order = json.loads(line)
        self.steps_left = int(order["steps"])
        self.losses: list[Tensor] = []
        self._profiler = torch.profiler.profile() if order.get("profile") else None
        if self._profiler is not None:
            self._profiler.start()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        return True

    def end_step(self, loss: Tensor) -> bool:
        """Counts a step; True if it was the order's last, which is then answered."""
        self.losses.append(loss)
        self.steps_left -= 1
        if self.steps_left:
            return False
        answer: dict[str, Any] = {"seconds": time.perf_counter() - self._started}
        answer["cpu_seconds"] = time.process_time() - self._cpu_started
        answer["loss"] = torch.stack(self.losses).double().mean().item()
        if self._profiler is not None:
            self._profiler.stop()
            answer["shares"] = _shares(self._profiler)
        print(json.dumps(answer), flush=True)
        return True


def _shares(profiler: Any) -> dict[str, float]:
    own_us = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return {name: us / sum(own_us.values()) for name, us in own_us.items()}


def run_raydist(spec: dict[str, Any], tokens_NL: Tensor) -> None:
    """FSDP2 on one worker, the objective, the guarded optimizer and the meters: what the loop runs."""
    from raydist.config.schema import OptimizerConfig
    from raydist.core.dist import process_group
    from raydist.fsdp_utils.materialize import materialize
    from raydist.fsdp_utils.mesh import make_mesh
    from raydist.models.hf import HfWeights, read_hf_config
    from raydist.training.batches import step_batch_maker
    from raydist.training.host_memory import keep_freed_memory
    from raydist.training.meters import Meters
    from raydist.training.optim import GuardedAdamW
    from raydist.training.step import NonFiniteGuard, train_step

    keep_freed_memory()
    config = read_hf_config(spec["folder"])
    objective = _objective(spec["objective"], config.vocab_size)
    batch_rows = spec["batch_rows"]
    make = step_batch_maker(objective, noise_seed=0, microbatch_rows=batch_rows)
    with process_group() as workers:
        model = materialize(
            config,
            mesh=make_mesh(workers),
            device=workers.device,
            seed=0,
            compile=spec["compile"],
            weights=HfWeights(spec["folder"], config),
            reshard_after_forward=False,
        )
        settings = OptimizerConfig(learning_rate=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        optimizer = GuardedAdamW(model.named_parameters(), settings)
        guard, meters, pacer, step = NonFiniteGuard.create(workers.device), Meters(), Pacer(), 0
        while pacer.begin():
            is_last = False
            while not is_last:
                batch = make(_rows(tokens_NL, step=step, batch_rows=batch_rows))
                train_step(
                    model,
                    objective,
                    optimizer,
                    batch,
                    device=workers.device,
                    clip_norm=CLIP_NORM,
                    guard=guard,
                    meters=meters,
                )
                is_last = pacer.end_step(torch.tensor(meters.read()["loss"]))
                step += 1


def _objective(name: str, vocab_size: int) -> Any:
    from raydist.objectives.base import TokenIds
    from raydist.objectives.next_token import NextTokenConfig
    from raydist.objectives.set_block import SetBlockConfig

    ids = TokenIds(vocab_size, bos=None, eos=None, mask=vocab_size - 1, pad=None)
    return (SetBlockConfig() if name == "set_block" else NextTokenConfig()).build(ids)


def _rows(tokens_NL: Tensor, *, step: int, batch_rows: int) -> Any:
    """Rows of one document each. The last token gets no loss, as it has no successor in the Trainer's rows."""
    from raydist.core.rows import Rows

    rows_B = (step * batch_rows + torch.arange(batch_rows)) % tokens_NL.shape[0]
    tokens_BL = tokens_NL[rows_B]
    tokens_BS = torch.cat([tokens_BL, tokens_BL[:, :1]], dim=1)
    loss_mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    loss_mask_BS[:, -1] = False
    return Rows(
        step=step,
        tokens_BS=tokens_BS,
        documents_BS=torch.zeros_like(tokens_BS, dtype=torch.int32),
        loss_mask_BS=loss_mask_BS,
        rows_B=rows_B,
        epochs_B=torch.zeros_like(rows_B),
    )


def run_trainer(spec: dict[str, Any], tokens_NL: Tensor) -> None:
    """The Trainer as its documentation tunes it: fused AdamW, SDPA, no logging, no NaN filter, tensors ready to stack."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator

    pacer = Pacer()

    class Paced(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Orders(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pacer.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if pacer.end_step(trainer.last_loss):
                control.should_training_stop = not pacer.begin()

    class EndlessRows(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            row_L = tokens_NL[index % tokens_NL.shape[0]]
            return {"input_ids": row_L, "labels": row_L}

    arguments = TrainingArguments(
        output_dir=spec["scratch"],
        use_cpu=True,
        per_device_train_batch_size=spec["batch_rows"],
        max_steps=10**5,
        optim="adamw_torch_fused",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        torch_compile=spec["compile"],
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    trainer = Paced(
        model=model,
        args=arguments,
        train_dataset=EndlessRows(),
        data_collator=default_data_collator,
        callbacks=[Orders()],
    )
    trainer.train()


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    tokens_NL = torch.from_numpy(np.load(Path(spec["folder"]).parent / "tokens.npy"))
    {"raydist": run_raydist, "trainer": run_trainer}[spec["contender"]](spec, tokens_NL)


if __name__ == "__main__":
    main()
