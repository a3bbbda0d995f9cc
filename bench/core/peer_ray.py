"""Ray's side of the core benchmarks.

    python peer_ray.py CASE FOLDER      CASE: a function below; FOLDER: for Ray's session files

Speaks the lines of xtask/src/bench/worker.rs: after `ready`, it answers `run STEPS` with the time
of each step and, where a training side has its loss, with the case's answer, to be compared with
ours. `run 0` shuts Ray down. A step is one call, or a batch of BATCH calls.

The dashboard is off, as are usage reports, authentication and the forwarding of the workers' logs:
ours has none of them, and they only slow Ray down.
"""

import json
import os
import sys
import time

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import ray  # noqa: E402, after its environment

BATCH = 1000
MIB = 1 << 20
CORES = 2


@ray.remote
def noop(x):
    return x


@ray.remote
def fan_out(tasks):
    return sum(ray.get([noop.remote(x) for x in range(tasks)]))


@ray.remote(num_returns="streaming")
def count(values):
    for value in range(values):
        yield value


@ray.remote
class Counter:
    def __init__(self, start):
        self.total = start

    def add(self, n):
        self.total += n
        return self.total

    def probe(self, data):
        return len(data) + int(data[0]) + int(data[-1])


def start(cores=CORES):
    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
        _temp_dir=sys.argv[2],
    )


def timed(steps, step):
    """Runs `step` so many times: the time of each, and the last answer."""
    seconds, answer = [], None
    for _ in range(steps):
        begin = time.perf_counter()
        answer = step()
        seconds.append(time.perf_counter() - begin)
    return seconds, answer


def actor_call():
    counter = Counter.remote(0)
    return lambda steps: timed(steps, lambda: ray.get(counter.add.remote(1)))


def actor_calls():
    counter = Counter.remote(0)
    return lambda steps: timed(
        steps, lambda: sum(ray.get([counter.add.remote(1) for _ in range(BATCH)]))
    )


def tasks():
    return lambda steps: timed(
        steps, lambda: sum(ray.get([noop.remote(x) for x in range(BATCH)]))
    )


def tasks_of_a_task():
    return lambda steps: timed(steps, lambda: ray.get(fan_out.remote(BATCH)))


def stream():
    return lambda steps: timed(steps, lambda: sum(map(ray.get, count.remote(BATCH))))


def by_reference():
    # The array, unlike bytes, is read in place: Ray's fastest way.
    import numpy

    data = numpy.arange(MIB, dtype=numpy.uint32).astype(numpy.uint8)
    data, counter = ray.put(data), Counter.remote(0)
    return lambda steps: timed(
        steps, lambda: sum(ray.get([counter.probe.remote(data) for _ in range(BATCH)]))
    )


def actor_create():
    def run(steps):
        seconds, answer = [], 0
        for i in range(steps):
            begin = time.perf_counter()
            counter = Counter.remote(i)
            answer += ray.get(counter.add.remote(1))
            seconds.append(time.perf_counter() - begin)
            ray.kill(counter)
        return seconds, answer

    return run


def first_result(steps):
    """Two steps: until Ray is ready, and, from the same beginning, until a first task's result."""
    begin = time.perf_counter()
    start()
    seconds = [time.perf_counter() - begin]
    answer = ray.get(noop.remote(1))
    return seconds + [time.perf_counter() - begin], answer


def memory(steps):
    """So many actors, then idle. The answer says whose process tree to look at."""
    start(cores=steps)
    actors = [Counter.remote(0) for _ in range(steps)]
    ray.get([actor.add.remote(1) for actor in actors])
    KEPT.extend(actors)
    return [0.0] * steps, os.getpid()


KEPT = []
PROCESSES = (actor_call, actor_calls, tasks, tasks_of_a_task, stream, by_reference, actor_create)
CASES = {case.__name__: case for case in PROCESSES}
# These start Ray when they are asked to run.
ONE_SHOT = {"start": first_result, "memory": memory}


def main():
    case = sys.argv[1]
    if case in CASES:
        start()
        run = CASES[case]()
        run(2)  # starts the workers
    else:
        run = ONE_SHOT[case]
    answer(ready=f"Ray {ray.__version__}")
    for line in sys.stdin:
        steps = int(line.removeprefix("run "))
        if steps == 0:
            ray.shutdown()
            return answer(seconds=[])
        seconds, result = run(steps)
        answer(seconds=seconds, loss=result)


def answer(**fields):
    print(json.dumps(fields), flush=True)


main()
