"""PyTorch's side of training steps and of inference.

    python peer.py MODE MODEL FIXTURE THREADS

MODE is eager, compile, channels-last or, for the matrix products of an MLP alone, matmul. Speaks
the same lines as ours (see xtask/src/bench/worker.rs).
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

OPTIMIZER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


def main():
    mode, model, fixture, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(threads)
    tensors = load_file(fixture)
    batches = []
    while f"x.{len(batches)}" in tensors:
        i = len(batches)
        batches.append((tensors[f"x.{i}"], tensors[f"y.{i}"].long()))
    weights = {name: t for name, t in tensors.items() if not name.startswith(("x.", "y."))}
    if mode == "matmul":
        side = Matmuls(weights, batches)
    else:
        side = Training(mode, MODELS[model], weights, batches)
    side.run(3)  # compiles, fills caches, starts threads
    answer(ready=f"PyTorch {torch.__version__.split('+')[0]} {side.name}", flops=side.flops())
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "run":
            seconds, loss = side.run(int(arguments[0]))
            answer(seconds=seconds, loss=loss)
        elif command == "infer":
            seconds, loss = side.infer(*map(int, arguments))
            answer(seconds=seconds, loss=loss)
        elif command == "memory":
            answer(bytes=peak_above_idle(lambda: side.run(int(arguments[0]))))
        elif command == "save":
            side.save(arguments[0])
            answer(saved=True)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__()
        sizes = [784, 512, 512, 10]
        for i in range(1, 4):
            self.add_module(f"fc{i}", nn.Linear(sizes[i - 1], sizes[i]))
            if i < 3:
                self.add_module(f"relu{i}", nn.ReLU())


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc1 = nn.Linear(3136, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(256, 256, batch_first=True)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][:, -1])


MODELS = {"mlp": Mlp, "mlp-32": Mlp, "cnn": Cnn, "lstm": Lstm}


class Training:
    """Forward, loss, backward, fused AdamW."""

    def __init__(self, mode, model, weights, batches):
        self.name = f"{mode}, fused AdamW"
        self.weights, self.batches = weights, batches
        self.model = model()
        if mode == "channels-last":
            self.model = self.model.to(memory_format=torch.channels_last)
            batches[:] = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
        is_compiled = mode == "compile"
        self.loss = torch.compile(self.loss_of) if is_compiled else self.loss_of
        self.forward = torch.compile(self.model) if is_compiled else self.model

    def loss_of(self, x, y):
        return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())

    def run(self, steps):
        self.model.train()
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

    def infer(self, rows, steps):
        self.model.load_state_dict(self.weights)
        self.model.eval()
        x = self.batches[0][0][:rows]
        seconds = []
        with torch.inference_mode():
            self.forward(x)
            for _ in range(steps):
                start = time.perf_counter()
                y = self.forward(x)
                seconds.append(time.perf_counter() - start)
        return seconds, y.double().sum().item()

    def flops(self):
        """Of one step, as PyTorch counts them."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.loss_of(*self.batches[0]).backward()
        return counter.get_total_flops()

    def save(self, path):
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, path)


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

    def flops(self):
        return None


def peak_above_idle(work):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # makes the peak that of from now on
    before = memory("VmRSS:")
    work()
    return memory("VmHWM:") - before


def memory(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def answer(**fields):
    print(json.dumps(fields), flush=True)


main()
