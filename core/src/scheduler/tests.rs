//! Long random lives of a scheduler, and the cases that users meet.

use super::amounts::UNIT;
use super::*;
use crate::Resources;
use proptest::prelude::*;

fn shape(bundles: &[Amounts], strategy: PlacementStrategy) -> Shape {
    Shape { bundles: bundles.to_vec(), strategy, node: None, is_pooled: false, is_lasting: false }
}

fn cpus(n: i64) -> Shape {
    shape(&[Amounts::cpus(n * UNIT)], PlacementStrategy::Pack)
}

fn gpus(cpus: i64, gpus: i64) -> Amounts {
    Amounts { gpus: gpus * UNIT, ..Amounts::cpus(cpus * UNIT) }
}

fn machines(totals: &[Amounts]) -> Scheduler {
    let mut scheduler = Scheduler::default();
    for (node, total) in totals.iter().enumerate() {
        step(&mut scheduler, Event::NodeJoined { node: NodeId(node as u64), total: total.clone() });
    }
    scheduler
}

fn step(scheduler: &mut Scheduler, event: Event) -> Vec<Command> {
    let mut out = Vec::new();
    scheduler.step(event, &mut out);
    out
}

fn submit(scheduler: &mut Scheduler, id: Id, shape: Shape) -> Vec<Command> {
    step(scheduler, Event::Submit { id, shape })
}

fn started(commands: &[Command]) -> Vec<Id> {
    let id = |command: &Command| match command {
        Command::Start { id, .. } => Some(*id),
        _ => None,
    };
    commands.iter().filter_map(id).collect()
}

fn nodes(commands: &[Command]) -> Vec<u64> {
    let Some(Command::Start { grants, .. }) = commands.first() else {
        panic!("expected a start, got {commands:?}");
    };
    grants.iter().map(|grant| grant.node.0).collect()
}

#[test]
fn a_large_request_is_not_starved_by_small_ones() {
    let mut s = machines(&[Amounts::cpus(2 * UNIT)]);
    assert_eq!(started(&submit(&mut s, 1, cpus(1))), [1]);
    assert!(submit(&mut s, 2, cpus(2)).is_empty());
    assert!(submit(&mut s, 3, cpus(1)).is_empty(), "the free CPU is reserved for 2");
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [2]);
    assert_eq!(started(&step(&mut s, Event::Release { id: 2 })), [3]);
}

#[test]
fn who_waits_for_a_gpu_holds_up_nobody_who_needs_none() {
    let mut s = machines(&[gpus(4, 1)]);
    let one_gpu = || shape(&[gpus(1, 1)], PlacementStrategy::Pack);
    assert_eq!(started(&submit(&mut s, 1, one_gpu())), [1]);
    assert!(submit(&mut s, 2, one_gpu()).is_empty());
    assert_eq!(started(&submit(&mut s, 3, cpus(2))), [3], "one CPU stays reserved for 2");
    assert!(submit(&mut s, 4, cpus(1)).is_empty());
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [2, 4]);
}

#[test]
fn a_cancelled_head_gives_way() {
    let mut s = machines(&[Amounts::cpus(2 * UNIT)]);
    submit(&mut s, 1, cpus(1));
    submit(&mut s, 2, cpus(2));
    submit(&mut s, 3, cpus(1));
    assert_eq!(started(&step(&mut s, Event::Cancel { id: 2 })), [3]);
}

#[test]
fn lent_cpus_come_back_before_those_who_wait() {
    let mut s = machines(&[Amounts::cpus(UNIT)]);
    submit(&mut s, 1, cpus(1));
    submit(&mut s, 2, cpus(1));
    submit(&mut s, 3, cpus(1));
    assert_eq!(started(&step(&mut s, Event::Lend { id: 1 })), [2]);
    assert!(step(&mut s, Event::Reclaim { id: 1 }).is_empty(), "2 runs");
    let resumed = step(&mut s, Event::Release { id: 2 });
    assert_eq!(resumed, [Command::Resume { id: 1 }], "not 3");
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [3]);
}

