"""A worker of PyTorch's that is killed once, under torchrun:

    python -m torch.distributed.run --nproc-per-node 2 --max-restarts 3 peer_recover.py FOLDER

The training is the one of survive.rs, with a checkpoint every ten steps, which the workers go on
from. Rank 0 prints what ours prints.
"""

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

STEPS, KILL_AT, EVERY = 80, 55, 10


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [784, 512, 512, 10]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    saved, marker, step = f"{folder}/saved.pt", f"{folder}/killed", 0
    if os.path.exists(saved):
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    began, first = step, None
    x, y = torch.ones(256 // world, 784), torch.zeros(256 // world, dtype=torch.long)
    while step < STEPS:
        if step == KILL_AT and rank == world - 1 and not os.path.exists(marker):
            with open(marker, "w") as file:
                file.write(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        step += 1
        first = first or time.time()
        if step % EVERY == 0 and rank == 0:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
            torch.save(state, saved + ".tmp")
            os.rename(saved + ".tmp", saved)
    if rank == 0:
        with open(marker) as file:
            killed = float(file.read())
        print(json.dumps(dict(seconds=first - killed, lost_steps=KILL_AT - began)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
