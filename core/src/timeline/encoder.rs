//! Events as JSON objects of the trace event format. Pure: events go in, text comes out.

use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

/// Something to be written. Times are in microseconds since the timeline began.
#[derive(Debug)]
pub(super) enum Event {
    /// What a process is called.
    Process {
        pid: u32,
        name: String,
    },
    Slice(Slice),
    Instant {
        pid: u32,
        name: &'static str,
        at: f64,
        detail: String,
    },
    /// Tells when all that came before it is written.
    Mark(SyncSender<()>),
}

/// Something that took time.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) track: Track,
    pub(super) name: Arc<str>,
    pub(super) end: f64,
    pub(super) micros: f64,
    pub(super) outcome: &'static str,
    pub(super) error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Track {
    /// A thread of the driver.
    Thread(u64),
    /// A worker process, from which the news of an end came later than the end.
    Process(u32),
    /// The same, of which is not known when it began with this.
    Lost(u32),
}

pub(super) struct Encoder {
    driver: u32,
    threads: HashSet<u64>,
    /// When the last slice of each process has ended.
    ends: HashMap<u32, f64>,
    is_first: bool,
}

impl Encoder {
    pub(super) fn new(driver: u32) -> Self {
        Self { driver, threads: HashSet::new(), ends: HashMap::new(), is_first: true }
    }

    /// Appends what the event is in the file; after the first, a separator goes before.
    pub(super) fn add(&mut self, event: Event, out: &mut Vec<u8>) {
        match event {
            Event::Process { pid, name } => {
                self.put(metadata("process_name", pid, u64::from(pid), &name), out);
            }
            Event::Slice(slice) => self.slice(slice, out),
            Event::Instant { pid, name, at, detail } => {
                let args = json!({ "detail": detail });
                self.put(
                    json!({
                        "name": name, "cat": "process", "ph": "i", "s": "p", "ts": at,
                        "pid": pid, "tid": pid, "args": args,
                    }),
                    out,
                );
            }
            Event::Mark(_) => {}
        }
    }

    fn slice(&mut self, slice: Slice, out: &mut Vec<u8>) {
        let (pid, tid) = match slice.track {
            Track::Thread(thread) => (self.driver, thread),
            Track::Process(pid) | Track::Lost(pid) => (pid, u64::from(pid)),
        };
        if let Track::Thread(thread) = slice.track
            && self.threads.insert(thread)
        {
            self.put(metadata("thread_name", pid, tid, &format!("thread {thread}")), out);
        }
        let (begin, micros) = self.place(&slice);
        let mut args = json!({ "outcome": slice.outcome });
        if let Some(error) = slice.error {
            args["error"] = error.into();
        }
        self.put(
            json!({
                "name": &*slice.name, "cat": "task", "ph": "X", "ts": begin, "dur": micros,
                "pid": pid, "tid": tid, "args": args,
            }),
            out,
        );
    }

    /// A process does one thing after the other, but the news of several ends may come at once:
    /// what would overlap begins where the one before it has ended.
    fn place(&mut self, slice: &Slice) -> (f64, f64) {
        let begin = (slice.end - slice.micros).max(0.0);
        let (Track::Process(pid) | Track::Lost(pid)) = slice.track else {
            return (begin, slice.micros);
        };
        let last = self.ends.entry(pid).or_default();
        let begin = begin.max(*last);
        let end = match slice.track {
            Track::Lost(_) => slice.end.max(begin),
            _ => begin + slice.micros,
        };
        *last = end;
        (begin, end - begin)
    }

    fn put(&mut self, value: Value, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.is_first { b"[\n" } else { b",\n" });
        self.is_first = false;
        out.extend_from_slice(value.to_string().as_bytes());
    }
}

fn metadata(what: &str, pid: u32, tid: u64, name: &str) -> Value {
    json!({ "name": what, "ph": "M", "pid": pid, "tid": tid, "args": { "name": name } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(events: Vec<Event>) -> Vec<Value> {
        let mut encoder = Encoder::new(1);
        let mut out = Vec::new();
        events.into_iter().for_each(|event| encoder.add(event, &mut out));
        out.push(b']');
        serde_json::from_slice(&out).expect("a JSON array")
    }

    fn slice(track: Track, end: f64, micros: f64) -> Event {
        let (name, error) = ("t \"1\"\n".into(), None);
        Event::Slice(Slice { track, name, end, micros, outcome: "finished", error })
    }

    #[test]
    fn a_slice_has_what_viewers_need() {
        let events = encoded(vec![slice(Track::Thread(3), 10.0, 4.0)]);
        let named = json!({ "name": "thread_name", "ph": "M", "pid": 1, "tid": 3,
            "args": { "name": "thread 3" } });
        let drawn = json!({ "name": "t \"1\"\n", "cat": "task", "ph": "X", "ts": 6.0, "dur": 4.0,
            "pid": 1, "tid": 3, "args": { "outcome": "finished" } });
        assert_eq!(events, [named, drawn]);
    }

    #[test]
    fn slices_of_a_process_do_not_overlap() {
        let events = encoded(vec![
            slice(Track::Process(7), 10.0, 4.0),
            slice(Track::Process(7), 10.0, 2.0),
            slice(Track::Process(8), 10.0, 2.0),
            slice(Track::Lost(7), 20.0, 15.0),
        ]);
        let times: Vec<_> = events.iter().map(|e| (e["ts"].clone(), e["dur"].clone())).collect();
        let expected = [(6.0, 4.0), (10.0, 2.0), (8.0, 2.0), (12.0, 8.0)];
        assert_eq!(times, expected.map(|(ts, dur)| (json!(ts), json!(dur))));
    }

    #[test]
    fn instants_say_what_happened() {
        let detail = "killed by signal 9".to_owned();
        let events = encoded(vec![
            Event::Process { pid: 7, name: "tasks (7)".to_owned() },
            Event::Instant { pid: 7, name: "process ended", at: 5.0, detail },
        ]);
        assert_eq!(events[0]["args"]["name"], "tasks (7)");
        assert_eq!((&events[1]["ph"], &events[1]["s"]), (&json!("i"), &json!("p")));
        assert_eq!(events[1]["args"]["detail"], "killed by signal 9");
    }
}
