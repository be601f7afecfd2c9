"""Expert load: how many tokens each router gave to each expert since the last reading."""

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter


class ExpertLoad:
    """Counts on this rank, by layer and expert; `read()` sums them over all ranks."""

    def __init__(self, model_chunks: list[torch.nn.Module], num_layers: int) -> None:
        """`num_layers`: decoder layers of the whole model; layers of multi-token prediction are counted after them."""
        self._counts: dict[int, torch.Tensor] = {}
        routers = [item for chunk in model_chunks for item in chunk.named_modules() if isinstance(item[1], TopKRouter)]
        for name, router in routers:
            layer = router.layer_number - 1 + (num_layers if ".mtp." in f".{name}" else 0)
            router.register_forward_hook(self._counting(layer))
        self._shape = _global_shape(routers, num_layers)

    def _counting(self, layer: int):
        def hook(router, inputs, output) -> None:
            # Recomputation runs the forward pass twice, the first time without gradients; evaluation has none either.
            if not (router.training and torch.is_grad_enabled()):
                return
            counts = output[1].detach().sum(dim=0, dtype=torch.int64)
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

        return hook

    def read(self) -> dict[int, tuple[float, float, float]]:
        """Per layer: fewest and most tokens of an expert over the mean, and the coefficient of variation; then starts
        again. Collective over all ranks."""
        if 0 in self._shape:
            return {}
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        total_LE = torch.zeros(self._shape, dtype=torch.int64, device=device)
        for layer, counts in self._counts.items():
            total_LE[layer] = counts
        self._counts.clear()
        dist.all_reduce(total_LE)
        return {layer: summary(row) for layer, row in enumerate(total_LE.double().cpu()) if row.any()}


def summary(counts_E: torch.Tensor) -> tuple[float, float, float]:
    """min / mean, max / mean and standard deviation / mean of tokens per expert."""
    mean = counts_E.mean()
    return (
        (counts_E.min() / mean).item(),
        (counts_E.max() / mean).item(),
        (counts_E.std(correction=0) / mean).item(),
    )


def _global_shape(routers: list, num_layers: int) -> tuple[int, int]:
    """Rows and columns that hold the layers of every rank. Collective: pipeline stages have different layers."""
    mine = [0, 0]
    for name, router in routers:
        last = router.layer_number + (num_layers if ".mtp." in f".{name}" else 0)
        mine = [max(mine[0], last), max(mine[1], router.config.num_moe_experts)]
    shape = torch.tensor(mine, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(shape, op=dist.ReduceOp.MAX)
    return shape[0].item(), shape[1].item()
