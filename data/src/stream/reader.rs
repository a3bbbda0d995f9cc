//! The stream of one rank: the order's rows, out of a few decoded blocks, as tensors. A thread of
//! its own makes them ahead of who takes them.

use super::TensorSource;
use super::blocks::Blocks;
use super::collate::{Collation, Rows};
use super::order::{EpochOrder, GROUP_BLOCKS, Run, VERSION};
use super::values::Pick;
use crate::error::{Error, Result};
use mobula_core::{Batch, BatchStream, Shard, StreamState};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

/// A rank's place in a [`TensorSource`].
pub(super) struct Reader {
    source: TensorSource,
    shard: Shard,
    /// What makes batches, from this place on; none before the first is asked for, or after an error.
    ahead: Option<Ahead>,
    place: Place,
}

/// Where a stream stands.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    epoch: u64,
    /// Steps consumed in the epoch.
    step: u64,
}

impl Place {
    /// Behind the next step, or, where there is none, at the start of the next epoch.
    fn next(self, steps: u64) -> Self {
        match self.step == steps {
            true => Self { epoch: self.epoch + 1, step: 0 },
            false => Self { step: self.step + 1, ..self },
        }
    }
}

impl Reader {
    pub(super) fn new(source: &TensorSource, shard: Shard) -> Self {
        Self { source: source.clone(), shard, ahead: None, place: Place { epoch: 0, step: 0 } }
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        let ahead = match self.ahead.take() {
            Some(ahead) => ahead,
            None => Ahead::start(Producer::new(&self.source, self.shard, self.place)?)?,
        };
        let batch = ahead.next()?;
        self.ahead = Some(ahead);
        self.place = self.place.next(self.steps_per_epoch());
        Ok(batch)
    }
}

impl BatchStream for Reader {
    fn next_batch(&mut self) -> Result<Option<Batch>, mobula_core::Error> {
        Ok(self.next()?)
    }

    fn state(&self) -> StreamState {
        StreamState {
            manifest: self.source.manifest.clone(),
            version: VERSION,
            seed: self.source.shuffle.unwrap_or(0),
            epoch: self.place.epoch,
            step: self.place.step,
        }
    }

    fn restore(&mut self, state: &StreamState) -> Result<(), mobula_core::Error> {
        let own = self.state();
        same("order's version", &own.version, &state.version)?;
        same("seed", &own.seed, &state.seed)?;
        same("manifest (data, operations, columns, batch size)", &own.manifest, &state.manifest)?;
        if state.step > self.steps_per_epoch() {
            let steps = format!("at most {}", self.steps_per_epoch());
            return Err(mismatch("step", steps, state.step.to_string()));
        }
        let place = Place { epoch: state.epoch, step: state.step };
        if place != self.place {
            (self.ahead, self.place) = (None, place);
        }
        Ok(())
    }

    fn steps_per_epoch(&self) -> u64 {
        self.source.steps_per_epoch()
    }
}

