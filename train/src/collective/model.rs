//! The turns of ranks that share memory, checked for all schedules at once (SHM-1, SHM-2).
//!
//! Ranks do the code of `turns` on threads. The memory that they share here notes with a vector clock
//! what of the others each rank is ordered behind: what the ranks of the stores had done which its
//! acquire loads have seen. Reading or writing a cell in which another rank reads or writes without
//! such an order is an error.
//!
//! Why one run stands for all schedules: a rank does the same in each of them, but for what its waits
//! see, and each waits for one counter of one rank to come so far. One that sees a later store is
//! ordered behind more, never less. Here each sees the first store that ends it, and no rank hears of
//! another in any other way; so what is ordered here is ordered always. (A checker that goes through
//! the schedules one by one does not come far enough to use a set of cells again: loom, with a single
//! preemption, took seconds for two turns of two ranks and did not end within a minute for four.)

use super::region::{Cell, SETS};
use super::turns::{Counter, GIVEN, Memory, READY, Turns};
use super::{Element, Exchange, Parts, ReduceOp};
use crate::{Error, Result};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

/// Bytes of a cell: two values of `f32`.
const CELL: usize = 8;
/// Counters of a rank. Those behind `READY` are compared, and must not change meanwhile.
const COUNTERS: usize = 4;
/// A rank that waits longer waits forever.
const LONG: Duration = Duration::from_secs(20);

/// What is done wrong, so that the checker must find it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    /// So many sets of cells.
    Sets(u64),
    /// Nobody waits for this counter.
    NoWait(usize),
    RelaxedStores,
    RelaxedLoads,
}

/// What of each rank is ordered before now: the number of its last store.
type Clock = Vec<u64>;

#[derive(Debug)]
struct Store {
    value: u64,
    /// Its number among those of its rank.
    number: u64,
    /// What who sees it is ordered behind.
    releases: Option<Clock>,
}

/// When each rank last read and wrote a place: before which of its stores.
#[derive(Debug)]
struct Accesses {
    reads: Clock,
    writes: Clock,
    /// For which turn it was written.
    turn: Option<u64>,
}

/// A cell by owner, set and index, or a counter that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Place {
    Cell(usize, u64, usize),
    Counter(usize, usize),
}

#[derive(Debug)]
struct State {
    /// By rank; its own number is that of its next store.
    clocks: Vec<Clock>,
    stores: Vec<Vec<Store>>,
    /// By who looks and at which counter: the store that it sees.
    seen: HashMap<(usize, usize), usize>,
    /// The counter that each rank looked at last.
    looked_at: Vec<usize>,
    places: HashMap<Place, Accesses>,
    failed: Option<String>,
}

impl State {
    fn fail(&mut self, text: String) {
        self.failed.get_or_insert(text);
    }

    fn access(&mut self, me: usize, place: Place, turn: Option<u64>, is_write: bool) {
        let (world, clock) = (self.clocks.len(), &self.clocks[me]);
        let none = || Accesses { reads: vec![0; world], writes: vec![0; world], turn: None };
        let there = self.places.entry(place).or_insert_with(none);
        let is_apart = |of: &Clock| (0..world).any(|rank| rank != me && of[rank] > clock[rank]);
        let meets = is_apart(&there.writes) || (is_write && is_apart(&there.reads));
        let is_other = !is_write && there.turn != turn;
        let own = if is_write { &mut there.writes } else { &mut there.reads };
        own[me] = clock[me];
        if is_write {
            there.turn = turn;
        }
        if meets || is_other {
            self.fail(format!("rank {me} meets another one in {place:?}, turn {turn:?}"));
        }
    }

    fn load(&mut self, me: usize, at: usize, order: Ordering) -> u64 {
        let (rank, index) = (at / COUNTERS, at % COUNTERS);
        if index > READY {
            self.access(me, Place::Counter(rank, index), None, false);
        }
        // Not older than what this rank is ordered behind, and never again what it was before.
        let known = self.clocks[me][rank];
        let least = self.stores[at].iter().rposition(|store| store.number <= known).unwrap_or(0);
        let seen = self.seen.entry((me, at)).or_default();
        *seen = least.max(*seen);
        let store = &self.stores[at][*seen];
        if order == Ordering::Acquire
            && let Some(clock) = &store.releases
        {
            self.clocks[me].iter_mut().zip(clock).for_each(|(own, other)| *own = *other.max(own));
        }
        self.looked_at[me] = at;
        store.value
    }

    fn store(&mut self, me: usize, at: usize, value: u64, order: Ordering) {
        if at % COUNTERS > READY {
            self.access(me, Place::Counter(me, at % COUNTERS), None, true);
        }
        let releases = (order == Ordering::Release).then(|| self.clocks[me].clone());
        self.stores[at].push(Store { value, number: self.clocks[me][me], releases });
        self.clocks[me][me] += 1;
    }
}

