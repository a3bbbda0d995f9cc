//! Who runs next, and where: a pure state machine. Events go in, commands come out; the runtime
//! performs them and decides nothing.
//!
//! Requests of the same shape wait in one queue, first come, first served. Between the queues the
//! oldest head goes first, and what it cannot have yet is *reserved* for it: a younger request may
//! pass only with what the older one does not ask for. So a large request is never starved by
//! small ones, and one that waits for a GPU holds up nobody who needs none.

mod amounts;
mod ids;
mod node;

pub(crate) use amounts::Amounts;
pub(crate) use ids::IdMap;
pub(crate) use node::{Grant, NodeId};

use node::Free;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// A request, unique in its runtime.
pub(crate) type Id = u64;

/// How a request of several bundles is laid out over the nodes; Ray's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PlacementStrategy {
    /// On as few nodes as possible. The default.
    #[default]
    Pack,
    /// Over as many nodes as possible.
    Spread,
    /// All on one node, or not at all.
    StrictPack,
    /// Each on a node of its own, or not at all.
    StrictSpread,
}

/// What a request asks for: bundles that are granted together, all or none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) bundles: Vec<Amounts>,
    pub(crate) strategy: PlacementStrategy,
    /// Whether it may share the grant of another one: those have queues of their own.
    pub(crate) is_pooled: bool,
    /// The only node that will do: a bundle of a placement group, or an affinity.
    pub(crate) node: Option<NodeId>,
    /// Whether it keeps what it gets, as an actor does, rather than end by itself: it leaves as many
    /// CPUs as others have lent, who might never have them back otherwise.
    pub(crate) is_lasting: bool,
}

#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A new request; its id was never used before.
    Submit { id: Id, shape: Shape },
    /// The request is not wanted any more. Nothing happens if it has been granted.
    Cancel { id: Id },
    /// The grant is given back.
    Release { id: Id },
    /// A gang's grants become those of its members: each can lend its own.
    Split { id: Id, into: Vec<(Id, Grant)> },
    /// The holder waits for other work: its CPUs are free for that work meanwhile.
    Lend { id: Id },
    /// The holder wants its CPUs back, before anyone who waits.
    Reclaim { id: Id },
    /// Up to `max` waiting requests of the holder's shape may share its grant, one after another.
    Join { holder: Id, max: usize },
    /// A request that had joined goes back to the head of its queue.
    Return { id: Id, shape: Shape },
    /// There is a new node.
    NodeJoined { node: NodeId, total: Amounts },
    /// The node is gone, and what was granted there with it; a gang keeps what it has elsewhere.
    NodeLost { node: NodeId },
    /// No more grants.
    Close,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// The request is granted, one grant a bundle.
    Start { id: Id, grants: Vec<Grant> },
    /// The holder has its CPUs back.
    Resume { id: Id },
    /// These share the holder's grant, in this order.
    Joined { holder: Id, ids: Vec<Id> },
    /// The request can never be granted, wherever it waits.
    Refuse { id: Id, refusal: Refusal },
    /// The nodes of all that the holder had are gone.
    Lost { id: Id },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// More than all nodes together, or than any single one, could give.
    NeverFits,
    /// The only node that would do is gone.
    NodeGone,
    /// The scheduler was closed.
    Closed,
}

#[derive(Debug)]
struct Node {
    id: NodeId,
    total: Amounts,
    free: Free,
}

/// Waiting requests of one shape.
#[derive(Debug)]
struct Queue {
    shape: Arc<Shape>,
    waiting: VecDeque<(u64, Id)>,
    /// With which set of nodes the shape was last found to fit.
    fits: Option<u64>,
}

