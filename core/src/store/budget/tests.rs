use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

fn id(n: u64) -> ObjectId {
    ObjectId(n)
}

/// A new object whose writer has finished.
fn put(budget: &mut Budget, n: u64, bytes: u64) -> Vec<Command> {
    let asked = Event::Insert { id: id(n), bytes, pinned: false, adopted: false };
    let mut commands = budget.step(asked);
    if commands.contains(&Command::Admit(id(n))) {
        commands.extend(budget.step(Event::EndUse(id(n))));
    }
    commands
}

#[test]
fn the_least_recently_used_makes_room() {
    let mut budget = Budget::new(30);
    for n in 1..=3 {
        assert_eq!(put(&mut budget, n, 10), [Command::Admit(id(n))]);
    }
    budget.step(Event::Use(id(1)));
    budget.step(Event::EndUse(id(1)));
    assert_eq!(put(&mut budget, 4, 10), [Command::Spill(id(2))]);
    assert_eq!(budget.used(), 30);
    let freed = budget.step(Event::SpillDone(id(2)));
    assert_eq!(freed, [Command::Free(id(2)), Command::Admit(id(4))]);
    assert_eq!((budget.used(), budget.spilled()), (30, 10));
}

#[test]
fn what_is_spilled_is_read_back_when_used_and_dropped_when_released() {
    let mut budget = Budget::new(10);
    put(&mut budget, 1, 10);
    put(&mut budget, 2, 10);
    budget.step(Event::SpillDone(id(1)));
    // The writer of 2 still uses it: there is no room, and none can be made.
    assert_eq!(budget.step(Event::Use(id(1))), [Command::Load(id(1))]);
    assert_eq!(budget.used(), 20);
    // As soon as the writer is done, the excess goes.
    assert_eq!(budget.step(Event::EndUse(id(2))), [Command::Spill(id(2))]);
    assert!(budget.step(Event::LoadDone(id(1))).is_empty());
    assert_eq!(budget.step(Event::SpillDone(id(2))), [Command::Free(id(2))]);
    assert_eq!(budget.step(Event::Release(id(2))), [Command::Drop(id(2))]);
    assert!(budget.step(Event::Release(id(1))).is_empty(), "still in use");
    assert_eq!(budget.step(Event::EndUse(id(1))), [Command::Drop(id(1))]);
    assert_eq!((budget.used(), budget.objects()), (0, 0));
}

#[test]
fn what_cannot_fit_is_refused_with_the_numbers() {
    let mut budget = Budget::new(10);
    let refused = |n, needed| vec![Command::Refuse { id: id(n), needed, budget: 10 }];
    assert_eq!(put(&mut budget, 1, 11), refused(1, 11));
    budget.step(Event::Insert { id: id(2), bytes: 10, pinned: true, adopted: false });
    budget.step(Event::EndUse(id(2)));
    assert_eq!(put(&mut budget, 3, 1), refused(3, 1));
    assert_eq!(budget.objects(), 1);
}

#[test]
fn a_full_disk_refuses_and_is_tried_again() {
    let mut budget = Budget::new(10);
    put(&mut budget, 1, 10);
    assert_eq!(put(&mut budget, 2, 10), [Command::Spill(id(1))]);
    let failed = budget.step(Event::SpillFailed(id(1)));
    assert_eq!(failed, [Command::Refuse { id: id(2), needed: 10, budget: 10 }]);
    assert_eq!(put(&mut budget, 3, 10), [Command::Spill(id(1))]);
}

#[test]
fn what_arrives_in_memory_is_let_in_and_pushes_others_out() {
    let mut budget = Budget::new(10);
    put(&mut budget, 1, 10);
    let arrived = Event::Insert { id: id(2), bytes: 10, pinned: false, adopted: true };
    assert_eq!(budget.step(arrived), [Command::Spill(id(1))]);
    assert_eq!(budget.used(), 20);
    budget.step(Event::SpillDone(id(1)));
    assert_eq!(budget.used(), 10);
}

#[derive(Clone, Debug)]
enum Action {
    Insert { bytes: u64, pinned: bool, adopted: bool },
    Release(usize),
    Use(usize),
    EndUse(usize),
    FinishSpill { which: usize, ok: bool },
    FinishLoad { which: usize, ok: bool },
    Lose(usize),
}