#[derive(Debug)]
struct Model {
    world: usize,
    fault: Fault,
    state: Mutex<State>,
    stored: Condvar,
    /// What cells hold in each turn.
    content: Vec<OnceLock<Vec<u64>>>,
}

impl Model {
    fn new(world: usize, turns: usize, fault: Fault) -> Self {
        let clock = |rank| (0..world).map(|other| u64::from(other == rank)).collect();
        let zero = || vec![Store { value: 0, number: 0, releases: None }];
        let state = State {
            clocks: (0..world).map(clock).collect(),
            stores: (0..world * COUNTERS).map(|_| zero()).collect(),
            seen: HashMap::new(),
            looked_at: vec![0; world],
            places: HashMap::new(),
            failed: None,
        };
        let content = (0..turns * world * (world + 1)).map(|_| OnceLock::new()).collect();
        Self { world, fault, state: Mutex::new(state), stored: Condvar::new(), content }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn access(&self, me: usize, Cell { owner, turn, index }: Cell, is_write: bool) {
        let sets = if let Fault::Sets(sets) = self.fault { sets } else { SETS as u64 };
        self.state().access(me, Place::Cell(owner, turn % sets, index), Some(turn), is_write);
    }

    fn content(&self, Cell { owner, turn, index }: Cell) -> &OnceLock<Vec<u64>> {
        &self.content[(turn as usize * self.world + owner) * (self.world + 1) + index]
    }
}

/// The memory as one rank sees it.
#[derive(Debug)]
struct Shared {
    model: Arc<Model>,
    me: usize,
    counters: Vec<Count>,
}

#[derive(Debug)]
struct Count {
    model: Arc<Model>,
    me: usize,
    at: usize,
}

impl Shared {
    fn new(model: &Arc<Model>, me: usize) -> Self {
        let count = |at| Count { model: Arc::clone(model), me, at };
        let counters = (0..model.world * COUNTERS).map(count).collect();
        Self { model: Arc::clone(model), me, counters }
    }

    /// Sees one store more, when there is one, of the counter that was looked at last.
    fn look_on(&self) -> Result<()> {
        let (model, me) = (&self.model, self.me);
        let waits = |state: &mut State| {
            let (at, nobody) = (state.looked_at[me], state.failed.is_none());
            nobody && state.seen[&(me, at)] + 1 >= state.stores[at].len()
        };
        let waited = model.stored.wait_timeout_while(model.state(), LONG, waits);
        let (mut state, waited) = waited.expect("nobody panics with it");
        if waited.timed_out() {
            state.fail(format!("rank {me} waits forever"));
            model.stored.notify_all();
        }
        if state.failed.is_some() {
            let (operation, late) = ("model", Vec::new());
            return Err(Error::Straggler { operation, rank: me, late, after: LONG });
        }
        let at = state.looked_at[me];
        *state.seen.entry((me, at)).or_default() += 1;
        Ok(())
    }
}

impl Counter for Count {
    fn load(&self, order: Ordering) -> u64 {
        let order = match self.model.fault {
            Fault::NoWait(index) if index == self.at % COUNTERS => return u64::MAX,
            Fault::RelaxedLoads => Ordering::Relaxed,
            _ => order,
        };
        self.model.state().load(self.me, self.at, order)
    }

    fn store(&self, value: u64, order: Ordering) {
        let is_relaxed = self.model.fault == Fault::RelaxedStores;
        let order = if is_relaxed { Ordering::Relaxed } else { order };
        self.model.state().store(self.me, self.at, value, order);
        self.model.stored.notify_all();
    }
}

impl Memory for Shared {
    type Counter = Count;

    fn cell_bytes(&self, _: usize) -> usize {
        CELL
    }

    fn counter(&self, rank: usize, index: usize) -> &Count {
        &self.counters[rank * COUNTERS + index]
    }

    fn write<T: Element>(&self, cell: Cell, first: usize, values: &[T]) {
        assert_eq!((cell.owner, first), (self.me, 0), "SHM-1, and a cell is one block");
        let mut words = vec![0; CELL / 8];
        bytemuck::cast_slice_mut(&mut words)[..values.len()].copy_from_slice(values);
        if !values.is_empty() {
            self.model.access(self.me, cell, true);
            self.model.content(cell).set(words).expect("a cell is written once in a turn");
        }
    }

    fn read<T: Element>(&self, cell: Cell, len: usize) -> &[T] {
        const NOTHING: &[u64] = &[0; CELL / 8];
        if len > 0 {
            self.model.access(self.me, cell, false);
        }
        let words = self.model.content(cell).get();
        &bytemuck::cast_slice(words.map_or(NOTHING, Vec::as_slice))[..len]
    }

