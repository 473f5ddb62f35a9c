"""ZeRO: optimizer state and gradients (stage 2), and weights too (stage 3), in shards; DeepSpeed does it.

Called directly: accelerate's wrapper for DeepSpeed leaves out CPUs, on which this project is tested. The optimizer is
torch's AdamW also where its state is offloaded to the host: DeepSpeed's own would have to be compiled first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from llava_npu.config.section import Section
from llava_npu.errors import UserError
from llava_npu.models.projectors import Projector
from llava_npu.training.checkpointing.state import SavedState, moment_key, weight_key
from llava_npu.training.engines.base import Engine, sharding_units
from llava_npu.training.engines.memory import EngineMemory, ModelSizes
from llava_npu.training.engines.registry import register
from llava_npu.training.loss import SupervisedLoss
from llava_npu.training.parts import is_batch_norm, place_weights, trained_parameters

_BUCKET = 200_000_000  # elements sent at once


class Zero2Options(Section):
    """Options of `engine: zero2`."""

    offload_optimizer: bool = Field(
        False, description="Keep optimizer state and float32 weights in the host's memory, and step there."
    )


class Zero3Options(Zero2Options):
    """Options of `engine: zero3`."""

    offload_parameters: bool = Field(
        False, description="Keep the weights in the host's memory too; with both, ZeRO-3 offload."
    )


class _ZeroEngine(Engine):
    """DeepSpeed's engine in this project's terms.

    In 16 bits DeepSpeed keeps all weights in that type, and float32 copies of the trained ones in the shards.
    """

    _stage: ClassVar[int]

    def __init__(
        self, accelerator: Accelerator, compute_dtype: torch.dtype | None, options: Zero2Options, max_grad_norm: float
    ):
        super().__init__(accelerator, compute_dtype, options, max_grad_norm)
        if compute_dtype is torch.float16:
            raise UserError(
                f"engine: {self.name} computes in bfloat16 or float32; in float16 (which this device prefers, or "
                "`precision` asks for) it would lose small gradients. Use fsdp2, which shards as much and scales its "
                "loss, or precision=fp32."
            )
        self._deepspeed = _import_deepspeed(accelerator.device.type)
        self._engine: Any = None  # DeepSpeed's, once prepared

    @classmethod
    def memory(cls, options: Zero2Options, model: ModelSizes, devices: int) -> EngineMemory:
        """Shards of gradients and optimizer, and of weights too in stage 3; two buckets of gradients on their way.

        Sources: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3; Ren et al. 2021, ZeRO-Offload
        (arXiv:2101.06840).
        """
        trained, c = model.trained, model.compute_bytes
        masters = 4 if c < 4 else 0  # DeepSpeed's float32 copy of the weights
        weights, passing = c * (trained + model.frozen), 2 * c * min(_BUCKET, trained)
        if cls._stage == 3:
            # A layer and what is fetched ahead.
            passing += c * (model.rest + model.largest_unit + min(_BUCKET, trained + model.frozen))
            weights = -(-weights // devices)
        return EngineMemory(weights, -(-4 * trained // devices), -(-(8 + masters) * trained // devices), passing)

    @classmethod
    def on_host(cls, options: Zero2Options) -> frozenset[str]:
        weights = isinstance(options, Zero3Options) and options.offload_parameters
        return frozenset(
            [*(["gradients", "optimizer"] if options.offload_optimizer else []), *(["weights"] if weights else [])]
        )

    def prepare(self, objective: SupervisedLoss, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        trained = sum(parameter.numel() for _, parameter in trained_parameters(objective))
        # DeepSpeed calls collectives by names that newer torch will drop, and warns of it at every step.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        config = self._config(bucket=min(_BUCKET, trained))
        self._model = objective.model
        if self.compute_dtype is not None:
            self._round_statistics(objective)
        if self._stage == 3:
            self._shard(objective, config)
        else:
            kept = self.compute_dtype or torch.float32
            types = {id(parameter): kept for parameter in objective.parameters()}
            place_weights(objective, self.accelerator.device, types)
        self.optimizer = make_optimizer()
        self._engine, *_ = self._deepspeed.initialize(model=objective, optimizer=self.optimizer, config=config)
        self.objective = self._engine

    def _round_statistics(self, objective: SupervisedLoss) -> None:
        """Keeps batch normalisation's statistics in the type of its weights, which DeepSpeed rounds; no other works."""
        for module in objective.modules():
            if is_batch_norm(module):
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        module._buffers[name] = buffer.to(self.compute_dtype)

    def _shard(self, objective: SupervisedLoss, config: dict[str, Any]) -> None:
        """Moves weights to the devices layer by layer, as shards; otherwise all would be there at first.

        The main process reads them; the others get their shards from it (`zero.Init`).
        """
        zero, dtype, device = self._deepspeed.zero, self.compute_dtype or torch.float32, self.accelerator.device
        for module in objective.modules():
            if isinstance(module, Projector):
                # It uses weights of layers that it does not call (a query, an attention's matrices): gathered as one.
                self._deepspeed.utils.set_z3_leaf_module(module, True)
                module.register_forward_pre_hook(_with_gradients)
        for unit in [*sharding_units(objective), objective]:
            for parameter in unit.parameters():
                if not hasattr(parameter, "ds_id"):  # not in shards yet
                    parameter.data = (
                        parameter.data.to(device, dtype, copy=True)
                        if self.accelerator.is_main_process
                        else torch.empty(parameter.shape, dtype=dtype, device=device)
                    )
            zero.Init(module=unit, config_dict_or_path=config, dtype=dtype)
        for name, buffer in objective.named_buffers():
            owner, _, own_name = name.rpartition(".")
            objective.get_submodule(owner)._buffers[own_name] = buffer.to(self.accelerator.device)
        # The loss uses the head's parameters without calling the head.
        for parameter in objective.model.get_output_embeddings().parameters():
            zero.register_external_parameter(objective, parameter)

    def _config(self, bucket: int) -> dict[str, Any]:
        pinned = self.accelerator.device.type != "cpu"
        offload = {"device": "cpu", "pin_memory": pinned}
        zero: dict[str, Any] = {
            "stage": self._stage,
            "contiguous_gradients": True,
            "overlap_comm": pinned,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if self._stage == 3:
            zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_param_persistence_threshold": min(100_000, bucket)}
        if self._options.offload_optimizer:
            zero["offload_optimizer"] = offload
        if "weights" in self.on_host(self._options):
            zero["offload_param"] = offload
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: batches are this project's
            "gradient_accumulation_steps": 1,  # neither: `micro_step` says when a step ends
            "gradient_clipping": self._max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": self.compute_dtype is torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
        }

    def loss(self, batch: Mapping[str, Any], sequence_lengths: tuple[int, ...]) -> torch.Tensor:
        loss: torch.Tensor = self.objective(batch, sequence_lengths)  # its weights are in `compute_dtype`
        return loss

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, part: torch.Tensor) -> None:
        # Gradients are averaged over processes: times their number makes that the sum.
        self._engine.backward(part * self.accelerator.num_processes)

    def step(self, max_grad_norm: float) -> torch.Tensor:
        assert max_grad_norm == self._max_grad_norm
        self._engine.step()  # which looks at the norm, and forgets a gradient that is not finite
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self.accelerator.device)

    def forget_gradients(self) -> None:
        # As DeepSpeed itself does after a step that it left out; it has no name for it that both stages share.
        zero = self._engine.optimizer
        if self._stage == 3:
            zero._overflow_clean_up(zero.loss_scale)
            return
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1  # what is next is the first pass of a step
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if self._options.offload_optimizer:
            zero.reset_cpu_buffers()

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in trained_parameters(self._model):
            yield name, self._whole(self._deepspeed.utils.safe_get_full_fp32_param(parameter))

    def trained_shapes(self) -> dict[str, torch.Size]:
        # In stage 3 the parameter itself is empty.
        return {name: getattr(each, "ds_shape", each.shape) for name, each in trained_parameters(self._model)}

    def state(self) -> dict[str, torch.Tensor]:
        """Whole tensors on the host, each in one process only.

        DeepSpeed's own shards are ranges of a flat buffer, which are no blocks of a tensor and so mean nothing to
        another engine. Each tensor is gathered, one after the other, and kept by the process that has least so far.
        """
        self._link_states()
        utils, flat = self._deepspeed.utils, next(iter(self.optimizer.state.values()))
        held, mine = [0] * self.accelerator.num_processes, self.accelerator.process_index
        tensors: dict[str, torch.Tensor] = {}

        def deal(name: str, whole: torch.Tensor) -> None:
            owner = held.index(min(held))
            held[owner] += whole.nbytes
            if owner == mine:
                tensors[name] = whole.cpu().clone()

        for name, parameter in trained_parameters(self._model):
            deal(weight_key(name), utils.safe_get_full_fp32_param(parameter))
            for key, value in flat.items():
                whole = utils.safe_get_full_optimizer_state(parameter, key) if value.ndim else value
                deal(moment_key(name, key), whole)
        return tensors

    def load_state(self, saved: SavedState) -> None:
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        trained = dict(trained_parameters(self._model))
        first = next(iter(trained))
        keys = saved.moments(first)
        for flat in flats:  # one per group of parameters; DeepSpeed makes them at the first step
            self.optimizer.state[flat] = {
                # The count of steps: a copy for each, next to the weights, where the fused AdamW wants it.
                key: saved.whole(moment_key(first, key)).to(flat.device) if key == "step" else torch.zeros_like(flat)
                for key in keys
            }
        self._link_states()
        for name, weight in saved.wholes(trained, weight_key):
            self._set(trained[name], weight, None)
            self._set_rounded(trained[name], weight)
        for key in keys:
            if key != "step":
                for name, moment in saved.wholes(trained, partial(moment_key, key=key)):
                    self._set(trained[name], moment, key)

    def _set_rounded(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        """Puts a whole tensor into the weight that is computed with, of which `_set` sets the float32 copy."""
        if self._stage == 2:
            parameter.data.copy_(whole)
            return
        with self._deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            parameter.data.copy_(whole)

    def _link_states(self) -> None:
        """Lets DeepSpeed know which part of the optimizer's state is whose.

        Stage 2 does it by itself, but once only, when the first group of parameters has stepped and the others have no
        state yet.
        """
        if self._stage == 2:
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: nn.Parameter, whole: torch.Tensor, key: str | None) -> None:
        """Puts this process's part of a whole float32 tensor into its shard; no key: the weight itself."""
        utils = self._deepspeed.utils
        if self._stage == 2:
            set_weight, set_state = utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
        else:
            set_weight, set_state = utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = F.pad(whole.flatten(), (0, size * self.accelerator.num_processes - whole.numel()))
            whole = padded.narrow(0, size * self.accelerator.process_index, size)
        if key is None:
            set_weight(parameter, whole)
        else:
            set_state(parameter, whole, key)


