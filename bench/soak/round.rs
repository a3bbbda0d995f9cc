//! One round: a mix of work, while workers are killed; then every answer is judged.

use crate::killer::Killer;
use crate::oracle::{Expected, LONG, Value, Verdict, is_loss};
use crate::tally::Tally;
use crate::work::{self, Counter, CounterHandle, Mark, transformed};
use anyhow::{Context, Result, bail, ensure};
use mobula_core::random::{Philox, Stream};
use mobula_core::value::Blob;
use mobula_core::{
    ActorOptions, Backoff, Error, GroupEvent, GroupOptions, ObjectRef, OnLoss, Placement,
    Resources, RestartPolicy, Runtime, Task, TaskOptions,
};
use std::path::Path;
use std::time::{Duration, Instant};

/// What a call of a counting actor gives.
type Counted = ObjectRef<(u32, u64)>;

const TASKS: u64 = 40;
const CALLS: usize = 12;
/// Enough for whatever a round's killer does.
const RETRIES: u32 = 30;
const MIB: usize = 1 << 20;

/// What a round is like.
#[derive(Clone, Copy)]
struct Plan {
    kills: u64,
    /// Whether tasks are cancelled or run out of time: their processes are killed too.
    is_rough: bool,
}

impl Plan {
    /// Every fourth round nobody is killed, and nothing may be lost.
    fn draw(draw: &mut Philox) -> Self {
        let is_quiet = draw.below(4) == 0;
        let kills = if is_quiet { 0 } else { 2 + draw.below(10) };
        Self { kills, is_rough: !is_quiet }
    }
}

/// Runs round `number` and gives what happened, or what must not have.
pub(crate) fn run(runtime: &Runtime, folder: &Path, stream: Stream, number: u64) -> Result<Tally> {
    let file = folder.join(format!("round-{number}"));
    let mut draw = stream.at(number, 0);
    let plan = Plan::draw(&mut draw);
    let killer = Killer::start(stream.at(number, 1), plan.kills);
    let round = Round { runtime, file: &file, plan, next: 0, draw };
    let outcome = round.run();
    let kills = killer.stop();
    let mut tally = outcome?;
    tally.add(kills);
    tally.rounds = 1;
    all_is_given_back(runtime)?;
    std::fs::remove_file(&file).context("removing the marks")?;
    Ok(tally)
}

