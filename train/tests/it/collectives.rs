//! The all-reduce, in threads and across processes.

use crate::Test;
use half::{bf16, f16};
use mobula_core::{BoxError, GroupEvent, GroupOptions, Member, Placement, Runtime, remote};
use mobula_train::{Collective, Element, ReduceOp, Transport, WorkerContext};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

pub(crate) const TESTS: &[Test] = &[
    ("collectives::sums_are_exact_for_all_lengths_and_worlds", sums),
    ("collectives::every_rank_gets_the_same_bits", same_bits),
    ("collectives::different_lengths_are_an_error_on_every_rank", lengths_differ),
    ("collectives::every_operation_and_type_does_what_it_says", operations),
    ("collectives::different_operations_are_an_error_on_every_rank", operations_differ),
    ("collectives::a_rank_that_does_not_come_is_named", late),
];

/// Rank r gives i + r·1000 at index i, for each length.
#[remote(crate = mobula_core)]
fn sum_counts(member: Member, lengths: Vec<usize>) -> Result<Vec<Vec<f32>>, BoxError> {
    let offset = member.rank() as f32 * 1000.0;
    let mut context = WorkerContext::join(member)?;
    let mut results = Vec::new();
    for len in lengths {
        let mut values: Vec<f32> = (0..len).map(|i| i as f32 + offset).collect();
        context.all_reduce_sum(&mut values)?;
        results.push(values);
    }
    Ok(results)
}

/// Values whose sum depends on the order of addition.
#[remote(crate = mobula_core)]
fn sum_awkward(member: Member) -> Result<Vec<u32>, BoxError> {
    let scale = [1e8f32, 1.0, -1e8, 1e-3][member.rank()];
    let mut context = WorkerContext::join(member)?;
    let mut values: Vec<f32> = (1..1001).map(|i| scale / i as f32).collect();
    context.all_reduce_sum(&mut values)?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

#[remote(crate = mobula_core)]
fn sum_different(member: Member, lengths: Vec<usize>) -> Result<(), BoxError> {
    let len = lengths[member.rank()];
    let mut context = WorkerContext::join(member)?;
    context.all_reduce_sum(&mut vec![0.0f32; len])?;
    Ok(())
}

/// What every rank has after each operation on `rank · 100 + index`, and after a maximum of what
/// may be NaN.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Results {
    sum: Vec<f64>,
    mean: Vec<f64>,
    max: Vec<f64>,
    scattered: Vec<f64>,
    scattered_mean: Vec<f64>,
    gathered: Vec<f64>,
    broadcast: Vec<f64>,
    nan: bool,
}

#[remote(crate = mobula_core)]
fn operate(member: Member, len: usize) -> Result<Vec<Results>, BoxError> {
    let rank = member.rank();
    let context = WorkerContext::join(member)?;
    let all = context.collective();
    all.barrier()?;
    Ok(vec![
        operate_on(all, rank, len, |x| x as f32, |x| x.into())?,
        operate_on(all, rank, len, |x| x, |x| x)?,
        operate_on(all, rank, len, bf16::from_f64, bf16::to_f64)?,
        operate_on(all, rank, len, f16::from_f64, f16::to_f64)?,
    ])
}

fn operate_on<T: Element>(
    all: &dyn Collective,
    rank: usize,
    len: usize,
    from: fn(f64) -> T,
    to: fn(T) -> f64,
) -> Result<Results, BoxError> {
    let own = || (0..len).map(|at| from(number(rank, at))).collect::<Vec<T>>();
    let reduce = |op| {
        let mut values = own();
        all.all_reduce(&mut values, op)?;
        Ok::<_, BoxError>(values.into_iter().map(to).collect())
    };
    let mut scattered = own();
    all.reduce_scatter(&mut scattered, ReduceOp::Sum)?;
    let mut scattered_mean = own();
    all.reduce_scatter(&mut scattered_mean, ReduceOp::Mean)?;
    let mut gathered = own();
    all.all_gather(&mut gathered)?;
    let mut broadcast = own();
    all.broadcast(&mut broadcast, all.shard().world - 1)?;
    // Rounded once, after the division.
    let mut large = [from(40_000.0)];
    all.all_reduce(&mut large, ReduceOp::Mean)?;
    assert_eq!(to(large[0]), to(from(40_000.0)));
    let mut nan = [from(if rank == 1 { f64::NAN } else { 1.0 })];
    all.all_reduce(&mut nan, ReduceOp::Max)?;
    Ok(Results {
        sum: reduce(ReduceOp::Sum)?,
        mean: reduce(ReduceOp::Mean)?,
        max: reduce(ReduceOp::Max)?,
        scattered: scattered[all.part(len)].iter().copied().map(to).collect(),
        scattered_mean: scattered_mean[all.part(len)].iter().copied().map(to).collect(),
        gathered: gathered.into_iter().map(to).collect(),
        broadcast: broadcast.into_iter().map(to).collect(),
        nan: to(nan[0]).is_nan(),
    })
}

