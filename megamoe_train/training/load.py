"""Expert load: how many tokens each router gave to each expert since the last reading."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class LayerLoad:
    """One MoE layer over all ranks since the last reading."""

    least: float  # tokens of the expert with the fewest, over the mean
    most: float  # tokens of the expert with the most, over the mean
    cv: float  # standard deviation over the mean
    empty: int  # experts without a token
    dropped: int  # (token, choice) pairs that the router dropped

    @property
    def triple(self) -> tuple[float, float, float]:
        return self.least, self.most, self.cv


class ExpertLoad:
    """Counts on this rank, by layer and expert; `read()` sums them over all ranks."""

    def __init__(self, model_chunks: list[torch.nn.Module], num_layers: int) -> None:
        """`num_layers`: decoder layers of the whole model; layers of multi-token prediction are counted after them."""
        self._counts: dict[int, torch.Tensor] = {}  # per layer [E + 1]: tokens of each expert, choices of all tokens
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
            routing_map_TE = output[1].detach()
            choices = routing_map_TE.shape[0] * router.topk
            counts = torch.nn.functional.pad(routing_map_TE.sum(dim=0, dtype=torch.int64), (0, 1), value=choices)
            self._counts[layer] = self._counts[layer] + counts if layer in self._counts else counts

        return hook

    def read(self) -> dict[int, LayerLoad]:
        """The load of every MoE layer by number; then starts again. Collective over all ranks."""
        if 0 in self._shape:
            return {}
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        layers, experts = self._shape
        total_LE = torch.zeros((layers, experts + 1), dtype=torch.int64, device=device)
        for layer, counts in self._counts.items():
            total_LE[layer] = counts
        self._counts.clear()
        dist.all_reduce(total_LE)
        return {layer: summary(row[:-1], int(row[-1])) for layer, row in enumerate(total_LE.cpu()) if row.any()}


def summary(counts_E: torch.Tensor, choices: int) -> LayerLoad:
    """counts_E: tokens of each expert, int64. choices: (token, choice) pairs before the router dropped any."""
    kept = int(counts_E.sum())
    mean = max(kept, 1) / len(counts_E)
    return LayerLoad(
        least=counts_E.min().item() / mean,
        most=counts_E.max().item() / mean,
        cv=counts_E.double().std(correction=0).item() / mean,
        empty=int((counts_E == 0).sum()),
        dropped=choices - kept,
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
