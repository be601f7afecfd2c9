"""What Megatron's `pretrain()` asks a script for: a forward step over one micro-batch, and its loss."""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import is_first_or_last_pipeline_stage

_ON_DEVICE = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def forward_step(data_iterator, model):
    """One micro-batch through the model. Returns per-token losses `[B, S]` (last stage) and the loss function."""
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = _batch(data_iterator, vp_stage)
    losses_BS = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses_BS, partial(loss, batch["loss_mask"])


def loss(loss_mask_BS: torch.Tensor, losses_BS: torch.Tensor):
    """Sum of the losses of real tokens, their number, and the pair Megatron averages over all micro-batches."""
    mask = loss_mask_BS.view(-1).float()
    total = torch.sum(losses_BS.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected in (torch.isnan, torch.isinf):
            message = f"{rejected.__name__} holds for the loss of this rank's forward pass"
            get_rerun_state_machine().validate_result(total, rejected, message=message, tolerance=0.0, fatal=True)
    return total, tokens, {"lm loss": torch.cat([total.detach().view(1), tokens.view(1)])}


def _batch(data_iterator, vp_stage) -> dict:
    """This rank's part of a micro-batch: read where tensor rank is 0, sent to the others, cut over context ranks."""
    args = get_args()
    with_mtp = _has_mtp(args, vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not with_mtp:
        return dict.fromkeys(_ON_DEVICE)
    batch = dict.fromkeys(_ON_DEVICE)
    tensor_rank = mpu.get_tensor_model_parallel_rank()
    if tensor_rank == 0:
        read = next(data_iterator)
        batch |= {key: read[key].cuda(non_blocking=True) for key in _ON_DEVICE if read.get(key) is not None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tensor_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=with_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    if args.context_parallel_size > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return batch


def _has_mtp(args, vp_stage) -> bool:
    """Whether multi-token prediction, which needs the tokens again, lives on this stage."""
    if not args.mtp_num_layers:
        return False
    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(config.pipeline_model_parallel_layout, config.mtp_num_layers, False, vp_stage)