/// Small enough that sums are exact in eight bits.
fn number(rank: usize, at: usize) -> f64 {
    ((rank * 5 + at) % 13) as f64 - 6.0
}

#[remote(crate = mobula_core)]
fn call_something(member: Member) -> Result<(), BoxError> {
    let rank = member.rank();
    let context = WorkerContext::join(member)?;
    let mut values = [1f32; 3];
    let all = context.collective();
    let error = all.broadcast(&mut values, 7).expect_err("no such rank").to_string();
    assert!(error.starts_with("broadcast from rank 7, expected one of"), "{error}");
    let op = if rank == 1 { ReduceOp::Mean } else { ReduceOp::Sum };
    let first = all.all_reduce(&mut values, op).expect_err("they differ");
    // What comes after is not taken for what was meant.
    let next = all.all_reduce(&mut values, ReduceOp::Sum).expect_err("of no use").to_string();
    assert!(next.contains(&first.to_string()), "{next}");
    Err(first.into())
}

#[remote(crate = mobula_core)]
fn come_late(member: Member) -> Result<String, BoxError> {
    let rank = member.rank();
    let context = WorkerContext::join(member)?;
    if rank == 1 {
        // With its connections, which would break otherwise.
        std::mem::forget(context);
        return Ok(String::new());
    }
    Ok(context.collective().barrier().expect_err("rank 1 is gone").to_string())
}

/// What a trainer without a run directory gives to its workers.
pub(crate) fn no_setup() -> serde_json::Value {
    serde_json::json!({})
}

fn options_by(transport: Transport, placement: Placement, size: usize) -> GroupOptions {
    options_within(LONG, transport, placement, size)
}

fn options_within(
    timeout: Duration,
    transport: Transport,
    placement: Placement,
    size: usize,
) -> GroupOptions {
    options_on(None, timeout, transport, placement, size)
}

fn options_on(
    hosts: Option<Vec<u64>>,
    timeout: Duration,
    transport: Transport,
    placement: Placement,
    size: usize,
) -> GroupOptions {
    let options = GroupOptions { placement, show_logs: false, ..GroupOptions::new("sum", size) };
    let mut setup = no_setup();
    setup["transport"] = serde_json::to_value(transport).expect("JSON");
    setup["hosts"] = serde_json::to_value(hosts).expect("JSON");
    setup["timeout"] = serde_json::to_value(timeout).expect("JSON");
    options.with_context(&setup).expect("context")
}

fn sums(runtime: &Runtime) {
    // Growing and shrinking, around the chunk borders, none at all.
    let lengths = vec![1, 7, 64, 5, 10_000, 3, 0, 20_001, 300_001];
    use Placement::{Process, Thread};
    use Transport::{Auto, Tcp};
    for (transport, placement, world) in [
        (Auto, Thread, 3),
        (Auto, Process, 2),
        (Auto, Process, 4),
        (Tcp, Thread, 2),
        (Tcp, Process, 3),
        (Tcp, Thread, 4),
    ] {
        let options = options_by(transport, placement, world);
        let group = runtime.group(&options, &sum_counts::remote(lengths.clone()));
        let ranks = group.expect("group").join(LONG).expect("join");
        let offsets: f32 = (0..world).map(|rank| rank as f32 * 1000.0).sum();
        for result in ranks {
            for (values, len) in result.iter().zip(&lengths) {
                let expected: Vec<f32> = (0..*len).map(|i| (i * world) as f32 + offsets).collect();
                assert_eq!(*values, expected, "{transport:?} {placement:?} {world} {len}");
            }
        }
    }
}

fn same_bits(runtime: &Runtime) {
    let run = |transport| {
        let options = options_by(transport, Placement::Process, 4);
        let group = runtime.group(&options, &sum_awkward::remote());
        group.expect("group").join(LONG).expect("join")
    };
    for transport in [Transport::Tcp, Transport::Auto] {
        let (first, again) = (run(transport), run(transport));
        assert!(first.iter().all(|rank| *rank == first[0]), "ranks differ");
        assert_eq!(first, again, "runs differ");
    }
    let first = run(Transport::Auto);
    let scales = [1e8f32, 1.0, -1e8, 1e-3];
    let values = (1..1001).map(|i| scales.map(|scale| scale / i as f32));
    let tree = values.clone().map(|[a, b, c, d]| ((a + b) + (c + d)).to_bits());
    let chain = values.map(|[a, b, c, d]| (((a + b) + c) + d).to_bits());
    assert!(first[0].iter().copied().eq(tree));
    // The control: the order of addition does matter for these values.
    assert!(!first[0].iter().copied().eq(chain));
}