#[test]
fn what_lasts_leaves_as_much_as_was_lent() {
    let lasting = |n| Shape { is_lasting: true, ..cpus(n) };
    let mut s = machines(&[Amounts::cpus(3 * UNIT)]);
    submit(&mut s, 1, cpus(2));
    step(&mut s, Event::Lend { id: 1 });
    assert_eq!(started(&submit(&mut s, 2, lasting(1))), [2], "nobody holds this one");
    assert!(submit(&mut s, 3, lasting(1)).is_empty(), "1 wants it back");
    assert_eq!(started(&submit(&mut s, 4, cpus(2))), [4], "which ends, and is not held up");
    assert!(step(&mut s, Event::Release { id: 4 }).is_empty());
    assert_eq!(step(&mut s, Event::Reclaim { id: 1 }), [Command::Resume { id: 1 }]);
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [3]);
    // What runs on lent CPUs ends, and does not count.
    let mut s = machines(&[Amounts::cpus(2 * UNIT)]);
    submit(&mut s, 1, cpus(1));
    step(&mut s, Event::Lend { id: 1 });
    submit(&mut s, 2, cpus(1));
    assert_eq!(started(&submit(&mut s, 3, lasting(1))), [3]);
}

#[test]
fn a_holder_that_ends_while_its_cpus_are_lent_gives_back_the_rest_only() {
    let mut s = machines(&[gpus(1, 1)]);
    submit(&mut s, 1, shape(&[gpus(1, 1)], PlacementStrategy::Pack));
    step(&mut s, Event::Lend { id: 1 });
    submit(&mut s, 2, cpus(1));
    step(&mut s, Event::Reclaim { id: 1 });
    step(&mut s, Event::Release { id: 1 });
    assert_eq!(s.free(), gpus(0, 1));
    step(&mut s, Event::Release { id: 2 });
    assert_eq!(s.free(), gpus(1, 1));
}

#[test]
fn three_times_two_thirds_are_two() {
    let machine = || machines(&[(&Resources::cpus(2.0)).into()]);
    let thirds = |n| vec![(&Resources::cpus(2.0 / 3.0)).into(); n];
    let place = |n| submit(&mut machine(), 1, shape(&thirds(n), PlacementStrategy::Pack));
    assert_eq!(nodes(&place(3)), [0, 0, 0]);
    assert!(started(&place(4)).is_empty());
    assert_eq!(
        Amounts::from(&Resources::cpus(1e-9)),
        Amounts::cpus(1),
        "something, however little"
    );
}

#[test]
fn gpus_are_handed_out_one_by_one() {
    let mut s = machines(&[gpus(8, 2)]);
    let half = [Amounts { gpus: UNIT / 2, ..Amounts::default() }];
    let chosen = |commands: Vec<Command>| match &commands[..] {
        [Command::Start { grants, .. }] => grants[0].gpus.clone(),
        other => panic!("expected one start, got {other:?}"),
    };
    assert_eq!(chosen(submit(&mut s, 1, shape(&half, PlacementStrategy::Pack))), [0]);
    assert_eq!(chosen(submit(&mut s, 2, shape(&[gpus(1, 1)], PlacementStrategy::Pack))), [1]);
    assert_eq!(chosen(submit(&mut s, 3, shape(&half, PlacementStrategy::Pack))), [0]);
    step(&mut s, Event::Release { id: 1 });
    // A half is free on GPU 0, but no whole one.
    assert!(submit(&mut s, 4, shape(&[gpus(0, 1)], PlacementStrategy::Pack)).is_empty());
    assert_eq!(started(&step(&mut s, Event::Release { id: 2 })), [4]);
}

