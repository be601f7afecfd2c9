"""FLOP and byte model of a training step: TFLOP/s per GPU, MFU, overlap efficiency.

What counts: the matrix products of the model itself, a multiply-add as 2, forward once and backward twice (one product
for each operand's gradient). Recomputed activations, padding, norms, softmax and the optimizer do not count, so that a
run is credited with its work and not with its waste (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B; Narayanan
et al., arXiv 2104.04473, section 5.1 with the appendix). Causal attention counts half its square, as Megatron's own
`num_floating_point_operations` does; a test compares the two.

Letters: T tokens, K experts per token, H hidden size, I expert width, R ranks of the expert-parallel group.
"""

from __future__ import annotations

import re

from .shapes import Attention, ModelShape

FORWARD_AND_BACKWARD = 3  # in units of a forward pass

# Dense bf16 tensor-core peak, FLOP/s, by a pattern of torch.cuda.get_device_name(): NVIDIA's data sheets (the figures
# "with sparsity" there are twice these). H200 has an H100 SXM's compute.
PEAK_BF16 = {
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H[12]00|H800|GH200": 989.4e12,
    r"A100|A800": 312e12,
    r"B200|GB200": 2250e12,
}


def peak_of(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by its name; None for one that is not in the table, and for the CPU."""
    return next((peak for pattern, peak in PEAK_BF16.items() if re.search(pattern, device_name)), None)


def moe_forward(tokens: int, top_k: int, hidden: int, width: int) -> int:
    """6 T K H I: three products (gate, up, down) of H x I for each of a token's K experts."""
    return 6 * tokens * top_k * hidden * width


def moe_backward(tokens: int, top_k: int, hidden: int, width: int) -> int:
    """12 T K H I: for each product of forward, one for its input's gradient and one for its weight's."""
    return 2 * moe_forward(tokens, top_k, hidden, width)


def moe_bytes_off_rank(tokens: int, top_k: int, hidden: int, ranks: int, *, item: int = 2) -> float:
    """Bytes that one rank pulls, or pushes, in one dispatch or combine of `item`-byte elements, for uniform routing.

    A row of H for each (token, expert) pair whose expert lies on one of the other R - 1 of R ranks. Forward moves this
    once each way (dispatch, combine); backward twice in (dY, and x once more) and once out (dX).
    """
    return tokens * top_k * hidden * item * (ranks - 1) / ranks


def overlap_efficiency(communication_s: float, compute_s: float, measured_s: float) -> float:
    """max(T_comm, T_gemm) / T: 1 where the shorter of the two is hidden whole (the measure of AMD's Primus-Turbo).

    Raises ValueError for a time that is not above zero.
    """
    for name, value in (("communication_s", communication_s), ("compute_s", compute_s), ("measured_s", measured_s)):
        if value < 0 or (name == "measured_s" and value == 0):
            raise ValueError(f"{name}: got {value}; allowed: seconds, above 0")
    return max(communication_s, compute_s) / measured_s


def attention_forward(attention: Attention, hidden: int, tokens: int, sequence: int) -> float:
    """Projections, and the causal half of scores and weighted sum, of one layer."""
    return 2 * tokens * _projection_weights(attention, hidden) + tokens * sequence * attention.heads * (
        attention.qk_dim + attention.v_dim
    )


def _projection_weights(attention: Attention, hidden: int) -> int:
    """Weights of the matrices that a token is multiplied by in one attention layer."""
    out = attention.heads * attention.v_dim * hidden
    if not attention.latent:
        return hidden * (attention.heads + 2 * attention.groups) * attention.qk_dim + out
    queries = attention.heads * attention.qk_dim
    query = attention.q_rank * (hidden + queries) if attention.q_rank else hidden * queries
    keys_and_values = attention.heads * (attention.qk_dim - attention.rope_dim + attention.v_dim)
    return query + hidden * (attention.kv_rank + attention.rope_dim) + attention.kv_rank * keys_and_values + out


def layer_forward(model: ModelShape, tokens: int, *, moe: bool) -> float:
    """One layer: attention, then experts (with router and shared expert) or a dense SwiGLU."""
    attention = attention_forward(model.attention, model.hidden, tokens, model.sequence)
    if not moe:
        return attention + moe_forward(tokens, 1, model.hidden, model.dense_width)
    router = 2 * tokens * model.hidden * model.experts
    routed = moe_forward(tokens, model.top_k, model.hidden, model.expert_width)
    return attention + router + routed + moe_forward(tokens, 1, model.hidden, model.shared_width)


def step(model: ModelShape, tokens: int) -> float:
    """FLOPs of one optimizer step over `tokens` tokens, all ranks together, forward and backward."""
    layers = sum(layer_forward(model, tokens, moe=moe) for moe in model.moe_layers)
    head = 2 * tokens * model.hidden * model.vocab
    # A layer of multi-token prediction joins two hidden states (2H -> H) and uses the output matrix once more.
    join = 2 * tokens * 2 * model.hidden**2
    predicted = model.mtp * (layer_forward(model, tokens, moe=model.mtp_is_moe) + join + head)
    return FORWARD_AND_BACKWARD * (layers + predicted + head)


def tflops_per_gpu(model: ModelShape, tokens: int, seconds: float, ranks: int) -> float:
    """Model TFLOP/s of each rank, for a step of `tokens` tokens that took `seconds`."""
    return step(model, tokens) / seconds / ranks / 1e12


def mfu(tflops: float, device_name: str) -> float | None:
    """Model FLOPs utilisation: the share of the GPU's bf16 peak; None where the peak is not known."""
    peak = peak_of(device_name)
    return None if peak is None else tflops * 1e12 / peak
