//! What the machines are given to do.

use super::*;

#[remote(crate = mobula_core)]
pub(crate) fn parent() -> Result<u32, Error> {
    Ok(machine())
}

#[remote(crate = mobula_core)]
pub(crate) fn make(byte: u8) -> Result<Blob, Error> {
    Ok(vec![byte; LARGE].into())
}

#[remote(crate = mobula_core)]
pub(crate) fn small(byte: u8) -> Result<Blob, Error> {
    Ok(vec![byte; SMALL].into())
}

/// Says that it is about to give a value.
#[remote(crate = mobula_core)]
pub(crate) fn announce(name: String) -> Result<Blob, Error> {
    tell(&name, "");
    Ok(vec![1; SMALL].into())
}

#[remote(crate = mobula_core)]
pub(crate) fn pass_on(value: Blob) -> Result<Blob, Error> {
    Ok(value)
}

#[remote(crate = mobula_core)]
pub(crate) fn add(a: Blob, b: Blob) -> Result<u64, Error> {
    assert_eq!((a.0.len(), b.0.len()), (LARGE, LARGE));
    Ok(a.0.iter().chain(b.0.iter()).map(|byte| u64::from(*byte)).sum())
}

/// Its own tasks go wherever there is room; what they give is only looked at by others.
#[remote(crate = mobula_core)]
pub(crate) fn add_made(n: u8) -> Result<u64, Error> {
    let runtime = Runtime::current()?;
    let submit = |byte| runtime.submit(make::remote(byte).on(Placement::Process));
    let (a, b) = (submit(n), submit(n + 1));
    let sum = *runtime.submit(add::remote(&a, &b).on(Placement::Process)).get()?;
    assert_eq!(a.get()?.0[0], n);
    Ok(sum)
}

#[remote(crate = mobula_core)]
pub(crate) fn here(member: Member) -> Result<u32, Error> {
    println!("here is {}", member.rank());
    let parent = machine();
    let all = member.all_gather("parents", &parent.to_le_bytes(), LONG)?;
    let all: HashSet<_> = all.into_iter().collect();
    Ok(all.len() as u32)
}

/// Says where each member runs, once a machine was lost.
#[remote(crate = mobula_core)]
pub(crate) fn after_the_loss(member: Member) -> Result<Vec<u32>, BoxError> {
    let parent = machine();
    let all = member.all_gather("parents", &parent.to_le_bytes(), LONG)?;
    let number = |bytes: &bytes::Bytes| u32::from_le_bytes(bytes[..].try_into().expect("4 bytes"));
    let parents: Vec<u32> = all.iter().map(number).collect();
    if member.generation() == 0 {
        member.report(&parents)?;
        while member.check_generation().is_ok() {
            std::thread::yield_now();
        }
    }
    Ok(parents)
}

/// One message that takes the slow network longer than a heartbeat.
#[remote(crate = mobula_core)]
pub(crate) fn tell_all(member: Member) -> Result<u64, Error> {
    let all = member.all_gather("large", &vec![1; SLOW], LONG)?;
    Ok(all.iter().map(|part| part.len() as u64).sum())
}

/// Where it runs first it stays until its machine is lost; elsewhere it returns.
#[remote(crate = mobula_core)]
pub(crate) fn stay(name: String) -> Result<u32, Error> {
    let parent = machine();
    if wait_until(|| folder().join("victim").exists(), Duration::ZERO) {
        return Ok(parent);
    }
    tell(&name, &parent.to_string());
    loop {
        std::thread::park();
    }
}

pub(crate) fn wait_until(done: impl Fn() -> bool, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

pub(crate) struct Counter(u32);

#[remote(crate = mobula_core)]
impl Counter {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self(0))
    }

    pub(crate) fn count(&mut self) -> Result<u32, Error> {
        self.0 += 1;
        Ok(self.0)
    }

    pub(crate) fn parent(&mut self) -> Result<u32, Error> {
        Ok(machine())
    }
}

/// Notes what it is given, in order.
pub(crate) struct Notes(Vec<(u8, usize)>);

#[remote(crate = mobula_core)]
impl Notes {
    pub(crate) fn new(first: Blob) -> Self {
        Self(vec![(first.0[0], first.0.len())])
    }

    pub(crate) fn note(&mut self, value: Blob) {
        self.0.push((value.0[0], value.0.len()));
    }

    pub(crate) fn all(&self) -> (Vec<(u8, usize)>, u32) {
        (self.0.clone(), machine())
    }

