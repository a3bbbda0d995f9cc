"""Fashion-MNIST until nine of ten test images are told right, over PyTorch DDP and gloo:

    python peer_fashion.py MODE DATA FIXTURE WORKERS EPOCHS

MODE is eager or channels-last. Same weights at the start, same rows in the same order, same
evaluation as fashion.rs; workers are processes of one thread. Rank 0 prints what ours prints.
"""

import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../nn"))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peer import MODELS, OPTIMIZER, answer
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

BATCH, TEST_BATCH, TARGET = 256, 1000, 0.90
MEAN, DEVIATION = 0.2860, 0.3530


def main():
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/store", *sys.argv[1:])
        mp.spawn(worker, arguments, nprocs=int(sys.argv[4]))


def images(folder, part, layout):
    pixels = np.fromfile(f"{folder}/{part}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(f"{folder}/{part}-labels-idx1-ubyte", np.uint8, offset=8)
    x = torch.from_numpy(pixels).view(-1, 1, 28, 28).float().div_(255).sub_(MEAN).div_(DEVIATION)
    return x.contiguous(memory_format=layout), torch.from_numpy(labels).long()


def share(rows, rank, world):
    return rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]


def worker(rank, store, mode, data, fixture, workers, epochs):
    torch.set_num_threads(1)
    world = int(workers)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    layout = torch.channels_last if mode == "channels-last" else torch.contiguous_format
    tensors = load_file(fixture)
    orders = []
    while f"order.{len(orders)}" in tensors:
        orders.append(tensors.pop(f"order.{len(orders)}"))
    (x, y), (test_x, test_y) = images(data, "train", layout), images(data, "t10k", layout)
    model = MODELS["cnn"]()
    model.load_state_dict(tensors)
    model = model.to(memory_format=layout)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    accuracies, seconds = [], []
    dist.barrier()
    start = time.perf_counter()
    for epoch in range(int(epochs)):
        model.train()
        for rows in orders[epoch].split(BATCH):
            rows = share(rows, rank, world)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(ddp(x[rows]), y[rows]).backward()
            optimizer.step()
        accuracies.append(accuracy(model, test_x, test_y, rank, world))
        seconds.append(time.perf_counter() - start)
        if accuracies[-1] >= TARGET:
            break
    if rank == 0:
        name = f"PyTorch {torch.__version__.split('+')[0]} DDP {mode}"
        answer(accuracies=accuracies, seconds=seconds, name=name)
    dist.destroy_process_group()


def accuracy(model, x, y, rank, world):
    model.eval()
    correct = torch.zeros(1)
    with torch.inference_mode():
        for rows in torch.arange(len(y)).split(TEST_BATCH):
            rows = share(rows, rank, world)
            correct += (model(x[rows]).argmax(1) == y[rows]).sum()
    dist.all_reduce(correct)
    return correct.item() / len(y)


if __name__ == "__main__":
    main()