#[derive(Debug)]
struct Held {
    shape: Arc<Shape>,
    grants: Vec<Grant>,
    cpus: Cpus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cpus {
    Held,
    Lent,
    /// Lent, and wanted back.
    Wanted,
}

#[derive(Debug, Default)]
pub(crate) struct Scheduler {
    nodes: Vec<Node>,
    queues: Vec<Queue>,
    by_shape: HashMap<Arc<Shape>, usize>,
    /// The queue of the last request, which most often is that of the next one too.
    last_queue: usize,
    /// Waiting requests and their queue; who is not in here any more is skipped in the queue.
    waiting: IdMap<usize>,
    held: IdMap<Held>,
    reclaims: VecDeque<Id>,
    /// Counts the changes of the set of nodes.
    node_set: u64,
    arrivals: u64,
    /// Counts down with each request that goes back to the head of its queue.
    returns: u64,
    closed: bool,
}

impl Scheduler {
    pub(crate) fn step(&mut self, event: Event, out: &mut Vec<Command>) {
        match event {
            Event::Submit { id, shape } => self.submit(id, shape, out),
            Event::Cancel { id } => self.cancel(id, out),
            Event::Release { id } => self.release(id, out),
            Event::Split { id, into } => self.split(id, into),
            Event::Lend { id } => self.lend(id, out),
            Event::Reclaim { id } => self.reclaim(id, out),
            Event::Join { holder, max } => self.join(holder, max, out),
            Event::Return { id, shape } => self.give_back(id, shape, out),
            Event::NodeJoined { node, total } => self.add_node(node, total, out),
            Event::NodeLost { node } => self.lose_node(node, out),
            Event::Close => self.close(out),
        }
    }

    /// All that the nodes have, without the bundles that are pieces of them.
    pub(crate) fn total(&self) -> Amounts {
        self.sum(|node| &node.total)
    }

    /// All that is free now.
    pub(crate) fn free(&self) -> Amounts {
        self.sum(|node| &node.free.amounts)
    }

