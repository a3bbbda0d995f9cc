"""The steps of a training that saves 100 million parameters and AdamW's moments, the one of
survive.rs, with PyTorch's distributed checkpoints:

    python peer_checkpoint.py async|sync
"""

import json
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn import functional as F

STEPS, EVERY = 80, 32


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        steps = train(folder, sys.argv[1] == "async")
        print(json.dumps(dict(seconds=steps, every=EVERY)), flush=True)
        dist.destroy_process_group()


def train(folder, asynchronous):
    sizes = [4096] * 7 + [10]
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.ones(16, 4096), torch.zeros(16, dtype=torch.long)
    ends, writing = [], None
    for step in range(1, STEPS + 1):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step % EVERY == 0:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            path = os.path.join(folder, str(step))
            if asynchronous:
                if writing:
                    writing.result()
                writing = dcp.async_save(state, checkpoint_id=path)
            else:
                dcp.save(state, checkpoint_id=path)
        ends.append(time.time())
    if writing:
        writing.result()
    return [b - a for a, b in zip(ends, ends[1:])]


if __name__ == "__main__":
    main()
