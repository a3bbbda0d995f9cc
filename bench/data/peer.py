"""The peers of reading data: `peer.py LIBRARY FILE`. Requests are described in xtask/src/bench/data.rs.

Each library reads in the way that its guide calls the fast one, to C-ordered float32 arrays of
8192 rows, or tensors where that is what it gives.
"""

import json
import os
import resource
import shutil
import sys
import time

LIBRARY, FILE = sys.argv[1:3]
BATCH = 8192
SEED = 7


def cpu():
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def peak():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def polars(columns, order, rank, ranks):
    import polars as pl

    frame = pl.scan_parquet(FILE).select(pl.col(columns).cast(pl.Float32)).collect()
    for part in frame.iter_slices(BATCH):
        yield part.to_numpy(order="c")


def as_table(batch, columns):
    """Arrow columns as one C-ordered array."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    out = np.empty((batch.num_rows, len(columns)), dtype=np.float32)
    for at, name in enumerate(columns):
        column = batch.column(name)
        if pa.types.is_decimal(column.type):
            column = pc.cast(column, pa.float64())
        out[:, at] = column.to_numpy(zero_copy_only=False)
    return out


def pyarrow(columns, order, rank, ranks):
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(FILE, pre_buffer=True).iter_batches(BATCH, columns=columns):
        yield as_table(batch, columns)


def duckdb(columns, order, rank, ranks):
    import duckdb

    casts = ", ".join(f"{name}::FLOAT AS {name}" for name in columns)
    reader = duckdb.sql(f"SELECT {casts} FROM '{FILE}'").to_arrow_reader(BATCH)
    for batch in reader:
        yield as_table(batch, columns)


def torch_loader(columns, order, rank, ranks):
    """A DataLoader with two workers, which take turns by row group, on pyarrow."""
    import pyarrow.parquet as pq
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Groups(IterableDataset):
        def __iter__(self):
            worker = get_worker_info()
            file = pq.ParquetFile(FILE, pre_buffer=True)
            groups = list(range(worker.id, file.num_row_groups, worker.num_workers))
            for batch in file.iter_batches(BATCH, row_groups=groups, columns=columns):
                yield torch.from_numpy(as_table(batch, columns))

    yield from DataLoader(Groups(), batch_size=None, num_workers=2)


def hugging_face(columns, order, rank, ranks):
    import datasets
    from datasets.distributed import split_dataset_by_node

    data = datasets.load_dataset("parquet", data_files=FILE, columns=columns, streaming=True, split="train")
    if ranks > 1:
        data = split_dataset_by_node(data, rank=rank, world_size=ranks)
    if order == "shuffled":
        data = data.shuffle(seed=SEED, buffer_size=100_000)
    for batch in data.with_format("arrow").iter(BATCH):
        yield as_table(batch.combine_chunks().to_batches()[0], columns)


def ray(columns, order, rank, ranks):
    import ray as engine

    data = engine.data.read_parquet(FILE, columns=columns)
    if order == "shuffled":
        data = data.random_shuffle(seed=SEED)
    for batch in data.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=2):
        yield as_table(batch.combine_chunks().to_batches()[0], columns)


KEPT = {}


def kept(name, make):
    """What an epoch leaves for the next one of the same process."""
    if name not in KEPT:
        KEPT[name] = make()
    return KEPT[name]


def once(name, write):
    """The path of what is made of the file once, before all epochs."""
    path = os.path.join(os.path.dirname(FILE), name)
    done = path + ".seconds"
    if not os.path.exists(done):
        shutil.rmtree(path, ignore_errors=True)
        start = time.perf_counter()
        write(path)
        with open(done, "w") as file:
            file.write(f"{time.perf_counter() - start:.1f}")
    if "RANK" not in os.environ:
        with open(done) as file:
            print(f"{LIBRARY}: {path} took {file.read()} s to make, once; no epoch counts that", file=sys.stderr)
    return path


def mosaic_shards(columns):
    """Its own format, MDS, from which it reads samples: here the numbers of a row."""
    import pyarrow.parquet as pq
    from streaming import MDSWriter

    def write(path):
        with MDSWriter(out=path, columns={"x": f"ndarray:float32:{len(columns)}"}) as writer:
            for batch in pq.ParquetFile(FILE).iter_batches(columns=columns):
                for row in as_table(batch, columns):
                    writer.write({"x": row})

    return once("mosaic", write)


def mosaic(columns, order, rank, ranks):
    """Without workers: the ranks are as many as the processors. It has its rank from the environment."""
    import numpy as np
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    def make():
        shards = mosaic_shards(columns)
        return StreamingDataset(local=shards, shuffle=order == "shuffled", shuffle_seed=SEED, batch_size=BATCH)

    stack = lambda rows: torch.from_numpy(np.stack([row["x"] for row in rows]))
    yield from DataLoader(kept("data", make), batch_size=BATCH, collate_fn=stack)


def table_of_datasets(columns):
    """Arrow files, from which rows are picked in any order."""
    import datasets

    # By way of float64: Arrow's own cast from decimals to float32 rounds twice.
    of = lambda kind: datasets.Features({name: datasets.Value(kind) for name in columns})
    read = lambda path: datasets.load_dataset(
        "parquet", data_files=FILE, columns=columns, features=of("float64"), split="train", cache_dir=path
    ).cast(of("float32"))
    return read(once("datasets", read)).with_format("torch")


def torch_on_datasets(columns, order, rank, ranks):
    """A DataLoader that asks for whole batches, as the guide of datasets recommends."""
    import torch
    from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

    data = kept("data", lambda: table_of_datasets(columns))
    rows = DistributedSampler(data, ranks, rank, shuffle=order == "shuffled", seed=SEED)
    batches = BatchSampler(rows, BATCH, drop_last=False)
    for batch in DataLoader(data, sampler=batches, batch_size=None):
        yield torch.stack([batch[name] for name in columns], dim=1)


READERS = {
    "polars": polars,
    "pyarrow": pyarrow,
    "duckdb": duckdb,
    "torch": torch_loader,
    "datasets": hugging_face,
    "ray": ray,
    "mosaic": mosaic,
    "torch+datasets": torch_on_datasets,
}


def measured(batches, is_sum):
    rows, total = 0, 0.0
    for batch in batches:
        rows += batch.shape[0]
        if is_sum:
            total += float(batch.double().sum() if hasattr(batch, "double") else batch.sum(dtype="float64"))
    return rows, total


def read(columns, order, rank, ranks, is_sum):
    before = cpu()
    rows, total = measured(READERS[LIBRARY](columns, order, rank, ranks), is_sum)
    return rows, total, cpu() - before


def work(rank, ranks, port, requests):
    """What the process of a rank does, until this one ends."""
    # What torchrun would tell it; Mosaic Streaming knows its share by that.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    while True:
        try:
            columns, order, is_sum = requests.recv()
        except EOFError:
            return
        requests.send(read(columns, order, rank, ranks, is_sum))


def start_ranks(ranks):
    """A process a rank, as in training, which stays for the next epochs."""
    import multiprocessing
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(rank, ranks, port, theirs)).start()
        theirs.close()
        pipes.append(ours)
    return pipes


def on_ranks(columns, order, ranks, is_sum):
    """What each rank has read. What has to be made once is made before."""
    if LIBRARY == "ray":
        return on_ranks_of_ray(columns, order, ranks, is_sum)
    if LIBRARY == "mosaic":
        kept("shards", lambda: mosaic_shards(columns))
    elif LIBRARY == "torch+datasets":
        kept("data", lambda: table_of_datasets(columns))
    pipes = kept("ranks", lambda: start_ranks(ranks))
    for pipe in pipes:
        pipe.send((columns, order, is_sum))
    return [pipe.recv() for pipe in pipes]


def on_ranks_of_ray(columns, order, ranks, is_sum):
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray as engine

    # It takes the parts of a split from the shuffle of all.
    @engine.remote
    class Rank:
        def read(self, part):
            import torch

            batches = part.iter_torch_batches(batch_size=BATCH)
            return measured((torch.stack([batch[name] for name in columns], dim=1) for batch in batches), is_sum)

    def floats(table):
        return pa.table({name: pc.cast(pc.cast(table[name], pa.float64()), pa.float32()) for name in columns})

    data = engine.data.read_parquet(FILE, columns=columns).map_batches(floats, batch_format="pyarrow")
    if order == "shuffled":
        data = data.random_shuffle(seed=SEED)
    actors = kept("ranks", lambda: [Rank.remote() for _ in range(ranks)])
    parts = data.streaming_split(ranks, equal=False)
    return engine.get([actor.read.remote(part) for actor, part in zip(actors, parts)])


def epoch(columns, order, ranks, is_sum):
    start = time.perf_counter()
    if ranks == 1:
        parts = [read(columns, order, 0, 1, is_sum)]
    else:
        parts = on_ranks(columns, order, ranks, is_sum)
    seconds = time.perf_counter() - start
    rows, total = (sum(part[at] for part in parts) for at in (0, 1))
    # Ray works in processes that are not this one's children; ranks are processes of their own.
    time_of_all = None if LIBRARY == "ray" else sum(part[2] for part in parts)
    most = peak() if ranks == 1 and LIBRARY != "ray" else None
    return {"seconds": seconds, "cpu": time_of_all, "rows": rows, "sum": total, "peak": most}


def first(columns, order):
    start = time.perf_counter()
    batch = next(iter(READERS[LIBRARY](columns, order, 0, 1)))
    return {"seconds": time.perf_counter() - start, "rows": batch.shape[0]}


def tables():
    """DuckDB with the files of the folder as tables."""
    import duckdb

    connection = duckdb.connect()
    folder = os.path.dirname(FILE)
    for name in "customer lineitem nation orders part partsupp region supplier".split():
        connection.sql(f"CREATE VIEW {name} AS SELECT * FROM '{folder}/{name}.parquet'")
    return connection


def query(number):
    import pyarrow as pa
    import pyarrow.compute as pc

    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tpch.sql")) as file:
        text = file.read().split("\n\n", 1)[1].split(";")[int(number) - 1]
    start, before = time.perf_counter(), cpu()
    answer = tables().sql(text).to_arrow_table()
    seconds, of_all = time.perf_counter() - start, cpu() - before
    is_number = lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    numbers = [column for column in answer.columns if is_number(column.type)]
    total = sum(pc.sum(pc.cast(column, pa.float64(), safe=False)).as_py() or 0.0 for column in numbers)
    return {"seconds": seconds, "cpu": of_all, "rows": answer.num_rows, "sum": total}


WORK = {
    "sort": "SELECT * FROM rows ORDER BY l_shipdate, l_orderkey, l_linenumber",
    "group": "SELECT l_orderkey, count(*) AS n, max(l_comment) AS last, sum(l_quantity) AS quantity "
    "FROM rows GROUP BY l_orderkey ORDER BY l_orderkey",
    "join": "SELECT * FROM rows JOIN orders ON l_orderkey = o_orderkey",
}


def large(work, budget):
    import duckdb
    import numpy as np

    start, before = time.perf_counter(), cpu()
    connection = duckdb.connect(config={"memory_limit": f"{budget}B"})
    connection.sql(f"CREATE VIEW rows AS SELECT * FROM '{FILE}'")
    connection.sql(f"CREATE VIEW orders AS SELECT * FROM '{FILE.replace('lineitem', 'orders')}'")
    count, total = 0, 0.0
    for batch in connection.sql(WORK[work]).to_arrow_reader(BATCH):
        keys = batch.column("l_orderkey").to_numpy().astype(np.float64)
        # A join has its rows in no order.
        places = 1 if work == "join" else (count + 1 + np.arange(len(keys))) % 1000
        total += float((keys * places).sum())
        count += len(keys)
        if "o_custkey" in batch.schema.names:
            total += float(batch.column("o_custkey").to_numpy().astype(np.float64).sum())
        if "quantity" in batch.schema.names:
            import pyarrow as pa
            import pyarrow.compute as pc

            # In hundredths, as the other side has decimals.
            total += float(pc.sum(pc.cast(batch.column("quantity"), pa.float64())).as_py()) * 100.0
    seconds, of_all = time.perf_counter() - start, cpu() - before
    return {"seconds": seconds, "cpu": of_all, "rows": count, "sum": total, "peak": peak()}


FEATURES = None


def prepare():
    import numpy as np
    import pyarrow.parquet as pq
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    global FEATURES
    if FEATURES is None:
        table = pq.read_table(os.path.join(os.path.dirname(FILE), "features"), partitioning=None)
        FEATURES = np.stack([column.to_numpy() for column in table.columns], axis=1)
    start, before = time.perf_counter(), cpu()
    made = make_pipeline(SimpleImputer(), StandardScaler(), Normalizer()).fit_transform(FEATURES)
    seconds, of_all = time.perf_counter() - start, cpu() - before
    return {"seconds": seconds, "cpu": of_all, "rows": len(made), "sum": float(np.abs(made).sum())}


def images(folder):
    """A DataLoader with two workers, each of which augments its batches as a whole."""
    import gzip

    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    def idx(name, head):
        with gzip.open(os.path.join(folder, name + ".gz")) as file:
            return torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8, offset=head).copy())

    class Images(Dataset):
        def __init__(self):
            self.images = idx("train-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
            self.labels = idx("train-labels-idx1-ubyte", 8).long()

        def __len__(self):
            return len(self.labels)

        # PyTorch fetches a whole batch by this, where there is one.
        def __getitems__(self, rows):
            rows = torch.tensor(rows)
            count = len(rows)
            padded = torch.nn.functional.pad(self.images[rows], (2, 2, 2, 2))
            down, right = torch.randint(0, 5, (2, count, 1))
            at_row = (down + torch.arange(28)).view(count, 1, 28, 1)
            at_column = (right + torch.arange(28)).view(count, 1, 1, 28)
            flip = torch.rand(count).view(count, 1, 1, 1) < 0.5
            at_column = torch.where(flip, at_column.flip(3), at_column)
            images = padded[torch.arange(count).view(count, 1, 1, 1), 0, at_row, at_column]
            images = images.float().div_(255).sub_(0.2860).div_(0.3530)
            return images, self.labels[rows]

    torch.set_num_threads(1)
    loader = DataLoader(
        Images(), 256, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=lambda batch: batch
    )
    for _ in loader:
        pass
    start, before = time.perf_counter(), cpu()
    count = sum(images.shape[0] for images, _ in loader)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu": None, "rows": count}


def main():
    if LIBRARY == "ray":
        import ray as engine

        engine.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
        engine.data.DataContext.get_current().enable_progress_bars = False
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    print(json.dumps({"ready": LIBRARY}), file=answers, flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        if what in ("epoch", "check"):
            columns, order, ranks = rest
            answer = epoch(columns.split(","), order, int(ranks), what == "check")
        elif what == "first":
            answer = first(rest[0].split(","), rest[1])
        else:
            answer = {"query": query, "large": large, "images": images, "prepare": prepare}[what](*rest)
        print(json.dumps(answer), file=answers, flush=True)
    # The processes of the ranks end when nobody can ask them.
    KEPT.clear()


if __name__ == "__main__":
    main()