fn lengths_differ(runtime: &Runtime) {
    use Transport::{Auto, Tcp};
    // Within one piece, and far apart, either rank bringing more.
    for (transport, lengths) in [
        (Auto, [10, 11]),
        (Auto, [10, 100_000]),
        (Auto, [100_000, 10]),
        (Tcp, [10, 11]),
        (Tcp, [1_000_000, 10]),
    ] {
        let task = sum_different::remote(lengths.to_vec());
        let options = options_by(transport, Placement::Process, 2);
        let mut group = runtime.group(&options, &task).expect("group");
        for _ in 0..2 {
            let Some(GroupEvent::Failed { error, .. }) = group.next_event(LONG) else {
                panic!("{lengths:?}: every rank must fail");
            };
            let text = error.to_string();
            assert!(text.contains("do all ranks build the same model?"), "{lengths:?}: {text}");
        }
    }
}

fn operations(runtime: &Runtime) {
    use Transport::{Auto, Tcp};
    // Uneven parts, ranks without one, and more than a piece.
    let hosts = |hosts: &[u64]| Some(hosts.to_vec());
    for (transport, world, len, hosts) in [
        (Auto, 2, 7, None),
        (Auto, 3, 2, None),
        (Auto, 4, 270_001, None),
        (Tcp, 2, 3, None),
        (Tcp, 3, 270_001, None),
        (Tcp, 4, 9, None),
        (Auto, 4, 11, hosts(&[0, 0, 1, 1])),
        (Auto, 4, 270_001, hosts(&[1, 0, 1, 0])),
        (Auto, 4, 7, hosts(&[0, 1, 1, 2])),
        // So long that what is scattered takes a way of its own.
        (Auto, 4, 300_001, hosts(&[0, 1, 1, 2])),
        (Auto, 4, 270_001, hosts(&[3, 3, 1, 1])),
    ] {
        let options = options_on(hosts, LONG, transport, Placement::Thread, world);
        let group = runtime.group(&options, &operate::remote(len)).expect("group");
        let of = |at: usize, combine: fn(f64, f64) -> f64| {
            (0..world).map(|rank| number(rank, at)).reduce(combine).expect("ranks")
        };
        let sums: Vec<f64> = (0..len).map(|at| of(at, |a, b| a + b)).collect();
        let ends: Vec<usize> = (0..=world).map(|rank| len * rank / world).collect();
        let owner = |at| (0..world).find(|rank| at < ends[rank + 1]).expect("an owner");
        for (rank, results) in group.join(LONG).expect("join").into_iter().enumerate() {
            for (results, bits) in results.into_iter().zip([24, 53, 8, 11]) {
                let expected = Results {
                    sum: sums.clone(),
                    mean: results.mean.clone(),
                    max: (0..len).map(|at| of(at, f64::max)).collect(),
                    scattered: sums[ends[rank]..ends[rank + 1]].to_vec(),
                    scattered_mean: results.mean[ends[rank]..ends[rank + 1]].to_vec(),
                    gathered: (0..len).map(|at| number(owner(at), at)).collect(),
                    broadcast: (0..len).map(|at| number(world - 1, at)).collect(),
                    nan: true,
                };
                assert_eq!(results, expected, "{transport:?} {world} {len} {bits}");
                for (mean, sum) in results.mean.iter().zip(&sums) {
                    let error = (mean - sum / world as f64).abs();
                    assert!(error <= sum.abs() * 0.5f64.powi(bits), "{mean} of {sum}");
                }
            }
        }
    }
}

fn operations_differ(runtime: &Runtime) {
    let one_host = Some(vec![0, 0, 1]);
    for (transport, world, hosts) in
        [(Transport::Auto, 2, None), (Transport::Tcp, 2, None), (Transport::Auto, 3, one_host)]
    {
        let options = options_on(hosts, LONG, transport, Placement::Process, world);
        let mut group = runtime.group(&options, &call_something::remote()).expect("group");
        for _ in 0..2 {
            let Some(GroupEvent::Failed { error, .. }) = group.next_event(LONG) else {
                panic!("every rank must fail");
            };
            assert!(error.to_string().contains("calls all_reduce, rank"), "{error}");
        }
    }
}

fn late(runtime: &Runtime) {
    for transport in [Transport::Auto, Transport::Tcp] {
        let timeout = Duration::from_millis(300);
        let options = options_within(timeout, transport, Placement::Thread, 2);
        let group = runtime.group(&options, &come_late::remote()).expect("group");
        let said = group.join(LONG).expect("join");
        let expected = "rank 0 waited 300ms in barrier for rank 1";
        assert!(said[0].starts_with(expected), "{transport:?}: {}", said[0]);
    }
}
