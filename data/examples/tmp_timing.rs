use mobula_core::{BatchSource, Shard};
use mobula_data::*;
use std::time::Instant;
fn main() {
    let t = Instant::now();
    let lap = |what: &str, t: Instant| { println!("{what}: {:.1} ms", t.elapsed().as_secs_f64() * 1e3); Instant::now() };
    let d = Dataset::read_parquet("examples/data/digits-*.parquet").unwrap();
    let t = lap("open", t);
    let (train, _test) = d.train_test_split(0.2, 7).unwrap();
    let t = lap("split", t);
    let s = StandardScaler::fit(&train, ["image"]).unwrap();
    let t = lap("fit", t);
    let src = train.preprocess(&s).unwrap().stream(StreamOptions::new(["image"], "label").with_batch_size(64).with_shuffle(7)).unwrap();
    let t = lap("stream()", t);
    let mut st = src.open(Shard::ALL).unwrap();
    let mut t = lap("open shard", t);
    for e in 0..4 {
        while st.next_batch().unwrap().is_some() {}
        t = lap(&format!("digits epoch {e} ({} steps)", src.steps_per_epoch()), t);
    }
    let dir = std::env::args().nth(1).unwrap();
    let d = Dataset::read_idx(format!("{dir}/i.gz"), format!("{dir}/l.gz")).unwrap();
    let t = lap("open idx 60k", t);
    let (train, _) = d.train_test_split(0.1, 7).unwrap();
    let s = StandardScaler::fit(&train, ["image"]).unwrap();
    let t = lap("fit idx", t);
    for (name, data) in [("raw", train.clone()), ("scaled", train.preprocess(&s).unwrap())] {
        let t = Instant::now();
        let src = data.stream(StreamOptions::new(["image"], "label").with_batch_size(256).with_shuffle(7)).unwrap();
        let t = lap("stream()", t);
        let mut st = src.open(Shard::ALL).unwrap();
        let mut t = lap("open shard", t);
        for e in 0..3 {
            st.next_batch().unwrap();
            t = lap("first batch", t);
            let mut rows = 0;
            while let Some(b) = st.next_batch().unwrap() { rows += b.rows(); }
            println!("{:.0} rows/s", rows as f64 / t.elapsed().as_secs_f64());
            t = lap(&format!("{name} epoch {e}"), t);
        }
    }
}
