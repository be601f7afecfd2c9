"""Expert weight gradients the way Megatron's DDP wants them: added to `weight.main_grad` in fp32."""

import torch
from torch import Tensor

from megamoe_train.reference import wide


class MainGradSink:
    """autograd.WeightGradSink for one backward, following layers.py:660-722 of megatron-core 0.19.2.

    A weight with a wide `main_grad` is accumulated into it, DDP is told so by `grad_added_to_main_grad`, and autograd
    gets a placeholder, because DDP's hook asserts that `grad` is there. A weight without one, or with a narrow one
    (`accumulate_allreduce_grads_in_fp32=False`), returns its gradient, which DDP adds itself.
    """

    def __init__(self):
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def buffer(self, weight: Tensor) -> Tensor | None:
        main_grad = getattr(weight, "main_grad", None)
        return main_grad if main_grad is not None and main_grad.dtype == wide(weight.dtype) else None

    def finish(self, weight: Tensor, grad: Tensor | None) -> Tensor | None:
        if grad is not None:
            return grad.to(weight.dtype)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        return self._placeholder(weight)

    def _placeholder(self, weight: Tensor) -> Tensor:
        """A gradient nobody reads: all placeholders of one backward share memory, so it costs that of one weight.

        With `zero_out_wgrad` the hook adds it to main_grad after all, so that it has to be zero.
        """
        if getattr(weight, "zero_out_wgrad", False):
            return torch.zeros_like(weight)
        key = (weight.dtype, weight.device)
        memory = self._memory.get(key)
        if memory is None or memory.numel() < weight.numel():
            memory = self._memory[key] = torch.empty(weight.numel(), dtype=weight.dtype, device=weight.device)
        return memory[: weight.numel()].view(weight.shape)
