"""Dask's side of the core benchmarks: graphs of tasks on its threaded scheduler.

    python peer_dask.py SHAPE CHUNK      SHAPE: layered or wide; CHUNK: tasks handed to a thread at once

Speaks the lines of xtask/src/bench/worker.rs: after `ready`, it answers `run STEPS` with the time
of each step (a graph of TASKS tasks, built and computed) and, where a training side has its loss,
with the graph's answer, to be compared with ours.

The graphs are made of `Task` specifications: they are faster here than the older tuples (which
are converted into them) and than `dask.delayed` (which takes almost a minute to build the layers).
"""

import json
import sys
import time

import dask
from dask._task_spec import DataNode, List, Task, TaskRef
from dask.threaded import get

TASKS = 100_000
WIDTH = 1000
MODULUS = 1_000_003


def add(a, b):
    return (a + b) % MODULUS


def noop(x):
    return x


def total(xs):
    return sum(xs)


def layered():
    """Layers of WIDTH tasks; each takes two neighbours of the layer before."""
    graph = {(0, i): DataNode((0, i), i) for i in range(WIDTH)}
    layers = TASKS // WIDTH
    for layer in range(1, layers + 1):
        for i in range(WIDTH):
            inputs = TaskRef((layer - 1, i)), TaskRef((layer - 1, (i + 1) % WIDTH))
            graph[layer, i] = Task((layer, i), add, *inputs)
    return graph, [(layers, i) for i in range(WIDTH)]


def wide():
    """TASKS tasks without inputs, and one that sums them up."""
    graph = {i: Task(i, noop, i) for i in range(TASKS)}
    graph["total"] = Task("total", total, List(*(TaskRef(i) for i in range(TASKS))))
    return graph, ["total"]


def main():
    shape, chunk = {"layered": layered, "wide": wide}[sys.argv[1]], int(sys.argv[2])
    answer(ready=f"Dask {dask.__version__}, 2 threads, chunksize {chunk}")
    for line in sys.stdin:
        seconds, result = [], None
        for _ in range(int(line.removeprefix("run "))):
            begin = time.perf_counter()
            graph, keys = shape()
            result = sum(get(graph, keys, num_workers=2, chunksize=chunk))
            seconds.append(time.perf_counter() - begin)
        answer(seconds=seconds, loss=result)


def answer(**fields):
    print(json.dumps(fields), flush=True)


main()
