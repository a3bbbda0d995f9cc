use super::super::super::logs::LogTarget;
use super::*;
use std::os::fd::AsFd;
use std::process::{ChildStdin, Command, Stdio};
use std::thread::JoinHandle;

/// What a test's server says for each request.
type Script = fn(&OwnedFd, turn: i32);

/// A server that this process plays, and the process that it is taken for: that ends when the
/// server does.
fn start(first: &Report, script: Script) -> (std::result::Result<ForkServer, NotStarted>, Server) {
    let mut server = None;
    let started = ForkServer::start(|socket| {
        let mut child = program("read line");
        let guard = child.stdin.take();
        send(socket, first, &[]).expect("send");
        let socket = socket.try_clone().expect("a descriptor");
        server = Some(Server(std::thread::spawn(move || serve(&socket, script, guard))));
        Ok(child)
    });
    (started, server.expect("was started"))
}

struct Server(JoinHandle<()>);

impl Server {
    fn join(self) {
        self.0.join().expect("no panic");
    }
}

fn serve(socket: &OwnedFd, script: Script, guard: Option<ChildStdin>) {
    let mut turn = 0;
    while let Ok(Some((Request::Fork, _))) = receive(socket) {
        turn += 1;
        script(socket, turn);
    }
    drop(guard);
}

fn program(script: &str) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(Stdio::piped()).spawn().expect("a shell")
}

/// Any process will do for a worker. It is killed with the server.
fn forked(socket: &OwnedFd) {
    let worker = Pid::from_child(&program("exec sleep 60"));
    let pidfd = pidfd_open(worker, PidfdFlags::empty()).expect("a child");
    let report = Report::Forked { pid: worker.as_raw_nonzero().get() };
    send(socket, &report, &[pidfd.as_fd()]).expect("send");
}

#[test]
fn one_that_cannot_serve_is_told_from_one_that_did_not_come_to_it() {
    let reason = "the program has 2 threads".to_owned();
    let (unfit, server) = start(&Report::Unfit { reason: reason.clone() }, |_, _| {});
    let unfit = unfit.expect_err("it cannot serve");
    assert!(matches!(&unfit, NotStarted::Unfit(got) if *got == reason), "{unfit}");
    server.join();
    let killed = ForkServer::start(|_| Ok(program("kill -KILL $$")));
    let killed = killed.expect_err("it was killed");
    assert!(matches!(killed, NotStarted::Ended { .. }), "{killed}");
    let text = killed.to_string();
    assert!(text.contains("was killed by signal 9 (SIGKILL) before it served"), "{text}");
    let refused = ForkServer::start(|_| Err(Error::from_raw_os_error(24)));
    assert!(matches!(refused, Err(NotStarted::System(_))));
}

#[test]
fn a_worker_whose_descriptor_has_no_room_is_refused_and_the_others_live() {
    let (started, server) = start(&Report::Ready, |socket, turn| match turn {
        2 => send(socket, &Report::Forked { pid: 1 << 21 }, &[]).expect("send"),
        _ => forked(socket),
    });
    let started = started.expect("serves");
    let first = started.fork(&[]).expect("a worker");
    let error = started.fork(&[]).expect_err("no room");
    assert!(matches!(&error, NotForked::Refused(e) if e.raw_os_error() == Some(24)), "{error:?}");
    started.fork(&[]).expect("another worker");
    assert!(!first.has_ended());
    started.end();
    server.join();
    assert!(first.has_ended());
}

#[test]
fn workers_of_one_that_does_not_answer_end_for_that_reason() {
    let (started, server) = start(&Report::Ready, |socket, turn| {
        if turn == 1 {
            forked(socket);
        }
    });
    let mut started = started.expect("serves");
    let worker = started.fork(&[]).expect("a worker");
    started.timeout = Duration::ZERO;
    assert!(matches!(started.fork(&[]), Err(NotForked::Gone)));
    drop(started);
    server.join();
    let end = worker.describe_end(&LogTarget::default());
    assert!(end.contains("did not answer for 10s"), "{end}");
}