@register("zero2")
class Zero2Engine(_ZeroEngine):
    """Every process holds the weights; gradients and optimizer state are sharded."""

    options_class = Zero2Options
    shards_weights = False
    _stage = 2


@register("zero3")
class Zero3Engine(_ZeroEngine):
    """Weights are sharded too."""

    options_class = Zero3Options
    alternatives = ({}, {"offload_optimizer": True, "offload_parameters": True})
    shards_weights = True
    _stage = 3


def _with_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lets gradients flow to a module's inputs: DeepSpeed takes a leaf's backward pass to be over when they are there,
    and without any gives its weights up before they are used.
    """
    if not torch.is_grad_enabled():
        return inputs
    return tuple(
        each.requires_grad_() if isinstance(each, torch.Tensor) and each.is_leaf and each.is_floating_point() else each
        for each in inputs
    )


def _import_deepspeed(device_type: str) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.utils
    except ImportError as error:
        raise UserError(
            f"engine: zero2 and zero3 need DeepSpeed, which cannot be imported ({error}). "
            "Install it with `pip install llava-npu[deepspeed]`, or use engine=fsdp2."
        ) from error
    except KeyError as error:
        raise UserError(
            f"engine: DeepSpeed needs the environment variable {error}, which is not set; on an NPU, source CANN's "
            "set_env.sh first. Or use engine=fsdp2."
        ) from error
    if not hasattr(deepspeed.runtime.utils, "is_invalid_grad_norm"):
        raise UserError(
            f"engine: DeepSpeed {deepspeed.__version__} also steps where a gradient is not finite, which spoils the "
            "weights. Install 0.19.8 or newer (`pip install -U 'llava-npu[deepspeed]'`), or use engine=fsdp2."
        )
    if device_type == "cpu":
        # A helper for tensor-parallel inference, which DeepSpeed would compile for a minute before the first run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