    pub(crate) fn large(&self, byte: u8) -> Blob {
        vec![byte; LARGE].into()
    }
}

/// The machine of this, and that of its actor.
#[remote(crate = mobula_core)]
pub(crate) fn use_notes(node: Node) -> Result<(u32, u32), Error> {
    let runtime = Runtime::current()?;
    let options = ActorOptions {
        placement: Placement::Process,
        node: Some(node),
        ..ActorOptions::new("notes")
    };
    let blob = |byte: u8, len: usize| Blob::from(vec![byte; len]);
    let notes = runtime.spawn(Notes::remote(blob(0, LARGE)).with_options(options))?;
    let made = notes.large(1);
    let mut calls = Vec::new();
    // Large values, which have to be brought first, and small ones, which are not to overtake them.
    for round in 1..10 {
        calls.push(notes.note(&made));
        calls.push(notes.note(blob(round, LARGE)));
        calls.push(notes.note(blob(round, 1)));
    }
    let all = notes.all().get()?;
    let mut expected = vec![(0, LARGE)];
    (1..10).for_each(|round| expected.extend([(1, LARGE), (round, LARGE), (round, 1)]));
    assert_eq!(all.0, expected);
    collect(&calls)?;
    assert_eq!(made.get()?.0, vec![1; LARGE]);
    Ok((machine(), all.1))
}

/// The count, how many bytes are intact, and the agent.
pub(crate) type Seen = (u32, usize, u32);

/// A counter whose state is larger than what travels in a message.
pub(crate) struct Keeper(u32, Blob);

#[remote(crate = mobula_core)]
impl Keeper {
    pub(crate) fn new() -> Self {
        Self(0, vec![3; LARGE / 8].into())
    }

    #[checkpoint]
    pub(crate) fn save(&self) -> (u32, Blob) {
        (self.0, self.1.clone())
    }

    #[restore]
    pub(crate) fn load(saved: (u32, Blob)) -> Self {
        Self(saved.0, saved.1)
    }

    pub(crate) fn count(&mut self) -> u32 {
        self.0 += 1;
        self.0
    }

    pub(crate) fn peek(&self) -> Seen {
        let intact = self.1.0.iter().filter(|byte| **byte == 3).count();
        (self.0, intact, machine())
    }

    pub(crate) fn abort(&self) {
        std::process::abort();
    }
}

#[remote(crate = mobula_core)]
pub(crate) fn starts_with(blob: Blob, text: String) -> Result<bool, Error> {
    Ok(blob.0.starts_with(text.as_bytes()))
}

/// Returns when four of them run.
#[remote(crate = mobula_core)]
pub(crate) fn place_of_two() -> Result<(), Error> {
    tell(&format!("runs-{}", std::process::id()), "");
    let all_run = || {
        let entries = std::fs::read_dir(folder()).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with("runs-") && !name.ends_with("tmp")).count() == 4
    };
    assert!(wait_until(all_run, LONG), "four never ran at the same time");
    Ok(())
}

/// How many of the values that are made there come as they are to be.
#[remote(crate = mobula_core)]
pub(crate) fn consume(count: usize, size: usize, from: Node) -> Result<usize, Error> {
    let options =
        TaskOptions { placement: Placement::Process, node: Some(from), ..TaskOptions::default() };
    let task = yield_many::remote(count, size).with_options(options).with_buffer(8);
    let values = Runtime::current()?.submit_stream(task).collect::<Result<Vec<_>, _>>()?;
    let is_whole = |(n, value): &(usize, &std::sync::Arc<Blob>)| value.0 == vec![*n as u8; size];
    Ok(values.iter().enumerate().filter(is_whole).count())
}

#[remote(crate = mobula_core)]
pub(crate) fn yield_many(count: usize, size: usize, out: Yield<Blob>) -> Result<(), Error> {
    (0..count).try_for_each(|n| out.send(vec![n as u8; size].into()))
}

#[remote(crate = mobula_core)]
pub(crate) fn linger() -> Result<(), Error> {
    tell("worker", &std::process::id().to_string());
    loop {
        std::thread::park();
    }
}

#[remote(crate = mobula_core)]
pub(crate) fn wait_for_victim() -> Result<(), Error> {
    wait_for_file(&folder().join("victim"));
    Ok(())
}

/// Until they are there, wherever, without fetching them.
pub(crate) fn wait_ready(objects: &[&ObjectRef<Blob>]) {
    assert!(wait_until(|| objects.iter().all(|object| object.is_ready()), LONG));
}