fn all_is_given_back(runtime: &Runtime) -> Result<()> {
    let deadline = Instant::now() + LONG;
    while runtime.free_resources() != runtime.resources() {
        let free = runtime.free_resources();
        ensure!(Instant::now() < deadline, "only {free} of {} is free", runtime.resources());
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

struct Round<'a> {
    runtime: &'a Runtime,
    file: &'a Path,
    plan: Plan,
    /// The number of the next mark.
    next: u64,
    draw: Philox,
}

impl Round<'_> {
    fn run(mut self) -> Result<Tally> {
        let mut tally = Tally::default();
        let size = MIB / 4 + self.draw.below(4 * MIB as u64) as usize;
        let data = Blob::from((0..size).map(|i| i as u8).collect::<Vec<u8>>());
        let shared = self.runtime.put(data.clone());
        let mut pending: Vec<Box<dyn FnOnce() -> Result<Verdict>>> = Vec::new();
        let mut counters = Vec::new();
        for _ in 0..2 {
            counters.extend(self.counter(&mut tally)?);
        }
        for _ in 0..TASKS {
            self.submit(&shared, &data, &mut pending);
        }
        let calls: Vec<_> =
            counters.iter().map(|counter| self.calls(counter, &shared, &data)).collect();
        self.group(&shared, &data, &mut tally)?;
        let verdicts: Vec<Verdict> =
            pending.into_iter().map(|settle| settle()).collect::<Result<_>>()?;
        for (counted, transformed) in calls {
            judge_counts(&counted, &self.plan, &mut tally)?;
            transformed
                .into_iter()
                .try_for_each(|call| call.settle()?(&self.runs(), &mut tally))?;
        }
        let runs = self.runs();
        verdicts.into_iter().try_for_each(|verdict| verdict(&runs, &mut tally))?;
        Ok(tally)
    }

    fn runs(&self) -> std::collections::HashMap<u64, u32> {
        work::runs(self.file)
    }

    fn mark(&mut self) -> Mark {
        self.next += 1;
        Mark::new(self.file, self.next)
    }

    /// Half of them may be repeated.
    fn options(&mut self) -> TaskOptions {
        let max_retries = if self.draw.below(2) == 0 { RETRIES } else { 0 };
        let initial = Duration::from_millis(1);
        TaskOptions {
            placement: Placement::Process,
            max_retries,
            backoff: Backoff { initial, max: 20 * initial, ..Backoff::default() },
            resources: Resources::cpus([0.5, 1.0][self.draw.below(2) as usize]),
            ..TaskOptions::default()
        }
    }

    fn submit(
        &mut self,
        shared: &ObjectRef<Blob>,
        data: &Blob,
        pending: &mut Vec<Box<dyn FnOnce() -> Result<Verdict>>>,
    ) {
        let (mark, mut options) = (self.mark(), self.options());
        let x = self.draw.below(1000);
        match self.draw.below(20) {
            0..8 => {
                let task = work::square::remote(mark.clone(), x, 0);
                pending.push(self.expect(mark, task, options, Value::Is(x * x)));
            }
            8..12 => {
                let task = work::square::remote(mark.clone(), x, 5 + x / 10);
                pending.push(self.expect(mark, task, options, Value::Is(x * x)));
            }
            12..15 => {
                let (key, wanted) = (x as u8, transformed(data, x as u8));
                let task = work::transform::remote(mark.clone(), shared.clone(), key);
                pending.push(self.expect(mark, task, options, Value::Is(wanted)));
            }
            15..17 => {
                let (left, right) = (self.mark(), self.mark());
                let left = work::square::remote(left, x, 1).with_options(self.options());
                let right = work::square::remote(right, 3, 0).with_options(self.options());
                let (left, right) = (self.runtime.submit(left), self.runtime.submit(right));
                let task = work::add::remote(mark.clone(), left, right);
                pending.push(self.expect(mark, task, options, Value::Is(x * x + 9)));
            }
            17 => {
                let task = work::refuse::remote(mark.clone());
                pending.push(self.expect(mark, task, options, Value::Error("asked to refuse")));
            }
            _ if !self.plan.is_rough => {}
            18 => {
                options.timeout = Some(Duration::from_millis(20 + x / 10));
                options.max_retries = options.max_retries.min(1);
                let with_child = x.is_multiple_of(2);
                let task = work::linger::remote(mark.clone(), with_child);
                pending.push(self.expect(mark, task, options, Value::Late));
            }
            _ => {
                let with_child = x.is_multiple_of(2);
                let task = work::linger::remote(mark.clone(), with_child);
                let retries = options.max_retries;
                let object = self.runtime.submit(task.with_options(options));
                let copy = object.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(x / 4));
                    copy.cancel();
                });
                let (is_cancelled, may_be_lost) = (true, true);
                let value = Value::Late;
                let expected = Expected { mark, object, value, retries, is_cancelled, may_be_lost };
                pending.push(Box::new(|| expected.settle()));
            }
        }
    }

    fn expect<T: PartialEq + Send + Sync + 'static>(
        &self,
        mark: Mark,
        task: Task<T>,
        options: TaskOptions,
        value: Value<T>,
    ) -> Box<dyn FnOnce() -> Result<Verdict>> {
        let retries = options.max_retries;
        let object = self.runtime.submit(task.with_options(options));
        let may_be_lost = self.plan.is_rough;
        let expected = Expected { mark, object, value, retries, is_cancelled: false, may_be_lost };
        Box::new(|| expected.settle())
    }

    /// An actor, unless its process was killed before it was built.
    fn counter(&mut self, tally: &mut Tally) -> Result<Option<CounterHandle>> {
        let restarts = [0, 5][self.draw.below(2) as usize];
        let initial = Duration::from_millis(1);
        let backoff = Backoff { initial, ..Backoff::default() };
        let options = ActorOptions {
            placement: Placement::Process,
            restart: RestartPolicy { backoff, ..RestartPolicy::at_most(restarts) },
            placement_timeout: LONG,
            ..ActorOptions::new("counter").with_resources(Resources::cpus(0.5))
        };
        tally.actors += 1;
        match self.runtime.spawn(Counter::remote().with_options(options)) {
            Ok(counter) => Ok(Some(counter)),
            Err(error) if self.plan.is_rough && is_loss(&error) => Ok(None),
            Err(error) => bail!("an actor did not start: {error}"),
        }
    }

    fn calls(
        &mut self,
        counter: &CounterHandle,
        shared: &ObjectRef<Blob>,
        data: &Blob,
    ) -> (Vec<Counted>, Vec<Expected<Blob>>) {
        let (mut counted, mut large) = (Vec::new(), Vec::new());
        for i in 0..CALLS {
            let mark = self.mark();
            if i % 4 != 3 {
                counted.push(counter.count(mark, self.draw.below(30)));
                continue;
            }
            let key = self.draw.word() as u8;
            let object = counter.transform(mark.clone(), shared.clone(), key);
            let value = Value::Is(transformed(data, key));
            let (retries, may_be_lost) = (0, self.plan.is_rough);
            large.push(Expected { mark, object, value, retries, is_cancelled: false, may_be_lost });
        }
        (counted, large)
    }

    /// A group whose members all give their result, after restarts perhaps, or which says who was
    /// lost.
    fn group(&mut self, shared: &ObjectRef<Blob>, data: &Blob, tally: &mut Tally) -> Result<()> {
        let initial = Duration::from_millis(1);
        let backoff = Backoff { initial, ..Backoff::default() };
        let restarts = [0, 5][self.draw.below(2) as usize];
        let options = GroupOptions {
            restart: RestartPolicy { backoff, ..RestartPolicy::at_most(restarts) },
            on_loss: [OnLoss::RestartAll, OnLoss::ReplaceLost][self.draw.below(2) as usize],
            placement_timeout: LONG,
            show_logs: false,
            ..GroupOptions::new("pair", 2)
        };
        let task = work::meet::remote(shared.clone(), self.draw.below(100));
        let mut group = self.runtime.group(&options, &task).context("starting a group")?;
        tally.groups += 1;
        let (mut finished, mut reports) = ([false; 2], 0);
        while finished.contains(&false) {
            match group.next_event(LONG) {
                Some(GroupEvent::Report { .. }) => reports += 1,
                Some(GroupEvent::Finished { rank, value }) => {
                    let is_right = value == transformed(data, rank as u8);
                    ensure!(is_right, "rank {rank} of a group gave a wrong value");
                    finished[rank] = true;
                }
                Some(GroupEvent::Restarting { error, .. }) => {
                    ensure!(
                        self.plan.is_rough,
                        "a group restarts, and nothing explains it: {error}"
                    );
                    tally.groups_restarted += 1;
                    // Every member is called again, whether its process is a new one or not.
                    (finished, reports) = ([false; 2], 0);
                }
                Some(GroupEvent::Resized { size, .. }) => {
                    bail!("a group of 2, which is not elastic, has {size} members")
                }
                Some(GroupEvent::Failed { error, .. }) => {
                    let is_explained = self.plan.is_rough && is_loss(&error);
                    ensure!(is_explained, "a group failed, and nothing explains it: {error}");
                    tally.groups_lost += 1;
                    return Ok(());
                }
                None => bail!("nothing was heard of a group for {LONG:?}"),
            }
        }
        ensure!(reports == 2, "a group of 2 made {reports} reports");
        Ok(())
    }
}

