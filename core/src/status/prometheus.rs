//! The same figures as Prometheus text: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use super::{ActorStatus, NodeStatus, Status};
use crate::Resources;
use std::collections::BTreeMap;
use std::fmt::Write;

/// The status as Prometheus reads it, in its text format, version 0.0.4.
pub fn prometheus(status: &Status) -> String {
    let mut page = Page::default();
    resources(&mut page, status);
    tasks(&mut page, status);
    actors(&mut page, &status.actors);
    workers(&mut page, status);
    objects(&mut page, status);
    page.text
}

fn resources(page: &mut Page, status: &Status) {
    type Of = fn(&NodeStatus) -> &Resources;
    let series = |node: &NodeStatus, of: Of| -> Vec<Sample> {
        let labels = |resource| vec![("node", node.name.clone()), ("resource", resource)];
        amounts(of(node)).into_iter().map(|(name, n)| (labels(name), n)).collect()
    };
    let each =
        |of: Of| -> Vec<Sample> { status.nodes.iter().flat_map(|node| series(node, of)).collect() };
    let total = each(|node| &node.total);
    page.gauge("mobula_resource_total", "Resources of a node (memory in bytes).", total);
    let free = each(|node| &node.free);
    page.gauge("mobula_resource_free", "Resources of a node that nobody holds.", free);
    let up =
        |node: &NodeStatus| (vec![("node", node.name.clone())], f64::from(u8::from(!node.silent)));
    let help = "Whether a node answers within a second.";
    page.gauge("mobula_node_up", help, status.nodes.iter().map(up));
}

/// Resources by name.
fn amounts(resources: &Resources) -> Vec<(String, f64)> {
    let fixed =
        [("cpu", resources.cpus), ("gpu", resources.gpus), ("memory", resources.memory as f64)];
    let custom = resources.custom.iter().map(|(name, amount)| (name.clone(), *amount));
    fixed.into_iter().map(|(name, amount)| (name.to_owned(), amount)).chain(custom).collect()
}

fn tasks(page: &mut Page, status: &Status) {
    let tasks = &status.tasks;
    let by = |states: &[(&str, u64)]| -> Vec<Sample> {
        let sample = |(state, n): &(&str, u64)| (vec![("state", (*state).to_owned())], *n as f64);
        states.iter().map(sample).collect()
    };
    let now = by(&[("waiting", tasks.waiting), ("running", tasks.running)]);
    page.gauge("mobula_tasks", "Tasks that have not ended, by state.", now);
    let ended = by(&[
        ("finished", tasks.finished),
        ("failed", tasks.failed),
        ("cancelled", tasks.cancelled),
    ]);
    page.counter("mobula_tasks_ended_total", "Tasks that have ended, by how.", ended);
    let one = |n: u64| [(Vec::new(), n as f64)];
    page.counter("mobula_tasks_submitted_total", "Tasks submitted.", one(tasks.submitted));
    let help = "Attempts after which a task waited again.";
    page.counter("mobula_task_retries_total", help, one(tasks.retried));
}

/// Actors of one name are one series: a pool's members come and go.
fn actors(page: &mut Page, actors: &[ActorStatus]) {
    let mut states: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    let mut pending: BTreeMap<&str, f64> = BTreeMap::new();
    let mut restarts: BTreeMap<&str, f64> = BTreeMap::new();
    let mut failed: BTreeMap<&str, f64> = BTreeMap::new();
    for actor in actors {
        *states.entry((&actor.name, actor.state.name())).or_default() += 1.0;
        *pending.entry(&actor.name).or_default() += actor.pending as f64;
        *restarts.entry(&actor.name).or_default() += actor.restarts as f64;
        *failed.entry(&actor.name).or_default() += actor.failed_checkpoints as f64;
    }
    let states = states.into_iter().map(|((name, state), n)| {
        (vec![("actor", name.to_owned()), ("state", state.to_owned())], n)
    });
    page.gauge("mobula_actors", "Actors that somebody has a handle to, by state.", states);
    let named = |(name, n): (&str, f64)| (vec![("actor", name.to_owned())], n);
    let help = "Calls that were sent to actors and have not ended.";
    page.gauge("mobula_actor_pending_calls", help, pending.into_iter().map(named));
    // Not a counter: it falls when an actor is gone.
    let help = "How often the processes of the actors that live were started again.";
    page.gauge("mobula_actor_restarts", help, restarts.into_iter().map(named));
    let help = "How often the states of the actors that live could not be saved.";
    page.gauge("mobula_actor_failed_checkpoints", help, failed.into_iter().map(named));
}

fn workers(page: &mut Page, status: &Status) {
    let count = |node: &NodeStatus, busy: bool| {
        let there = status.workers.iter().filter(|worker| worker.node == node.name);
        there.filter(|worker| worker.busy == busy).count()
    };
    let counts = status.nodes.iter().flat_map(|node| {
        [(true, "busy"), (false, "idle")].map(|(busy, state)| {
            let labels = vec![("node", node.name.clone()), ("state", state.to_owned())];
            (labels, count(node, busy) as f64)
        })
    });
    page.gauge("mobula_workers", "Worker processes, by whether they have work.", counts);
    // What a machine that does not answer has is not known; that is not nothing.
    let known = status.workers.iter().filter(|worker| worker.resident_bytes > 0);
    let resident = known.map(|worker| {
        let labels = vec![
            ("name", worker.name.clone()),
            ("node", worker.node.clone()),
            ("pid", worker.pid.to_string()),
        ];
        (labels, worker.resident_bytes as f64)
    });
    let help = "Resident memory of a worker process.";
    page.gauge("mobula_worker_resident_bytes", help, resident);
    let own = [(Vec::new(), status.program.resident_bytes as f64)];
    page.gauge("mobula_driver_resident_bytes", "Resident memory of the program itself.", own);
}

