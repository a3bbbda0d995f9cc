"""PyTorch's side of the MLP training step.

    python peer.py MODE FIXTURE THREADS      MODE: eager, compile or matmul

Speaks the same lines as ours (see xtask/src/bench/worker.rs): after `ready`, it answers
`run STEPS` (train from the initial weights) and `save PATH` (write the weights) with a JSON line.
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file, save_file

OPTIMIZER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def main():
    mode, fixture, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    tensors = load_file(fixture)
    batches = []
    while f"x.{len(batches)}" in tensors:
        i = len(batches)
        batches.append((tensors[f"x.{i}"], tensors[f"y.{i}"].long()))
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("fc")}
    side = Matmuls(weights, batches) if mode == "matmul" else Training(mode, weights, batches)
    side.run(3)  # compiles, fills caches, starts threads
    answer(ready=f"PyTorch {torch.__version__.split('+')[0]} {side.name}")
    for line in sys.stdin:
        command, argument = line.split(maxsplit=1)
        if command == "run":
            seconds, loss = side.run(int(argument))
            answer(seconds=seconds, loss=loss)
        elif command == "save":
            side.save(argument.strip())
            answer(saved=True)


class Training:
    """Forward, loss, backward, fused AdamW."""

    def __init__(self, mode, weights, batches):
        self.name = f"{mode}, fused AdamW"
        self.weights, self.batches = weights, batches
        self.model = torch.nn.Sequential()
        layers = len(weights) // 2
        for i in range(1, layers + 1):
            outputs, inputs = weights[f"fc{i}.weight"].shape
            self.model.add_module(f"fc{i}", torch.nn.Linear(inputs, outputs))
            if i < layers:
                self.model.add_module(f"relu{i}", torch.nn.ReLU())
        self.loss = torch.compile(self.loss_of) if mode == "compile" else self.loss_of

    def loss_of(self, x, y):
        return torch.nn.functional.cross_entropy(self.model(x), y)

    def run(self, steps):
        self.model.load_state_dict(self.weights)
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIMIZER)
        seconds = []
        for step in range(steps):
            x, y = self.batches[step % len(self.batches)]
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(x, y)
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds, loss.item()

    def save(self, path):
        save_file(self.model.state_dict(), path)


class Matmuls:
    """The step's matrix products and nothing else: what no implementation can beat by much.

    Per layer: the output, the gradient of the weight, and (but for the first layer) of the input.
    """

    name = "matrix products alone"

    def __init__(self, weights, batches):
        rows = batches[0][0].shape[0]
        self.products = []
        for i in range(1, len(weights) // 2 + 1):
            weight = weights[f"fc{i}.weight"]
            outputs, inputs = weight.shape
            x, dy = torch.rand(rows, inputs), torch.rand(rows, outputs)
            self.products.append((x, weight.t(), torch.empty(rows, outputs)))
            self.products.append((dy.t(), x, torch.empty(outputs, inputs)))
            if i > 1:
                self.products.append((dy, weight, torch.empty(rows, inputs)))

    def run(self, steps):
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            for a, b, out in self.products:
                torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - start)
        return seconds, None


def answer(**fields):
    print(json.dumps(fields), flush=True)


main()