#[test]
fn strategies_lay_bundles_out() {
    let three = || machines(&[gpus(2, 0), gpus(2, 0), gpus(2, 0)]);
    let bundles = [Amounts::cpus(UNIT), Amounts::cpus(UNIT)];
    let place = |strategy| nodes(&submit(&mut three(), 1, shape(&bundles, strategy)));
    assert_eq!(place(PlacementStrategy::Pack), [0, 0]);
    assert_eq!(place(PlacementStrategy::StrictPack), [0, 0]);
    assert_eq!(place(PlacementStrategy::Spread), [0, 1]);
    assert_eq!(place(PlacementStrategy::StrictSpread), [0, 1]);
    let four = vec![Amounts::cpus(UNIT); 4];
    assert_eq!(
        nodes(&submit(&mut three(), 1, shape(&four, PlacementStrategy::Pack))),
        [0, 0, 1, 1]
    );
    assert_eq!(
        nodes(&submit(&mut three(), 1, shape(&four, PlacementStrategy::Spread))),
        [0, 1, 2, 0]
    );
    for strict in [PlacementStrategy::StrictPack, PlacementStrategy::StrictSpread] {
        let refused = submit(&mut three(), 1, shape(&four, strict));
        assert_eq!(refused, [Command::Refuse { id: 1, refusal: Refusal::NeverFits }]);
    }
}

#[test]
fn two_gangs_never_hold_half_of_each_other() {
    let mut s = machines(&[Amounts::cpus(2 * UNIT), Amounts::cpus(2 * UNIT)]);
    let gang = || shape(&vec![Amounts::cpus(UNIT); 3], PlacementStrategy::Pack);
    assert_eq!(started(&submit(&mut s, 1, gang())), [1]);
    assert!(submit(&mut s, 2, gang()).is_empty());
    assert_eq!(s.free().cpus, UNIT, "all or nothing");
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [2]);
}

#[test]
fn a_gang_keeps_what_it_has_elsewhere_when_it_loses_a_node() {
    let mut s = machines(&[Amounts::cpus(UNIT), Amounts::cpus(UNIT)]);
    let gang = shape(&vec![Amounts::cpus(UNIT); 2], PlacementStrategy::StrictSpread);
    submit(&mut s, 1, gang);
    submit(&mut s, 2, cpus(1));
    assert_eq!(step(&mut s, Event::NodeLost { node: NodeId(1) }), []);
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [2]);
}

#[test]
fn who_loses_all_its_nodes_is_told() {
    let mut s = machines(&[Amounts::cpus(UNIT), Amounts::cpus(UNIT)]);
    let gang = shape(&vec![Amounts::cpus(UNIT); 2], PlacementStrategy::StrictSpread);
    submit(&mut s, 1, gang);
    assert_eq!(step(&mut s, Event::NodeLost { node: NodeId(0) }), []);
    let after = step(&mut s, Event::NodeLost { node: NodeId(1) });
    assert_eq!(after, [Command::Lost { id: 1 }]);
}

#[test]
fn members_of_a_gang_lend_one_by_one() {
    let mut s = machines(&[Amounts::cpus(2 * UNIT)]);
    let gang = shape(&vec![Amounts::cpus(UNIT); 2], PlacementStrategy::Pack);
    let Command::Start { grants, .. } = submit(&mut s, 1, gang).remove(0) else { panic!("fits") };
    let into = [2, 3].into_iter().zip(grants).collect();
    assert_eq!(step(&mut s, Event::Split { id: 1, into }), []);
    submit(&mut s, 4, cpus(1));
    submit(&mut s, 5, cpus(1));
    assert_eq!(started(&step(&mut s, Event::Lend { id: 2 })), [4]);
    assert_eq!(started(&step(&mut s, Event::Release { id: 3 })), [5]);
    step(&mut s, Event::Release { id: 4 });
    assert_eq!(step(&mut s, Event::Reclaim { id: 2 }), [Command::Resume { id: 2 }]);
    assert_eq!(step(&mut s, Event::Release { id: 1 }), [], "the gang itself holds nothing");
}

#[test]
fn bundles_are_only_for_those_who_name_them() {
    let mut s = machines(&[Amounts::cpus(UNIT)]);
    submit(&mut s, 1, cpus(1));
    let bundle = NodeId::bundle(0);
    step(&mut s, Event::NodeJoined { node: bundle, total: Amounts::cpus(UNIT) });
    assert!(submit(&mut s, 2, cpus(1)).is_empty());
    let inside = Shape { node: Some(bundle), ..cpus(1) };
    assert_eq!(nodes(&submit(&mut s, 3, inside)), [bundle.0]);
    assert_eq!(s.total(), Amounts::cpus(UNIT), "a bundle is a piece of its machine");
}

