"""The DeepSpeed engine: ZeRO stages 0 to 3, with or without offload.

Weights stay float32 and autocast computes in bfloat16, so that both engines do the same arithmetic. What a rank holds
is in :mod:`notellm2_ray.train.memory`.

DeepSpeed reads its checkpoints with pickle. Only checkpoints that this run wrote into its own directory are ever read.
The models that a run puts out are safetensors.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.train.distributed import gather_rows, rank
from notellm2_ray.train.engine import adamw, parameter_groups, set_learning_rates
from notellm2_ray.train.one_load import fill, share_out
from notellm2_ray.train.state_writer import StateWriter

_TAG = "zero"
_MAX_BUCKET = 200_000_000  # elements; DeepSpeed allocates a whole bucket however small the model is


class ZeroEngine:
    """DeepSpeed around the module."""

    def __init__(self, module: Any, settings: TrainSettings, device: torch.device, loaded_once: bool = False) -> None:
        deepspeed = _import_deepspeed(device)
        self._device = device
        self._sharded = settings.zero_stage == 3
        offloaded = device.type == "cuda" and settings.offload != "none"
        # Before weights are divided, which takes their shapes away.
        groups, config = parameter_groups(module, settings), zero_config(module, settings)
        if loaded_once and self._sharded:
            share_out(module, device, config)
        elif loaded_once:
            fill(module, device)
        if not offloaded:
            module.to(device)
        optimizer = _cpu_adamw(groups, settings) if offloaded else adamw(groups, settings)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.module = module
        self._writer = StateWriter(settings.background_checkpoints)
        files = self._engine.checkpoint_engine
        save = files.save  # called with (state_dict, path), by name or not
        files.save = lambda state_dict, path: self._writer.write(save, state_dict, path)

    def __call__(self, *inputs: Any, last: bool = True) -> Any:
        return self._engine(*inputs)

    def accumulate(self, loss: torch.Tensor) -> None:
        self._backward(loss, last=False)

    def update(self, loss: torch.Tensor, factor: float) -> None:
        set_learning_rates(self._engine.optimizer, factor)
        self._backward(loss, last=True)

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        # The number of parts differs between steps, while DeepSpeed's own count of them is fixed.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        self._engine.step()

    def save(self, directory: Path) -> None:
        # Frozen weights are read from the base model again; with an adapter they are nearly the whole model.
        self._engine.save_checkpoint(str(directory), tag=_TAG, exclude_frozen_parameters=True)

    def finish_save(self) -> None:
        self._writer.finish()

    def load(self, directory: Path) -> None:
        path, _ = self._engine.load_checkpoint(
            str(directory), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise OutputError(f"{directory} holds no DeepSpeed checkpoint: delete the output directory and train again")

    def state_dict(self, trained_only: bool = False) -> Mapping[str, torch.Tensor] | None:
        named = dict(self.module.model.named_parameters())
        if trained_only:
            named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        whole: dict[str, torch.Tensor] = {}
        if self._sharded:
            whole = {name: self._gather(parameter) for name, parameter in named.items()}
        if rank() != 0:
            return None
        # Copied, because under ZeRO the weights are views of one flat tensor and cannot be saved as separate tensors.
        kept = named if trained_only else self.module.model.state_dict()
        rest = {k: v.detach().to("cpu", copy=True) for k, v in kept.items() if k not in whole}
        return {**rest, **whole}

    def _gather(self, parameter: Any) -> torch.Tensor:
        """A sharded parameter on the CPU of rank 0, in float32 (DeepSpeed's own gathering returns bfloat16)."""
        parts, _ = gather_rows(parameter.ds_tensor.detach().to(self._device).flatten())
        if rank() != 0:
            return torch.empty(0)
        return parts[: parameter.ds_numel].view(parameter.ds_shape).to("cpu", copy=True)


def zero_config(module: Any, settings: TrainSettings) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings."""
    pairs = settings.batch_pairs // settings.num_workers
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    bucket = min(_MAX_BUCKET, -(-trained // 1024) * 1024)  # it must be even
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "overlap_comm": settings.gpus_per_worker > 0,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if settings.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": settings.gpus_per_worker > 0}
    if settings.offload == "parameters_and_optimizer":
        zero["offload_param"] = {"device": "cpu", "pin_memory": settings.gpus_per_worker > 0}
    return {
        "train_micro_batch_size_per_gpu": pairs,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "torch_autocast": {"enabled": settings.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


def _cpu_adamw(groups: list[dict[str, Any]], settings: TrainSettings) -> Any:
    """AdamW for weights that a GPU run keeps in CPU memory. It is compiled at first use and beats PyTorch's by far."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, betas=settings.betas, eps=settings.epsilon, adamw_mode=True)


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with little logging, and on a CPU without its compiled operators."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise it uses any GPU that it sees
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # Otherwise it compiles its shared-memory all-reduce with g++ (tens of seconds), which training never calls.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