/// Answers of one process count up by one, apart from calls that were lost with it; a new process
/// begins at 1.
fn judge_counts(calls: &[Counted], plan: &Plan, tally: &mut Tally) -> Result<()> {
    let mut before: Option<(u32, u64)> = None;
    for call in calls {
        let answer = call.get_timeout(LONG);
        ensure!(call.is_ready(), "a call of an actor has not ended after {LONG:?}");
        tally.tasks += 1;
        match answer {
            Ok(answer) => {
                let (pid, count) = *answer;
                let is_next = match before {
                    Some((last, n)) if last == pid => count == n + 1,
                    _ => count == 1,
                };
                ensure!(is_next, "an actor counted {answer:?} after {before:?}");
                tally.restarts += u64::from(before.is_some_and(|(last, _)| last != pid));
                before = Some(*answer);
                tally.right += 1;
            }
            Err(error) if plan.is_rough && is_lost_call(&error) => tally.lost += 1,
            Err(error) => bail!("a call of an actor gave an error that nothing explains: {error}"),
        }
    }
    Ok(())
}

/// After its last restart an actor only says that it has ended.
fn is_lost_call(error: &Error) -> bool {
    let has_ended = |reason: &str| reason.contains("the actor has ended");
    is_loss(error) || matches!(error, Error::WorkerLost { reason, .. } if has_ended(reason))
}