fn action() -> impl Strategy<Value = Action> {
    let any = 0..usize::MAX;
    prop_oneof![
        4 => (0..60u64, prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(bytes, pinned, adopted)| Action::Insert { bytes, pinned, adopted }),
        4 => any.clone().prop_map(Action::Release),
        4 => any.clone().prop_map(Action::Use),
        6 => any.clone().prop_map(Action::EndUse),
        5 => (any.clone(), prop::bool::weighted(0.9))
            .prop_map(|(which, ok)| Action::FinishSpill { which, ok }),
        3 => (any.clone(), prop::bool::weighted(0.9))
            .prop_map(|(which, ok)| Action::FinishLoad { which, ok }),
        1 => any.prop_map(Action::Lose),
    ]
}

#[derive(Debug, Default)]
struct Thing {
    bytes: u64,
    pinned: bool,
    references: u32,
    uses: u32,
    in_memory: bool,
    has_file: bool,
    /// Failed to spill since the last insertion.
    stuck: bool,
}

/// A store that only keeps books, and checks what it is told to do.
struct World {
    budget: Budget,
    things: HashMap<ObjectId, Thing>,
    spilling: Vec<ObjectId>,
    loading: Vec<ObjectId>,
    asked: HashSet<ObjectId>,
    next: u64,
}

const LIMIT: u64 = 100;

impl World {
    fn new() -> Self {
        Self {
            budget: Budget::new(LIMIT),
            things: HashMap::new(),
            spilling: Vec::new(),
            loading: Vec::new(),
            asked: HashSet::new(),
            next: 0,
        }
    }