#[test]
fn joining_passes_nobody_who_came_earlier() {
    let pooled = |n| Shape { is_pooled: true, ..cpus(n) };
    let mut s = machines(&[Amounts::cpus(UNIT)]);
    for id in 1..=3 {
        submit(&mut s, id, pooled(1));
    }
    let joined = step(&mut s, Event::Join { holder: 1, max: 1 });
    assert_eq!(joined, [Command::Joined { holder: 1, ids: vec![2] }]);
    submit(&mut s, 4, shape(&[Amounts::cpus(UNIT / 2)], PlacementStrategy::Pack));
    submit(&mut s, 5, pooled(1));
    let joined = step(&mut s, Event::Join { holder: 1, max: 9 });
    assert_eq!(joined, [Command::Joined { holder: 1, ids: vec![3] }], "4 came before 5");
    step(&mut s, Event::Return { id: 2, shape: pooled(1) });
    assert_eq!(started(&step(&mut s, Event::Release { id: 1 })), [2], "it goes first again");
}

#[derive(Clone, Debug)]
enum Act {
    Submit { bundles: Vec<(i64, i64)>, strategy: PlacementStrategy, kind: u8 },
    Cancel(usize),
    Release(usize),
    Lend(usize),
    Reclaim(usize),
    Join(usize, usize),
    Split(usize),
    LoseNode(u64),
    AddNode,
}

fn act() -> impl Strategy<Value = Act> {
    let strategy = prop::sample::select(vec![
        PlacementStrategy::Pack,
        PlacementStrategy::Spread,
        PlacementStrategy::StrictPack,
        PlacementStrategy::StrictSpread,
    ]);
    let bundles = prop::collection::vec((0i64..=3 * UNIT, 0i64..=2), 1..4);
    prop_oneof![
        6 => (bundles, strategy, 0u8..3).prop_map(|(bundles, strategy, kind)| {
            Act::Submit { bundles, strategy, kind }
        }),
        1 => (0usize..64).prop_map(Act::Cancel),
        6 => (0usize..64).prop_map(Act::Release),
        2 => (0usize..64).prop_map(Act::Lend),
        2 => (0usize..64).prop_map(Act::Reclaim),
        1 => ((0usize..64), (1usize..4)).prop_map(|(holder, max)| Act::Join(holder, max)),
        1 => (0usize..64).prop_map(Act::Split),
        1 => (0u64..6).prop_map(Act::LoseNode),
        1 => Just(Act::AddNode),
    ]
}

/// A scheduler and what a runtime would know of it.
#[derive(Default)]
struct Life {
    scheduler: Scheduler,
    next: Id,
    next_node: u64,
    waiting: Vec<Id>,
    held: Vec<Id>,
    joined: Vec<(Id, Id)>,
    ended: Vec<Id>,
}

impl Life {
    fn act(&mut self, act: Act) {
        let event = match act {
            Act::Submit { bundles, strategy, kind } => {
                let (is_pooled, is_lasting) = (kind == 1, kind == 2);
                self.next += 1;
                self.waiting.push(self.next);
                let amounts = |(cpus, n): (i64, i64)| Amounts { cpus, ..gpus(0, n) };
                let bundles = bundles.into_iter().map(amounts).collect();
                Event::Submit {
                    id: self.next,
                    shape: Shape { bundles, strategy, node: None, is_pooled, is_lasting },
                }
            }
            Act::Cancel(n) if !self.waiting.is_empty() => {
                let id = self.waiting.remove(n % self.waiting.len());
                self.ended.push(id);
                Event::Cancel { id }
            }
            Act::Release(n) if !self.held.is_empty() => self.release(n),
            Act::Lend(n) if !self.held.is_empty() => {
                Event::Lend { id: self.held[n % self.held.len()] }
            }
            Act::Reclaim(n) if !self.held.is_empty() => {
                Event::Reclaim { id: self.held[n % self.held.len()] }
            }
            Act::Join(n, max) if !self.held.is_empty() => {
                Event::Join { holder: self.held[n % self.held.len()], max }
            }
            Act::Split(n) if !self.held.is_empty() => self.split(n),
            Act::LoseNode(node) => Event::NodeLost { node: NodeId(node) },
            Act::AddNode => {
                self.next_node += 1;
                Event::NodeJoined { node: NodeId(self.next_node), total: gpus(3, 2) }
            }
            _ => return,
        };
        let commands = step(&mut self.scheduler, event);
        commands.into_iter().for_each(|command| self.learn(command));
        self.check();
    }