fn same<T>(what: &'static str, own: &T, state: &T) -> Result<(), mobula_core::Error>
where
    T: PartialEq + ToString,
{
    if own == state { Ok(()) } else { Err(mismatch(what, own.to_string(), state.to_string())) }
}

fn mismatch(what: &'static str, expected: String, got: String) -> mobula_core::Error {
    mobula_core::Error::StreamMismatch { what, expected, got }
}

/// Makes batches, on the thread of whoever asks or on one of its own.
enum Ahead {
    Here(Box<std::cell::RefCell<Producer>>),
    There { made: Option<Receiver<Result<Option<Batch>>>>, thread: Option<JoinHandle<()>> },
}

impl Ahead {
    fn start(mut producer: Producer) -> Result<Self> {
        let prefetch = producer.source.prefetch;
        if prefetch == 0 {
            return Ok(Self::Here(Box::new(producer.into())));
        }
        // One more is being made, and one waits to be taken in.
        let (sender, made) = sync_channel(prefetch - 1);
        let produce = move || {
            loop {
                let made = producer.next();
                let is_last = made.is_err();
                if sender.send(made).is_err() || is_last {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("mobula-data-stream".to_owned());
        let thread = thread.spawn(produce).map_err(|error| Error::Internal(error.to_string()))?;
        Ok(Self::There { made: Some(made), thread: Some(thread) })
    }

    fn next(&self) -> Result<Option<Batch>> {
        let gone = || Error::Internal("reading data panicked".to_owned());
        match self {
            Self::Here(producer) => producer.borrow_mut().next(),
            Self::There { made, .. } => {
                made.as_ref().and_then(|made| made.recv().ok()).ok_or_else(gone)?
            }
        }
    }
}

impl Drop for Ahead {
    /// Nothing is left behind: the thread ends when it has nobody to give its next batch to.
    fn drop(&mut self) {
        if let Self::There { made, thread } = self {
            *made = None;
            let _ = thread.take().map(JoinHandle::join);
        }
    }
}

/// Goes through the order, and has the blocks read that will be needed.
struct Producer {
    source: TensorSource,
    shard: Shard,
    blocks: Blocks,
    slots: Slots,
    order: EpochOrder,
    place: Place,
    /// The step of this epoch up to which blocks are being read.
    fetched: u64,
}

impl Producer {
    fn new(source: &TensorSource, shard: Shard, place: Place) -> Result<Self> {
        let lanes = (shard.rank..source.shape.lanes).step_by(shard.world).len();
        let at_once = if source.shuffle.is_some() { lanes * (GROUP_BLOCKS + 1) } else { 2 };
        let (blocks, order) = (Blocks::new(source, at_once)?, order(source, place.epoch));
        let slots = Slots::new(source.rows.len());
        Ok(Self { source: source.clone(), shard, blocks, slots, order, place, fetched: place.step })
    }

    fn next(&mut self) -> Result<Option<Batch>> {
        let steps = self.source.steps_per_epoch();
        let (place, next) = (self.place, self.place.next(steps));
        if place.step == steps {
            self.order = order(&self.source, next.epoch);
            (self.place, self.fetched) = (next, 0);
            return Ok(None);
        }
        self.fetch(steps)?;
        let batch = self.batch(place.step)?;
        self.place = next;
        Ok(Some(batch))
    }

    fn lanes(&self) -> impl Iterator<Item = usize> + use<> {
        (self.shard.rank..self.source.shape.lanes).step_by(self.shard.world)
    }

    /// Has the blocks of this step read, and keeps as many more coming as can be read at once.
    fn fetch(&mut self, steps: u64) -> Result<()> {
        self.blocks.begin();
        self.fetch_step(self.place.step, true)?;
        self.fetched = self.fetched.max(self.place.step + 1);
        while self.fetched < steps
            && !self.blocks.enough_coming()
            && self.fetch_step(self.fetched, false)?
        {
            self.fetched += 1;
        }
        Ok(())
    }

    /// Whether there was room for all blocks of a step.
    fn fetch_step(&mut self, step: u64, is_now: bool) -> Result<bool> {
        for lane in self.lanes() {
            for block in self.order.blocks(step, lane) {
                if !self.blocks.fetch(*block, is_now)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn batch(&mut self, step: u64) -> Result<Batch> {
        let runs = self.order.step(step, self.lanes());
        // So that a row is not looked up by its block for each tensor.
        let mut blocks = Vec::with_capacity(self.blocks.len());
        let mut picks = Vec::with_capacity(runs.len());
        for Run { block, row, rows } in &runs {
            let list = self.slots.place(*block, || {
                blocks.push(self.blocks.get(*block)?);
                Ok(blocks.len() - 1)
            })?;
            picks.push(Pick { list, row: *row, rows: *rows });
        }
        self.slots.clear();
        let rows = runs.iter().map(|run| run.rows).sum();
        let tensors = self.source.layout.tensors.iter().enumerate().map(|(at, tensor)| {
            let from: Vec<_> = blocks.iter().map(|block| &block.0[at]).collect();
            Ok((tensor.name().to_owned(), tensor.gather(rows, &from, &picks)?))
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let batch = self.collate(Batch::new(tensors)?, &runs)?;
        Ok(batch.with_global_rows(self.order.step_rows(step)))
    }
}

impl Producer {
    fn collate(&self, batch: Batch, runs: &[Run]) -> Result<Batch> {
        let Some(Collation(collate)) = &self.source.collate else { return Ok(batch) };
        let expected = batch.rows();
        let rows = Rows::new(self.source.shuffle.unwrap_or(0), self.place.epoch, runs);
        let failed = |source| Error::BatchFn { name: collate.typetag_name().to_owned(), source };
        let made = collate.collate(batch, &rows).map_err(failed)?;
        match made.rows() {
            got if got == expected => Ok(made),
            got => Err(failed(format!("it made {got} rows of {expected}").into())),
        }
    }
}

/// Which of the blocks of a step are where in a list of them.
struct Slots {
    /// By block.
    places: Vec<Option<usize>>,
    used: Vec<usize>,
}

impl Slots {
    fn new(blocks: usize) -> Self {
        Self { places: vec![None; blocks], used: Vec::new() }
    }

    /// The place of a block, which `add` gives it the first time.
    fn place(&mut self, block: usize, add: impl FnOnce() -> Result<usize>) -> Result<usize> {
        if let Some(place) = self.places[block] {
            return Ok(place);
        }
        let place = add()?;
        self.places[block] = Some(place);
        self.used.push(block);
        Ok(place)
    }

    fn clear(&mut self) {
        self.used.drain(..).for_each(|block| self.places[block] = None);
    }
}

fn order(source: &TensorSource, epoch: u64) -> EpochOrder {
    EpochOrder::new(&source.rows, source.shape, source.shuffle, epoch)
}