    /// Each machine with all that it has, and what of it is free.
    pub(crate) fn machines(&self) -> impl Iterator<Item = (NodeId, &Amounts, &Amounts)> {
        let machines = self.nodes.iter().filter(|node| node.id.is_machine());
        machines.map(|node| (node.id, &node.total, &node.free.amounts))
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn sum<'a>(&'a self, of: impl Fn(&'a Node) -> &'a Amounts) -> Amounts {
        let mut sum = Amounts::default();
        self.nodes.iter().filter(|node| node.id.is_machine()).for_each(|node| sum.add(of(node)));
        sum
    }

    fn submit(&mut self, id: Id, shape: Shape, out: &mut Vec<Command>) {
        if self.closed {
            return out.push(Command::Refuse { id, refusal: Refusal::Closed });
        }
        let queue = self.queue_of(shape);
        if !self.could_ever_fit(queue) {
            let named = self.queues[queue].shape.node;
            let is_gone = named.is_some_and(|node| self.nodes.iter().all(|n| n.id != node));
            let refusal = if is_gone { Refusal::NodeGone } else { Refusal::NeverFits };
            return out.push(Command::Refuse { id, refusal });
        }
        self.arrivals += 1;
        self.waiting.insert(id, queue);
        let waiting = &mut self.queues[queue].waiting;
        waiting.push_back((RETURNS + self.arrivals, id));
        // Behind others of its shape it cannot start before they do.
        if waiting.len() == 1 {
            self.dispatch(out);
        }
    }

    fn cancel(&mut self, id: Id, out: &mut Vec<Command>) {
        // What it had reserved as the head of its queue is free for others.
        if self.waiting.remove(&id).is_some() {
            self.dispatch(out);
        }
    }

    fn release(&mut self, id: Id, out: &mut Vec<Command>) {
        self.forget(id);
        self.dispatch(out);
    }

    /// Takes back what is granted.
    fn forget(&mut self, id: Id) {
        let Some(held) = self.held.remove(&id) else { return };
        if held.cpus == Cpus::Wanted {
            self.reclaims.retain(|wanted| *wanted != id);
        }
        for mut grant in held.grants {
            if held.cpus != Cpus::Held {
                grant.amounts.cpus = 0;
            }
            self.give_to_node(&grant);
        }
    }

    fn split(&mut self, id: Id, into: Vec<(Id, Grant)>) {
        let Some(mut held) = self.held.remove(&id) else { return };
        for (id, grant) in into {
            // What was on a lost node is not there any more.
            let Some(at) = held.grants.iter().position(|other| *other == grant) else { continue };
            held.grants.swap_remove(at);
            let shape = Arc::clone(&held.shape);
            self.held.insert(id, Held { shape, grants: vec![grant], cpus: held.cpus });
        }
    }

    fn lend(&mut self, id: Id, out: &mut Vec<Command>) {
        let Some(held) = self.held.get_mut(&id).filter(|held| held.cpus == Cpus::Held) else {
            return;
        };
        held.cpus = Cpus::Lent;
        let lent: Vec<Grant> = held.grants.iter().map(cpus_of).collect();
        lent.iter().for_each(|grant| self.give_to_node(grant));
        self.dispatch(out);
    }

    fn reclaim(&mut self, id: Id, out: &mut Vec<Command>) {
        let Some(held) = self.held.get_mut(&id) else {
            // Its node was lost while it waited for other work.
            return out.push(Command::Lost { id });
        };
        if held.cpus != Cpus::Lent {
            return;
        }
        held.cpus = Cpus::Wanted;
        self.reclaims.push_back(id);
        self.dispatch(out);
    }

    fn join(&mut self, holder: Id, max: usize, out: &mut Vec<Command>) {
        let may_share = |held: &&Held| held.cpus == Cpus::Held && held.shape.is_pooled;
        let Some(held) = self.held.get(&holder).filter(may_share) else { return };
        let Some(&queue) = self.by_shape.get(&held.shape) else { return };
        let ids: Vec<Id> = (0..max).map_while(|_| self.pop_if_oldest(queue)).collect();
        if !ids.is_empty() {
            out.push(Command::Joined { holder, ids });
        }
    }

    /// Nobody of another shape who came earlier may be passed.
    fn pop_if_oldest(&mut self, queue: usize) -> Option<Id> {
        if !self.reclaims.is_empty() || self.in_order().first() != Some(&queue) {
            return None;
        }
        self.pop(queue)
    }

    fn give_back(&mut self, id: Id, shape: Shape, out: &mut Vec<Command>) {
        if self.closed {
            return out.push(Command::Refuse { id, refusal: Refusal::Closed });
        }
        self.returns += 1;
        let queue = self.queue_of(shape);
        self.waiting.insert(id, queue);
        self.queues[queue].waiting.push_front((RETURNS.saturating_sub(self.returns), id));
        self.dispatch(out);
    }

    fn add_node(&mut self, id: NodeId, total: Amounts, out: &mut Vec<Command>) {
        self.nodes.push(Node { id, free: Free::all(&total), total });
        self.node_set += 1;
        self.dispatch(out);
    }

    fn lose_node(&mut self, node: NodeId, out: &mut Vec<Command>) {
        self.nodes.retain(|n| n.id != node);
        self.node_set += 1;
        self.refuse_who_waits_for(node, out);
        let mut lost = Vec::new();
        for (id, held) in &mut self.held {
            let before = held.grants.len();
            // What a gang holds on other nodes stays its own: its members there go on.
            held.grants.retain(|grant| grant.node != node);
            if held.grants.is_empty() && before > 0 {
                lost.push(*id);
            }
        }
        lost.sort_unstable();
        out.extend(lost.iter().map(|id| Command::Lost { id: *id }));
        lost.iter().for_each(|id| self.forget(*id));
        self.dispatch(out);
    }

    fn refuse_who_waits_for(&mut self, node: NodeId, out: &mut Vec<Command>) {
        let only_there = |queue: &&mut Queue| queue.shape.node == Some(node);
        for queue in self.queues.iter_mut().filter(only_there) {
            for (_, id) in queue.waiting.drain(..) {
                if self.waiting.remove(&id).is_some() {
                    out.push(Command::Refuse { id, refusal: Refusal::NodeGone });
                }
            }
        }
    }

    fn close(&mut self, out: &mut Vec<Command>) {
        self.closed = true;
        let mut ids: Vec<Id> = self.waiting.drain().map(|(id, _)| id).collect();
        ids.sort_unstable();
        self.queues.clear();
        self.by_shape.clear();
        out.extend(ids.into_iter().map(|id| Command::Refuse { id, refusal: Refusal::Closed }));
    }

    fn queue_of(&mut self, shape: Shape) -> usize {
        if self.queues.get(self.last_queue).is_none_or(|queue| *queue.shape != shape) {
            self.last_queue = self.find_queue(shape);
        }
        self.last_queue
    }

    fn find_queue(&mut self, shape: Shape) -> usize {
        if let Some(&queue) = self.by_shape.get(&shape) {
            return queue;
        }
        self.forget_empty_queues();
        let shape = Arc::new(shape);
        self.by_shape.insert(Arc::clone(&shape), self.queues.len());
        self.queues.push(Queue { shape, waiting: VecDeque::new(), fits: None });
        self.queues.len() - 1
    }

    /// Shapes come again, so their queues stay for a while.
    fn forget_empty_queues(&mut self) {
        if self.queues.len() < MANY_QUEUES {
            return;
        }
        self.queues.retain(|queue| !queue.waiting.is_empty());
        self.by_shape.clear();
        for (index, queue) in self.queues.iter().enumerate() {
            self.by_shape.insert(queue.shape.clone(), index);
            queue.waiting.iter().for_each(|(_, id)| {
                if let Some(place) = self.waiting.get_mut(id) {
                    *place = index;
                }
            });
        }
    }

    /// Grants whatever can be granted now.
    fn dispatch(&mut self, out: &mut Vec<Command>) {
        if let Some(queue) = self.only_simple_queue() {
            return self.serve_simple(queue, out);
        }
        let mut view: Vec<(NodeId, Free)> =
            self.nodes.iter().map(|node| (node.id, node.free.clone())).collect();
        self.resume(&mut view, out);
        for queue in self.in_order() {
            self.serve(queue, &mut view, out);
        }
    }

    /// The queue that holds somebody, if it is the only one, of single bundles, on one node: what
    /// most programs have all the time.
    fn only_simple_queue(&mut self) -> Option<usize> {
        if self.nodes.len() != 1 || !self.reclaims.is_empty() {
            return None;
        }
        let mut heads = (0..self.queues.len()).filter(|queue| self.head_of(*queue).is_some());
        let only = heads.next().filter(|_| heads.next().is_none())?;
        let shape = &self.queues[only].shape;
        let anywhere = shape.node.is_none_or(|node| node == self.nodes[0].id);
        let is_simple = shape.bundles.len() == 1 && anywhere && !shape.is_lasting;
        is_simple.then_some(only)
    }

    /// [`Scheduler::serve`] where nothing can be in the way, without a trial.
    fn serve_simple(&mut self, queue: usize, out: &mut Vec<Command>) {
        let shape = Arc::clone(&self.queues[queue].shape);
        let amounts = &shape.bundles[0];
        while let Some(id) = self.head(queue)
            && let Some(gpus) = self.nodes[0].free.take(amounts)
        {
            self.take_head(queue, id);
            let grants = vec![Grant { node: self.nodes[0].id, amounts: amounts.clone(), gpus }];
            let held = Held { shape: Arc::clone(&shape), grants: grants.clone(), cpus: Cpus::Held };
            self.held.insert(id, held);
            out.push(Command::Start { id, grants });
        }
    }

    /// The oldest entry of a queue that still waits.
    fn head_of(&self, queue: usize) -> Option<Id> {
        let mut ids = self.queues[queue].waiting.iter().map(|(_, id)| *id);
        ids.find(|id| self.waiting.contains_key(id))
    }

    /// Gives CPUs back to those who lent them.
    fn resume(&mut self, view: &mut [(NodeId, Free)], out: &mut Vec<Command>) {
        for id in std::mem::take(&mut self.reclaims) {
            let Some(held) = self.held.get_mut(&id) else { continue };
            let cpus: Vec<Grant> = held.grants.iter().map(cpus_of).collect();
            let mut trial = view.to_vec();
            let all = cpus.iter().all(|grant| take_on(&mut trial, grant).is_some());
            if !all {
                cpus.iter().for_each(|grant| reserve_on(view, grant.node, &grant.amounts));
                self.reclaims.push_back(id);
                continue;
            }
            held.cpus = Cpus::Held;
            view.clone_from_slice(&trial);
            cpus.iter().for_each(|grant| self.take_from_node(grant));
            out.push(Command::Resume { id });
        }
    }

    /// Queues that hold somebody, the one with the oldest head first.
    fn in_order(&mut self) -> Vec<usize> {
        let waiting = &self.waiting;
        for queue in &mut self.queues {
            while queue.waiting.front().is_some_and(|(_, id)| !waiting.contains_key(id)) {
                queue.waiting.pop_front();
            }
        }
        let head = |queue: &usize| self.queues[*queue].waiting.front().map(|(seq, _)| *seq);
        let mut order: Vec<usize> =
            (0..self.queues.len()).filter(|queue| head(queue).is_some()).collect();
        order.sort_by_key(head);
        order
    }

    /// Grants from the head of one queue as long as the head fits, then reserves for the next.
    fn serve(&mut self, queue: usize, view: &mut Vec<(NodeId, Free)>, out: &mut Vec<Command>) {
        while self.head(queue).is_some() {
            let reach = self.reach(queue);
            let Some(grants) = place_within(reach.as_ref(), &self.queues[queue].shape, view) else {
                // What waits for a node to come holds up nobody.
                if self.could_ever_fit(queue) {
                    reserve(reach.as_ref(), &self.queues[queue].shape, view);
                }
                return;
            };
            let Some(id) = self.pop(queue) else { return };
            grants.iter().for_each(|grant| self.take_from_node(grant));
            let shape = Arc::clone(&self.queues[queue].shape);
            self.held.insert(id, Held { shape, grants: grants.clone(), cpus: Cpus::Held });
            out.push(Command::Start { id, grants });
        }
    }

    /// How many CPUs of each node those of this queue may have at most: what lasts leaves as much as
    /// others have lent, and will want back. `None`: all that are free.
    fn reach(&self, queue: usize) -> Option<HashMap<NodeId, i64>> {
        if !self.queues[queue].shape.is_lasting {
            return None;
        }
        let all = self.nodes.iter().map(|node| (node.id, node.total.cpus));
        let mut reach: HashMap<NodeId, i64> = all.collect();
        let stays = |held: &&Held| held.shape.is_lasting || held.cpus != Cpus::Held;
        for grant in self.held.values().filter(stays).flat_map(|held| &held.grants) {
            reach.entry(grant.node).and_modify(|cpus| *cpus -= grant.amounts.cpus);
        }
        Some(reach)
    }

    fn head(&mut self, queue: usize) -> Option<Id> {
        let waiting = &mut self.queues[queue].waiting;
        while waiting.front().is_some_and(|(_, id)| !self.waiting.contains_key(id)) {
            waiting.pop_front();
        }
        waiting.front().map(|(_, id)| *id)
    }

    fn pop(&mut self, queue: usize) -> Option<Id> {
        let id = self.head(queue)?;
        self.take_head(queue, id);
        Some(id)
    }

    fn take_head(&mut self, queue: usize, id: Id) {
        self.queues[queue].waiting.pop_front();
        self.waiting.remove(&id);
    }

    fn could_ever_fit(&mut self, queue: usize) -> bool {
        if self.queues[queue].fits == Some(self.node_set) {
            return true;
        }
        let fits = self.fits_when_all_is_free(&self.queues[queue].shape);
        self.queues[queue].fits = fits.then_some(self.node_set);
        fits
    }

    fn fits_when_all_is_free(&self, shape: &Shape) -> bool {
        let mut empty: Vec<(NodeId, Free)> =
            self.nodes.iter().map(|node| (node.id, Free::all(&node.total))).collect();
        place(shape, &mut empty).is_some()
    }

    fn take_from_node(&mut self, grant: &Grant) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.id == grant.node) {
            node.free.take_exactly(grant);
        }
    }