    fn pick(&self, which: usize, of: impl Fn(&Thing) -> bool) -> Option<ObjectId> {
        let mut ids: Vec<_> =
            self.things.iter().filter(|(_, thing)| of(thing)).map(|(id, _)| *id).collect();
        ids.sort();
        (!ids.is_empty()).then(|| ids[which % ids.len()])
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Insert { bytes, pinned, adopted } => {
                self.next += 1;
                let id = id(self.next);
                self.things.values_mut().for_each(|thing| thing.stuck = false);
                let new = Thing { bytes, pinned, references: 1, uses: 1, ..Thing::default() };
                self.things.insert(id, Thing { in_memory: adopted, ..new });
                if !adopted {
                    self.asked.insert(id);
                }
                self.step(Event::Insert { id, bytes, pinned, adopted });
            }
            Action::Release(which) => {
                if let Some(id) = self.pick(which, |thing| thing.references > 0) {
                    self.thing(id).references -= 1;
                    self.step(Event::Release(id));
                }
            }
            Action::Use(which) => {
                if let Some(id) = self.pick(which, |thing| thing.references > 0) {
                    self.thing(id).uses += 1;
                    self.step(Event::Use(id));
                }
            }
            Action::EndUse(which) => {
                if let Some(id) = self.pick(which, |thing| thing.uses > 0)
                    && !self.asked.contains(&id)
                {
                    self.thing(id).uses -= 1;
                    self.step(Event::EndUse(id));
                }
            }
            Action::FinishSpill { which, ok } if !self.spilling.is_empty() => {
                let id = self.spilling.remove(which % self.spilling.len());
                if let Some(thing) = self.things.get_mut(&id) {
                    thing.has_file |= ok;
                    thing.stuck |= !ok;
                }
                self.step(if ok { Event::SpillDone(id) } else { Event::SpillFailed(id) });
            }
            Action::FinishLoad { which, ok } if !self.loading.is_empty() => {
                let id = self.loading.remove(which % self.loading.len());
                if !ok {
                    self.lose(id);
                } else {
                    self.step(Event::LoadDone(id));
                }
            }
            Action::Lose(which) => {
                if let Some(id) = self.pick(which, |_| true) {
                    self.lose(id);
                }
            }
            _ => {}
        }
    }

    fn lose(&mut self, id: ObjectId) {
        if let Some(thing) = self.things.get_mut(&id) {
            (thing.references, thing.uses) = (0, 0);
        }
        self.spilling.retain(|other| *other != id);
        self.loading.retain(|other| *other != id);
        self.step(Event::Lost(id));
    }

    fn thing(&mut self, id: ObjectId) -> &mut Thing {
        self.things.get_mut(&id).expect("commands name objects that exist")
    }

    fn step(&mut self, event: Event) {
        for command in self.budget.step(event) {
            self.perform(command);
        }
        self.check();
    }

    fn perform(&mut self, command: Command) {
        match command {
            Command::Admit(id) => {
                assert!(self.asked.remove(&id), "admitted once");
                self.thing(id).in_memory = true;
            }
            Command::Refuse { id, needed, budget } => {
                assert!(self.asked.remove(&id));
                let thing = self.things.remove(&id).expect("refused once");
                assert_eq!((needed, budget), (thing.bytes, LIMIT));
            }
            Command::Spill(id) => {
                let thing = self.thing(id);
                // B-3
                assert!(thing.in_memory && !thing.pinned && thing.uses == 0 && !thing.stuck);
                self.spilling.push(id);
            }
            Command::Free(id) => {
                let thing = self.thing(id);
                // B-3
                assert!(thing.in_memory && thing.has_file && thing.uses == 0);
                thing.in_memory = false;
            }
            Command::Load(id) => {
                let thing = self.thing(id);
                assert!(!thing.in_memory && thing.has_file && thing.uses > 0);
                thing.in_memory = true;
                self.loading.push(id);
            }
            Command::Drop(id) => {
                let thing = self.things.remove(&id).expect("dropped once");
                // B-3
                assert!(thing.references == 0 && thing.uses == 0, "{thing:?}");
                assert!(!self.spilling.contains(&id) && !self.loading.contains(&id));
                self.asked.remove(&id);
            }
        }
    }

    fn check(&self) {
        let held = self.things.values().filter(|thing| thing.in_memory);
        // B-1
        assert_eq!(self.budget.used(), held.map(|thing| thing.bytes).sum::<u64>());
        assert_eq!(self.budget.objects(), self.things.len());
        let away = |(id, thing): &(&ObjectId, &Thing)| !thing.in_memory && !self.asked.contains(id);
        let spilled = self.things.iter().filter(away).map(|(_, thing)| thing.bytes);
        assert_eq!(self.budget.spilled(), spilled.sum::<u64>());
        // B-2
        let is_going = |id: &ObjectId| self.spilling.contains(id);
        let leaving: u64 = self
            .spilling
            .iter()
            .map(|id| &self.things[id])
            .filter(|thing| thing.uses == 0)
            .map(|thing| thing.bytes)
            .sum();
        let idle = self.things.iter().any(|(id, thing)| {
            let can_go = thing.in_memory && thing.uses == 0 && !thing.pinned && !thing.stuck;
            can_go && !is_going(id) && !self.loading.contains(id)
        });
        assert!(self.budget.used() - leaving <= LIMIT || !idle, "over budget, and does nothing");
        // B-4
        let wanted = self
            .things
            .iter()
            .any(|(id, thing)| thing.uses > 0 && !thing.in_memory && !self.asked.contains(id));
        assert!(!wanted && self.asked.is_empty() || leaving > 0, "waits for nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn books_balance_over_any_history(actions in prop::collection::vec(action(), 1..200)) {
        let mut world = World::new();
        for action in &actions {
            world.act(action);
        }
        // Everybody finishes: everything goes.
        while let Some(next) = finish(&world) {
            world.act(&next);
        }
        prop_assert_eq!((world.budget.objects(), world.budget.used()), (0, 0));
        prop_assert!(world.things.is_empty() && world.budget.idle.is_empty());
    }
}

fn finish(world: &World) -> Option<Action> {
    let any = |of: fn(&Thing) -> bool| world.things.values().any(of);
    let in_use = world.things.iter().any(|(id, t)| t.uses > 0 && !world.asked.contains(id));
    match () {
        () if !world.spilling.is_empty() => Some(Action::FinishSpill { which: 0, ok: true }),
        () if !world.loading.is_empty() => Some(Action::FinishLoad { which: 0, ok: true }),
        () if in_use => Some(Action::EndUse(0)),
        () if any(|thing| thing.references > 0) => Some(Action::Release(0)),
        () => None,
    }
}