    /// Who had joined is of no interest here: gangs share nothing.
    fn split(&mut self, n: usize) -> Event {
        let id = self.held[n % self.held.len()];
        let grants = self.scheduler.held[&id].grants.clone();
        if grants.len() < 2 {
            return Event::Cancel { id: 0 };
        }
        self.held.retain(|held| *held != id);
        self.ended.push(id);
        let into: Vec<(Id, Grant)> = (self.next + 1..).zip(grants).collect();
        self.next += into.len() as u64;
        self.held.extend(into.iter().map(|(id, _)| *id));
        Event::Split { id, into }
    }

    fn release(&mut self, n: usize) -> Event {
        let id = self.held.remove(n % self.held.len());
        self.ended.push(id);
        let shared: Vec<Id> = self.joined.iter().filter(|j| j.0 == id).map(|j| j.1).collect();
        self.ended.extend(shared);
        self.joined.retain(|joined| joined.0 != id);
        Event::Release { id }
    }

    fn learn(&mut self, command: Command) {
        match command {
            Command::Start { id, .. } => {
                self.no_longer_waiting(id);
                self.held.push(id);
            }
            Command::Refuse { id, .. } => {
                self.no_longer_waiting(id);
                self.ended.push(id);
            }
            Command::Joined { holder, ids } => ids.into_iter().for_each(|id| {
                self.no_longer_waiting(id);
                self.joined.push((holder, id));
            }),
            Command::Lost { id } => {
                self.held.retain(|held| *held != id);
                self.joined.retain(|joined| joined.0 != id);
                self.ended.push(id);
            }
            Command::Resume { id } => assert!(self.held.contains(&id), "{id} resumes"),
        }
    }

    fn no_longer_waiting(&mut self, id: Id) {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| *waiting != id);
        assert_eq!(self.waiting.len() + 1, before, "{id} was started, refused or joined twice");
    }

    /// INV-LEDGER: on each node, free and held amounts add up to the total; none is negative.
    fn check(&self) {
        let s = &self.scheduler;
        for node in &s.nodes {
            let mut sum = node.free.amounts.clone();
            assert!(!sum.is_negative(), "{node:?}");
            for held in s.held.values() {
                for grant in held.grants.iter().filter(|grant| grant.node == node.id) {
                    let lent = held.cpus != Cpus::Held;
                    let cpus = if lent { 0 } else { grant.amounts.cpus };
                    sum.add(&Amounts { cpus, ..grant.amounts.clone() });
                }
            }
            assert_eq!(sum, node.total, "{node:?}");
        }
        assert_eq!(s.waiting(), self.waiting.len(), "nobody is forgotten");
        assert_eq!(s.held.len(), self.held.len());
    }

    /// INV-PROGRESS: when everyone who holds something lets go, everyone who can run has run.
    fn drain(&mut self) {
        while !self.held.is_empty() {
            self.act(Act::Release(0));
        }
        let nodes_that_could = |id: &Id| {
            let queue = self.scheduler.waiting[id];
            self.scheduler.fits_when_all_is_free(&self.scheduler.queues[queue].shape)
        };
        let stuck: Vec<&Id> = self.waiting.iter().filter(|id| nodes_that_could(id)).collect();
        assert!(stuck.is_empty(), "{stuck:?} could run and does not");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn a_long_life_loses_nothing_and_always_goes_on(acts in prop::collection::vec(act(), 1..200)) {
        let mut life = Life::default();
        life.act(Act::AddNode);
        acts.into_iter().for_each(|act| life.act(act));
        life.drain();
    }
}