    fn give_to_node(&mut self, grant: &Grant) {
        if let Some(node) = self.nodes.iter_mut().find(|node| node.id == grant.node) {
            node.free.give_back(grant);
        }
    }
}

/// Arrivals are numbered from here upwards, returns downwards: they are older than all arrivals.
const RETURNS: u64 = u64::MAX / 2;

/// Empty queues are forgotten when there are so many.
const MANY_QUEUES: usize = 64;

fn cpus_of(grant: &Grant) -> Grant {
    let amounts = Amounts::cpus(grant.amounts.cpus);
    Grant { node: grant.node, amounts, gpus: Vec::new() }
}

/// Takes every bundle from the view within reach, or changes nothing.
fn place_within(
    reach: Option<&HashMap<NodeId, i64>>,
    shape: &Shape,
    view: &mut Vec<(NodeId, Free)>,
) -> Option<Vec<Grant>> {
    let Some(reach) = reach else { return place(shape, view) };
    let mut within = view.clone();
    for (node, free) in &mut within {
        free.amounts.cpus = cpus_within(reach, *node, free);
    }
    let grants = place(shape, &mut within)?;
    for grant in &grants {
        let there = view.iter_mut().filter(|(node, _)| *node == grant.node);
        there.for_each(|(_, free)| free.take_exactly(grant));
    }
    Some(grants)
}

