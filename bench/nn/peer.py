"""PyTorch's side of training steps and of inference.

    python peer.py MODE MODEL FIXTURE THREADS

MODE is eager, compile, channels-last, or double: eager in f64, to compare with. With bf16- before it
it is under autocast. Speaks the same lines as ours (see xtask/src/bench/worker.rs).
"""

import json
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

# Of batch norms; no result depends on them.
COUNTS = "num_batches_tracked"
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
    side = Training(mode, MODELS[model], weights, batches)
    side.run(1, rows=1)  # loads libraries
    peak = peak_above_idle(lambda: side.run(3))  # compiles, fills caches, starts threads
    name = f"PyTorch {torch.__version__.split('+')[0]} {side.name}"
    answer(ready=name, flops=side.flops(), bytes=peak)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "run":
            seconds, loss = side.run(int(arguments[0]))
            answer(seconds=seconds, loss=loss)
        elif command == "infer":
            seconds, loss = side.infer(*map(int, arguments))
            answer(seconds=seconds, loss=loss)
        elif command == "update":
            answer(seconds=side.update(int(arguments[0])))
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


class Wide(nn.Sequential):
    """10 million parameters, for the optimizer alone."""

    def __init__(self):
        super().__init__()
        for i, outputs in enumerate([2236, 2236, 10], 1):
            self.add_module(f"fc{i}", nn.Linear(2236, outputs))
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


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(256, 256)
        self.positions = nn.Parameter(torch.empty(128, 256))
        layer = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(256, 4, 1024, **layer) for _ in range(4)
        )
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        x = self.embed(x) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(y + skip, inplace=True)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage in range(4):
            outs, stride = 64 << stage, 2 if stage else 1
            blocks = [Block(inputs, outs, stride), Block(outs, outs, 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = outs
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


MODELS = {
    "mlp": Mlp,
    "mlp-32": Mlp,
    "wide": Wide,
    "cnn": Cnn,
    "resnet": ResNet,
    "transformer": Transformer,
    "transformer-32": Transformer,
    "lstm": Lstm,
}


class Training:
    """Forward, loss, backward, fused AdamW."""

    def __init__(self, mode, model, weights, batches):
        self.name = f"{mode}, fused AdamW"
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode.startswith("bf16-"))
        mode = mode.removeprefix("bf16-")
        if mode == "double":
            torch.set_default_dtype(torch.float64)
            weights = {name: t.double() for name, t in weights.items()}
            batches[:] = [(x.double(), y) for x, y in batches]
        self.weights, self.batches = weights, batches
        self.model = model()
        if mode == "channels-last":
            self.model = self.model.to(memory_format=torch.channels_last)
            batches[:] = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
        is_compiled = mode == "compile"
        self.loss = torch.compile(self.loss_of) if is_compiled else self.loss_of
        self.forward = torch.compile(self.model) if is_compiled else self.model

    def loss_of(self, x, y):
        with self.autocast:
            return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())

    def load(self):
        counts = {k: v for k, v in self.model.state_dict().items() if k.endswith(COUNTS)}
        self.model.load_state_dict(self.weights | counts)

    def run(self, steps, rows=None):
        self.model.train()
        self.load()
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIMIZER)
        seconds = []
        for step in range(steps):
            x, y = self.batches[step % len(self.batches)]
            x, y = x[:rows], y[:rows]
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(x, y)
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds, loss.item()

    def update(self, steps):
        """By gradients that stay the same."""
        self.load()
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **OPTIMIZER)
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def infer(self, rows, steps):
        self.load()
        self.model.eval()
        x = self.batches[0][0][:rows]
        seconds = []
        with torch.inference_mode(), self.autocast:
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
        state = self.model.state_dict().items()
        save_file({k: v.float().contiguous() for k, v in state if not k.endswith(COUNTS)}, path)


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


if __name__ == "__main__":
    main()