    fn wait(&self, _: &Exchange, ranks: &[usize], is_late: impl Fn(usize) -> bool) -> Result<()> {
        for other in 0..ranks.len() {
            while is_late(other) {
                self.look_on()?;
            }
        }
        Ok(())
    }
}

/// An exchange, and of how many values.
#[derive(Clone, Debug)]
struct Job {
    parts: Parts,
    reduce: Option<ReduceOp>,
    gather: bool,
    len: usize,
}

fn sum(len: usize) -> Job {
    Job { parts: Parts::Equal, reduce: Some(ReduceOp::Sum), gather: true, len }
}

fn value(rank: usize, at: usize) -> f32 {
    (rank * 100 + at) as f32
}

/// One exchange of one rank; says what is wrong with what it has then.
fn exchange(turns: &mut Turns<Shared>, me: usize, world: usize, job: &Job) -> Result<(), String> {
    let (patience, Job { parts, reduce, gather, len }) = (Duration::ZERO, job.clone());
    let exchange = Exchange { operation: "model", parts, reduce, gather, rounded: 0, patience };
    let mut values: Vec<f32> = (0..len).map(|at| value(me, at)).collect();
    let done = turns.exchange(&mut values, &exchange, exchange.code::<f32>());
    done.map_err(|error| error.to_string())?;
    for owner in (0..world).filter(|owner| gather || *owner == me) {
        for at in exchange.parts.of(owner, world, len) {
            let expected = match reduce {
                Some(_) => (0..world).map(|rank| value(rank, at)).sum(),
                None => value(owner, at),
            };
            if values[at] != expected {
                return Err(format!("rank {me} has {} at {at}, not {expected}", values[at]));
            }
        }
    }
    Ok(())
}

/// Runs the jobs of each rank: what the model finds, and what the ranks do.
fn check(jobs: &[Vec<Job>], fault: Fault) -> (Option<String>, Vec<Result<(), String>>) {
    let world = jobs.len();
    let turns = |jobs: &Vec<Job>| jobs.iter().map(|job| job.len / 2 + 1).sum::<usize>();
    let model = Arc::new(Model::new(world, jobs.iter().map(turns).max().unwrap_or(0), fault));
    let results = std::thread::scope(|scope| {
        let rank = |me: usize| {
            let memory = Shared::new(&model, me);
            scope.spawn(move || {
                let mut turns = Turns::new(memory, (0..world).collect(), me);
                jobs[me].iter().try_for_each(|job| exchange(&mut turns, me, world, job))
            })
        };
        let ranks: Vec<_> = (0..world).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    });
    let failed = model.state().failed.clone();
    (failed, results)
}

fn job(world: usize) -> impl Strategy<Value = Job> {
    let parts = prop_oneof![Just(Parts::Equal), (0..world).prop_map(Parts::Root)];
    let reduce = prop_oneof![Just(None), Just(Some(ReduceOp::Sum))];
    (parts, reduce, any::<bool>(), 0..60usize).prop_map(|(parts, reduce, gather, len)| Job {
        parts,
        reduce,
        gather,
        len,
    })
}

fn jobs() -> impl Strategy<Value = Vec<Vec<Job>>> {
    (2..6usize).prop_flat_map(|world| {
        let same = prop::collection::vec(job(world), 1..6);
        same.prop_map(move |jobs| vec![jobs; world])
    })
}

proptest! {
    #[test]
    fn no_two_ranks_meet_in_a_cell(jobs in jobs()) {
        let (failed, results) = check(&jobs, Fault::None);
        prop_assert_eq!(failed, None);
        prop_assert!(results.iter().all(Result::is_ok), "{:?}", results);
    }
}

#[test]
fn what_is_done_wrong_is_found() {
    let sets = [1, SETS as u64 - 1].map(Fault::Sets);
    let waits = [GIVEN, READY].map(Fault::NoWait);
    let orders = [Fault::RelaxedStores, Fault::RelaxedLoads];
    for fault in [sets, waits, orders].concat() {
        for world in 2..4 {
            // Ten turns, which use each set of cells twice and more.
            let (found, _) = check(&vec![vec![sum(20 * world)]; world], fault);
            assert!(found.is_some(), "{fault:?} of {world} ranks");
        }
    }
}

#[test]
fn ranks_that_differ_all_hear_of_it() {
    for lengths in [[8, 9], [4, 60], [60, 0]] {
        let (failed, results) = check(&lengths.map(|len| vec![sum(12), sum(len)]), Fault::None);
        assert_eq!(failed, None);
        for result in results {
            assert!(result.expect_err("they differ").contains("bring"));
        }
    }
}