fn cpus_within(reach: &HashMap<NodeId, i64>, node: NodeId, free: &Free) -> i64 {
    let most = reach.get(&node).copied().unwrap_or(i64::MAX);
    free.amounts.cpus.min(most).max(0)
}

/// Takes every bundle from the view, or changes nothing.
fn place(shape: &Shape, view: &mut Vec<(NodeId, Free)>) -> Option<Vec<Grant>> {
    if let ([bundle], None) = (&shape.bundles[..], shape.node) {
        // The common case needs no trial.
        let order = candidates(shape, view, &[]);
        return order.into_iter().find_map(|at| take_at(view, at, bundle)).map(|grant| vec![grant]);
    }
    let mut trial = view.clone();
    let mut grants: Vec<Grant> = Vec::with_capacity(shape.bundles.len());
    if shape.strategy == PlacementStrategy::StrictPack && shape.node.is_none() {
        return place_on_one(shape, view);
    }
    for bundle in &shape.bundles {
        let order = candidates(shape, &trial, &grants);
        let grant = order.into_iter().find_map(|at| take_at(&mut trial, at, bundle))?;
        grants.push(grant);
    }
    *view = trial;
    Some(grants)
}

fn place_on_one(shape: &Shape, view: &mut Vec<(NodeId, Free)>) -> Option<Vec<Grant>> {
    for at in (0..view.len()).filter(|at| view[*at].0.is_machine()) {
        let mut trial = view.clone();
        let grants: Option<Vec<Grant>> =
            shape.bundles.iter().map(|bundle| take_at(&mut trial, at, bundle)).collect();
        if let Some(grants) = grants {
            *view = trial;
            return Some(grants);
        }
    }
    None
}