fn objects(page: &mut Page, status: &Status) {
    let objects = &status.objects;
    let one = |n: u64| [(Vec::new(), n as f64)];
    let count = one(objects.count);
    page.gauge("mobula_objects", "Large values that processes share.", count);
    let places = [("memory", objects.memory_bytes), ("disk", objects.spilled_bytes)];
    let bytes = places.map(|(place, bytes)| (vec![("place", place.to_owned())], bytes as f64));
    page.gauge("mobula_object_bytes", "Bytes of large values, by place.", bytes);
    let help = "Bytes in memory beyond which large values are spilled.";
    page.gauge("mobula_object_budget_bytes", help, one(objects.budget_bytes));
}

/// Labels and a value.
type Sample = (Vec<(&'static str, String)>, f64);

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn gauge(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        self.metric("gauge", name, help, samples);
    }

    fn counter(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = Sample>) {
        self.metric("counter", name, help, samples);
    }

    /// Writing to a string does not fail.
    fn metric(
        &mut self,
        kind: &str,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample>,
    ) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let labels: Vec<String> = labels
                .iter()
                .map(|(label, text)| format!("{label}=\"{}\"", escape(text)))
                .collect();
            let labels =
                if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(self.text, "{name}{labels} {value}");
        }
    }
}

/// A label's value: backslash, quote and line feed are escaped, nothing else is.
fn escape(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::super::{ActorState, WorkerStatus};
    use super::*;
    use std::collections::HashSet;

    fn actor(name: &str, state: ActorState, pending: u64) -> ActorStatus {
        ActorStatus {
            name: name.to_owned(),
            state,
            restarts: 1,
            failed_checkpoints: 0,
            pending,
            pid: None,
            node: None,
        }
    }

    #[test]
    fn every_metric_has_help_a_type_and_one_line_a_series() {
        let mut status = Status::default();
        let (name, total) =
            ("node \"a\\b\"\n".to_owned(), Resources::cpus(2.0).with_custom("x", 0.5));
        let node = NodeStatus { name, free: Resources::cpus(0.5), total, ..NodeStatus::default() };
        status.nodes.push(node);
        let far = NodeStatus { name: "far (node 1)".into(), silent: true, ..NodeStatus::default() };
        status.nodes.push(far);
        status.tasks.running = 3;
        status.tasks.finished = 1 << 40;
        let states = [ActorState::Running, ActorState::Running, ActorState::Dead];
        status.actors = states.map(|state| actor("pool", state, 2)).to_vec();
        // Two machines may have processes of one number.
        for (node, resident_bytes) in [("node \"a\\b\"\n", 1 << 20), ("far (node 1)", 1 << 21)] {
            let (node, name) = (node.to_owned(), "tasks".to_owned());
            status.workers.push(WorkerStatus { node, pid: 7, name, busy: true, resident_bytes });
        }
        let text = prometheus(&status);
        for line in [
            r#"mobula_resource_total{node="node \"a\\b\"\n",resource="cpu"} 2"#,
            r#"mobula_resource_total{node="node \"a\\b\"\n",resource="x"} 0.5"#,
            r#"mobula_resource_free{node="node \"a\\b\"\n",resource="cpu"} 0.5"#,
            "# TYPE mobula_tasks gauge",
            r#"mobula_tasks{state="running"} 3"#,
            "# TYPE mobula_tasks_ended_total counter",
            r#"mobula_tasks_ended_total{state="finished"} 1099511627776"#,
            r#"mobula_actors{actor="pool",state="dead"} 1"#,
            r#"mobula_actors{actor="pool",state="running"} 2"#,
            r#"mobula_actor_pending_calls{actor="pool"} 6"#,
            r#"mobula_node_up{node="far (node 1)"} 0"#,
            r#"mobula_workers{node="far (node 1)",state="busy"} 1"#,
            r#"mobula_workers{node="far (node 1)",state="idle"} 0"#,
            r#"mobula_worker_resident_bytes{name="tasks",node="node \"a\\b\"\n",pid="7"} 1048576"#,
            r#"mobula_worker_resident_bytes{name="tasks",node="far (node 1)",pid="7"} 2097152"#,
            r#"mobula_object_bytes{place="disk"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        check_form(&text);
    }

    /// What every scraper relies on: HELP, TYPE, then the samples of that metric, none twice.
    fn check_form(text: &str) {
        let (mut metrics, mut seen) = (HashSet::new(), HashSet::new());
        let mut metric = "";
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                metric = rest.split(' ').next().expect("a name");
                let kind = lines.next().expect("a line").strip_prefix("# TYPE ").expect("a type");
                assert!(kind.starts_with(&format!("{metric} ")), "{kind}");
                assert!(metric.starts_with("mobula_") && metrics.insert(metric), "{metric}");
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect("a value");
            assert!(series.split('{').next() == Some(metric) && seen.insert(series), "{line}");
            value.parse::<f64>().expect("a number");
        }
        assert!(text.ends_with('\n'));
    }
}
