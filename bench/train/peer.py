"""PyTorch DDP's side of data-parallel training.

    python peer.py MODE MODEL FIXTURE WORKERS [cpu|cuda|nccl]

MODE is eager, compile, or channels-last. Workers are processes of one thread; with `cuda` they share a
GPU, over gloo, since NCCL refuses two ranks on one. Speaks the same lines as ours (see xtask/src/bench/worker.rs).
"""

import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../nn"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer import MODELS, OPTIMIZER, Training, answer
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


def main():
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/store", *sys.argv[1:])
        mp.spawn(worker, arguments, nprocs=int(sys.argv[4]))


def worker(rank, store, mode, model, fixture, workers, device="cpu"):
    torch.set_num_threads(1)
    world = int(workers)
    backend, device, name = "nccl" if device == "nccl" else "gloo", device.replace("nccl", "cuda"), device
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    side = Ddp(mode, MODELS[model], load_file(fixture), rank, world, device)
    side.run(3)
    if rank == 0:
        version = torch.__version__.split("+")[0]
        answer(ready=f"PyTorch {version} DDP {side.name}, {world} workers, {name}")
    # Standard input is the first process's; multiprocessing closes it for those that it starts.
    lines = os.fdopen(os.open(f"/proc/{os.getppid()}/fd/0", os.O_RDONLY)) if rank == 0 else None
    while True:
        line = [lines.readline() if rank == 0 else None]
        dist.broadcast_object_list(line)
        command, *arguments = line[0].split() or ["end"]
        if command == "end":
            break
        if command == "run":
            start = time.time()
            seconds, loss, began = side.run(int(arguments[0]))
            if rank == 0:
                answer(seconds=seconds, loss=loss, startup=began - start)
        elif command == "reduce":
            seconds = reduce(*map(int, arguments))
            if rank == 0:
                answer(seconds=seconds)
        elif rank == 0:
            side.save(arguments[0])
            answer(saved=True)
    dist.destroy_process_group()


def reduce(length, steps):
    """The time of each sum over all ranks, which begin together."""
    values = torch.full((length,), 1e-20)
    seconds = []
    for _ in range(steps):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    return seconds


class Ddp(Training):
    def __init__(self, mode, model, tensors, rank, world, device):
        self.device = device
        batches = []
        while f"x.{len(batches)}" in tensors:
            x, y = tensors[f"x.{len(batches)}"], tensors[f"y.{len(batches)}"].long()
            first, end = len(x) * rank // world, len(x) * (rank + 1) // world
            batches.append((x[first:end].to(device), y[first:end].to(device)))
        weights = {name: t for name, t in tensors.items() if not name.startswith(("x.", "y."))}
        super().__init__(mode, model, weights, batches)
        self.model = self.model.to(device)
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.whole = torch.compile(self.ddp) if mode == "compile" else self.ddp

    def loss_of_ddp(self, x, y):
        return F.cross_entropy(self.whole(x).flatten(0, -2), y.flatten())

    def run(self, steps):
        self.model.train()
        self.load()
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIMIZER)
        seconds = []
        dist.barrier()
        began = time.time()
        for step in range(steps):
            x, y = self.batches[step % len(self.batches)]
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss_of_ddp(x, y)
            loss.backward()
            optimizer.step()
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return seconds, mean.item() / dist.get_world_size(), began


if __name__ == "__main__":
    main()