/// Indices of the nodes that a next bundle may go to, the preferred one first.
fn candidates(shape: &Shape, view: &[(NodeId, Free)], so_far: &[Grant]) -> Vec<usize> {
    let used = |at: &usize| so_far.iter().filter(|grant| grant.node == view[*at].0).count();
    if let Some(node) = shape.node {
        return (0..view.len()).filter(|at| view[*at].0 == node).collect();
    }
    let mut order: Vec<usize> = (0..view.len()).filter(|at| view[*at].0.is_machine()).collect();
    match shape.strategy {
        PlacementStrategy::Pack | PlacementStrategy::StrictPack => {
            order.sort_by_key(|at| std::cmp::Reverse(used(at)))
        }
        PlacementStrategy::Spread => {
            let free = |at: &usize| std::cmp::Reverse(view[*at].1.amounts.cpus);
            order.sort_by_key(|at| (used(at), free(at)));
        }
        PlacementStrategy::StrictSpread => order.retain(|at| used(at) == 0),
    }
    order
}

fn take_at(view: &mut [(NodeId, Free)], at: usize, bundle: &Amounts) -> Option<Grant> {
    let (node, free) = &mut view[at];
    let gpus = free.take(bundle)?;
    Some(Grant { node: *node, amounts: bundle.clone(), gpus })
}

fn take_on(view: &mut [(NodeId, Free)], grant: &Grant) -> Option<Grant> {
    let at = view.iter().position(|(node, _)| *node == grant.node)?;
    take_at(view, at, &grant.amounts)
}

fn reserve_on(view: &mut [(NodeId, Free)], node: NodeId, amounts: &Amounts) {
    let there = view.iter_mut().filter(|(id, _)| *id == node);
    there.for_each(|(_, free)| free.reserve(amounts));
}

/// Keeps for a blocked request what there is of what it asks for, wherever it may be placed. What is
/// out of its reach is for others.
fn reserve(reach: Option<&HashMap<NodeId, i64>>, shape: &Shape, view: &mut [(NodeId, Free)]) {
    let may = |node: NodeId| shape.node.map_or(node.is_machine(), |only| only == node);
    for (node, free) in view.iter_mut().filter(|(node, _)| may(*node)) {
        let all = free.amounts.cpus;
        let mut within = reach.map_or(all, |reach| cpus_within(reach, *node, free));
        for bundle in &shape.bundles {
            let cpus = bundle.cpus.min(within);
            within -= cpus;
            free.reserve(&Amounts { cpus, ..bundle.clone() });
        }
    }
}

#[cfg(test)]
mod tests;
