//! The all-reduce, in threads and across processes.

use crate::Test;
use mobula_core::{BoxError, GroupEvent, GroupOptions, Member, Placement, Runtime, remote};
use mobula_train::WorkerContext;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);

pub(crate) const TESTS: &[Test] = &[
    ("collectives::sums_are_exact_for_all_lengths_and_worlds", sums),
    ("collectives::every_rank_gets_the_same_bits", same_bits),
    ("collectives::different_lengths_are_an_error_on_every_rank", lengths_differ),
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

/// What a trainer without a run directory gives to its workers.
pub(crate) fn no_setup() -> serde_json::Value {
    serde_json::json!({"checkpoints": null, "keep": 1, "every_epochs": 1, "resume_from": null})
}

fn options(placement: Placement, size: usize) -> GroupOptions {
    let options = GroupOptions { placement, show_logs: false, ..GroupOptions::new("sum", size) };
    options.with_context(&no_setup()).expect("context")
}

fn sums(runtime: &Runtime) {
    // Growing and shrinking, around the chunk borders, none at all.
    let lengths = vec![1, 7, 64, 5, 10_000, 3, 0, 20_001];
    for (placement, world) in
        [(Placement::Thread, 3), (Placement::Process, 2), (Placement::Process, 4)]
    {
        let group = runtime.group(&options(placement, world), &sum_counts::remote(lengths.clone()));
        let ranks = group.expect("group").join(LONG).expect("join");
        let offsets: f32 = (0..world).map(|rank| rank as f32 * 1000.0).sum();
        for result in ranks {
            for (values, len) in result.iter().zip(&lengths) {
                let expected: Vec<f32> = (0..*len).map(|i| (i * world) as f32 + offsets).collect();
                assert_eq!(*values, expected, "{placement:?} {world} {len}");
            }
        }
    }
}

fn same_bits(runtime: &Runtime) {
    let run = || {
        let group = runtime.group(&options(Placement::Process, 4), &sum_awkward::remote());
        group.expect("group").join(LONG).expect("join")
    };
    let (first, again) = (run(), run());
    assert!(first.iter().all(|rank| *rank == first[0]), "ranks differ");
    assert_eq!(first, again, "runs differ");
    let reversed: Vec<u32> = (1..1001)
        .map(|i| {
            [1e-3f32, -1e8, 1.0, 1e8]
                .iter()
                .fold(0.0, |sum, scale| sum + scale / i as f32)
                .to_bits()
        })
        .collect();
    // The control: the order of addition does matter for these values.
    assert_ne!(first[0], reversed);
}

fn lengths_differ(runtime: &Runtime) {
    // Within one slot, and far apart, either rank bringing more.
    for lengths in [[10, 11], [10, 100_000], [100_000, 10]] {
        let task = sum_different::remote(lengths.to_vec());
        let mut group = runtime.group(&options(Placement::Process, 2), &task).expect("group");
        for _ in 0..2 {
            let Some(GroupEvent::Failed { error, .. }) = group.next_event(LONG) else {
                panic!("{lengths:?}: every rank must fail");
            };
            let text = error.to_string();
            assert!(text.contains("do all ranks build the same model?"), "{lengths:?}: {text}");
        }
    }
}
