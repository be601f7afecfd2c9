"""The workspace on a GPU: what it takes is what was computed, and close() gives it back."""

import pytest
import torch

from megamoe_train import ops_comm, ops_plan
from megamoe_train.workspace import Shape, Workspace, layout_of

pytestmark = pytest.mark.gpu


def test_one_rank_needs_no_process_group_and_close_gives_memory_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    shape = Shape(ranks=1, experts=16, top_k=2, hidden=1024, tokens=4096)
    workspace = Workspace.create(shape, deadline_s=3)
    assert torch.cuda.memory_allocated() - before >= layout_of(shape).bytes
    ids = torch.randint(16, (4000, 2), device="cuda")
    x = torch.randn(4000, 1024, device="cuda").bfloat16()
    plan = ops_plan.build_plan(workspace, ids, sizing="exact")
    rows, _ = ops_comm.dispatch(plan, x)
    y, _ = ops_comm.combine(plan, rows)
    assert torch.equal(y, (x.float() + x.float()).bfloat16())
    del plan, rows
    workspace.close()
    workspace.close()
    del ids, x, y
    assert torch.cuda.memory_allocated() - before <= 4096
