import subprocess
import sys
from pathlib import Path

import pytest
import tiny

SHARDED_PROGRAM = """
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, sys.argv[1])
import tiny

from trace_unlearn.integrations import fuse_loss

torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (2,))
ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(1))
plain, fused = tiny.model("qwen3_moe", 80), tiny.model("qwen3_moe", 80)
expected = plain(input_ids=ids, labels=ids).loss
expected.backward()
handle = fuse_loss(fused)
for part in (*fused.model.layers, fused.lm_head, fused):  # the output embedding is whole during its own call only
    fully_shard(part, mesh=mesh)
mine = ids[dist.get_rank() :][:1]
outputs = fused(input_ids=mine, labels=mine)
outputs.loss.backward()
assert outputs.logits is None
mean = outputs.loss.detach().clone()
dist.all_reduce(mean)
torch.testing.assert_close(mean / 2, expected.detach())
gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
for name, parameter in fused.named_parameters():
    torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-4, atol=2e-6)
with handle.log_probs():
    log_probs = fused(input_ids=mine, labels=mine).loss
torch.testing.assert_close(-log_probs.sum() / 8, outputs.loss)
dist.destroy_process_group()
os._exit(0)  # a gloo thread that frees its last tensor while the interpreter ends would abort the process
"""


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SHARDED_PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, program, Path(tiny.__file__).parent], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
