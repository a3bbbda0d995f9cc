//! Who is let in by the machines of a program, and who can hear what they say.

use crate::Test;
use crate::driver::wait_for_file;
use crate::nodes::{LARGE, LONG, Launch, PAYLOAD, SECRET, alone, said};
use mobula_core::Runtime;
use std::cell::OnceCell;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub(crate) const TESTS: &[Test] = &[
    ("nodes::secrets::nobody_joins_without_the_secret", wrong_secret),
    ("nodes::secrets::a_file_will_do_for_a_secret", secret_in_a_file),
    ("nodes::secrets::a_second_driver_leaves_the_secret_of_the_first", two_drivers),
    ("nodes::secrets::a_secret_of_an_earlier_start_is_read_again", stale_secret),
    ("nodes::secrets::one_that_stays_wrong_is_named", stale_for_good),
    ("nodes::secrets::with_tls_nobody_can_listen_in", listened_in),
    ("nodes::secrets::strangers_keep_nobody_out", strangers),
    ("nodes::secrets::a_driver_that_was_built_otherwise_is_named_as_such", built_otherwise),
];

fn wrong_secret(_: &Runtime) {
    let launch = Launch::start("count", &[1, 1, 1], |rank, command| {
        command.env("MOBULA_JOIN_TIMEOUT", "4");
        if rank == 1 {
            command.env("MOBULA_SECRET", "the secret of another test");
        }
    });
    let outputs = launch.end();
    let codes: Vec<_> = outputs.iter().map(|output| output.status.code()).collect();
    assert_eq!(codes, [Some(0), Some(1), Some(0)], "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("4 CPU on 2 nodes"), "{}", said(&outputs));
    assert!(said(&outputs[..1]).contains("1 of 2 other copies have joined"), "{}", said(&outputs));
    assert!(said(&outputs[1..2]).contains("set MOBULA_SECRET alike"), "{}", said(&outputs));
}

fn secret_in_a_file(_: &Runtime) {
    let mut launch = Launch::start("count", &[1, 1], |_, command| {
        command.env_remove("MOBULA_SECRET");
    });
    let outputs = launch.wait();
    assert!(said(&outputs[..1]).contains("4 CPU on 2 nodes"), "{}", said(&outputs));
    let left = std::fs::read_dir(launch.file("runs")).expect("the driver has made it");
    assert_eq!(left.count(), 0, "the file goes with the driver");
}

/// A second start in the same folder and on the same port fails, and the first one notices nothing.
fn two_drivers(_: &Runtime) {
    let (mut launch, address) = Launch::listening("two machines", |command| {
        command.env_remove("MOBULA_SECRET");
    });
    wait_for_file(&launch.file("alone"));
    let port = address.rsplit_once(':').expect("host and port").1;
    let file = launch.file("runs").join(format!(".join-127-0-0-1-{port}-0"));
    let secret = std::fs::read_to_string(&file).expect("the driver has written it");
    let second = Launch::start("count", &[1], |_, command| {
        alone(command);
        command.env_remove("MOBULA_SECRET").env("MOBULA_LISTEN", &address);
        command.current_dir(launch.folder.path());
    });
    let second = second.end();
    assert!(!second[0].status.success(), "{}", said(&second));
    assert!(said(&second).contains("is MASTER_PORT in use?"), "{}", said(&second));
    assert_eq!(std::fs::read_to_string(&file).ok().as_ref(), Some(&secret));
    launch.join(&address, &secret);
    launch.succeed();
}

/// The file is that of an earlier start when the agent comes, and right once it was refused.
fn stale_secret(_: &Runtime) {
    let between = OnceCell::new();
    let launch = Launch::start("count", &[1, 1], |rank, command| {
        if rank == 1 {
            let between = between.get_or_init(|| Between::start(master_port(command)));
            command.env("MASTER_PORT", between.port.to_string());
            stale_secret_of(command);
        }
    });
    let between = between.get().expect("rank 1 was started");
    between.ended.recv_timeout(LONG).expect("the agent was refused");
    secret_file(launch.folder.path(), between.port, SECRET);
    let outputs = launch.succeed();
    assert!(said(&outputs[..1]).contains("4 CPU on 2 nodes"), "{}", said(&outputs));
}

fn stale_for_good(_: &Runtime) {
    let mut launch = Launch::start("count", &[1, 1], |rank, command| {
        if rank == 1 {
            // The agent has little time, and it must not be for want of a driver.
            wait_for_listener(master_port(command));
            command.env("MOBULA_JOIN_TIMEOUT", "0.5");
            stale_secret_of(command);
        }
    });
    let agent = [launch.end_of(1, Instant::now() + LONG)];
    assert_eq!(agent[0].status.code(), Some(1), "{}", said(&agent));
    let told = said(&agent);
    assert!(told.contains("has another secret than runs/.join-127-0-0-1-"), "{told}");
}

fn stale_secret_of(agent: &mut Command) {
    agent.env_remove("MOBULA_SECRET");
    let folder = agent.get_current_dir().expect("set by the launch");
    secret_file(folder, master_port(agent), "the secret of an earlier start");
}

fn wait_for_listener(port: u16) {
    let deadline = Instant::now() + LONG;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::yield_now();
    }
}

fn listened_in(_: &Runtime) {
    let between = OnceCell::new();
    let launch = Launch::start("payload", &[1, 1], |rank, command| {
        if rank == 1 {
            let between = between.get_or_init(|| Between::start(master_port(command)));
            command.env("MASTER_PORT", between.port.to_string());
        }
    });
    launch.succeed();
    let heard = between.get().expect("rank 1 was started").heard.lock().expect("not poisoned");
    assert!(heard.len() > LARGE, "all went through: {}", heard.len());
    for text in [SECRET, PAYLOAD] {
        let is_clear = heard.windows(text.len()).any(|window| window == text.as_bytes());
        assert_eq!(is_clear, cfg!(not(feature = "tls")), "{text}");
    }
}

/// Who connects and says nothing takes up few descriptors, and no room from those who join.
fn strangers(_: &Runtime) {
    let (mut launch, address) = Launch::listening("two machines", |_| {});
    wait_for_file(&launch.file("alone"));
    let before = sockets(&launch.copies[0]);
    let mut strangers: Vec<_> =
        (0..200).map(|_| TcpStream::connect(&address).expect("listens")).collect();
    // What it says first, it says to the last one when all have been taken.
    let last = strangers.last_mut().expect("many");
    last.set_read_timeout(Some(LONG)).expect("a timeout");
    last.read_exact(&mut [0; 16]).expect("the driver speaks first");
    let taken = sockets(&launch.copies[0]).saturating_sub(before);
    // 64, and one that waits until there is room.
    assert!((1..=65).contains(&taken), "{taken} at a time");
    launch.join(&address, SECRET);
    launch.succeed();
}

fn built_otherwise(_: &Runtime) {
    let (words, text) = match cfg!(feature = "tls") {
        true => (b"mobula in clear\n", "without the feature `tls`"),
        false => (b"mobula with TLS\n", "with the feature `tls`"),
    };
    let driver = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = driver.local_addr().expect("bound").to_string();
    let agent = Launch::start("joins later", &[1], |_, command| {
        alone(command);
        command.env("MOBULA_JOIN", &address);
    });
    let (mut connection, _) = driver.accept().expect("an agent");
    connection.write_all(words).expect("writes");
    let outputs = agent.end();
    assert_eq!(outputs[0].status.code(), Some(1), "{}", said(&outputs));
    assert!(said(&outputs).contains(&format!("was built {text}")), "{}", said(&outputs));
}

fn master_port(command: &Command) -> u16 {
    let mut variables = command.get_envs();
    let port = variables.find(|(name, _)| *name == "MASTER_PORT").and_then(|(_, port)| port);
    port.and_then(|port| port.to_str()?.parse().ok()).expect("set by the launch")
}

/// Written beside and renamed, as the driver does it.
fn secret_file(folder: &Path, port: u16, secret: &str) {
    let path = folder.join("runs").join(format!(".join-127-0-0-1-{port}-0"));
    std::fs::create_dir_all(folder.join("runs")).expect("a folder");
    let draft = path.with_extension("test");
    std::fs::write(&draft, secret).expect("writes");
    std::fs::set_permissions(&draft, Permissions::from_mode(0o600)).expect("ours");
    std::fs::rename(&draft, &path).expect("renames");
}

/// Sockets that this copy has open.
fn sockets(copy: &Child) -> usize {
    let open = std::fs::read_dir(format!("/proc/{}/fd", copy.id())).expect("runs");
    let open = open.flatten().filter_map(|file| std::fs::read_link(file.path()).ok());
    open.filter(|file| file.to_string_lossy().starts_with("socket:")).count()
}

/// Somebody between an agent and its driver, who keeps what they say.
struct Between {
    port: u16,
    heard: Arc<Mutex<Vec<u8>>>,
    /// Says when a connection has ended.
    ended: Receiver<()>,
}

impl Between {
    fn start(driver: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (sender, ended) = sync_channel(1024);
        let kept = Arc::clone(&heard);
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                // The agent comes again when the driver does not listen yet.
                let Ok(driver) = TcpStream::connect(("127.0.0.1", driver)) else { continue };
                pass_on_both(&agent, &driver, &kept, &sender);
            }
        });
        Self { port, heard, ended }
    }
}

fn pass_on_both(
    agent: &TcpStream,
    driver: &TcpStream,
    kept: &Arc<Mutex<Vec<u8>>>,
    ended: &SyncSender<()>,
) {
    for (from, to) in [(agent, driver), (driver, agent)] {
        let clones = from.try_clone().and_then(|from| to.try_clone().map(|to| (from, to)));
        let ((from, to), kept, ended) = (clones.expect("clones"), Arc::clone(kept), ended.clone());
        std::thread::spawn(move || {
            pass_on(&from, &to, &kept);
            // Whoever reads or writes the other way hears of the end too.
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
            let _ = ended.try_send(());
        });
    }
}

fn pass_on(mut from: &TcpStream, mut to: &TcpStream, kept: &Mutex<Vec<u8>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        kept.lock().expect("not poisoned").extend_from_slice(&buffer[..bytes]);
        if to.write_all(&buffer[..bytes]).is_err() {
            return;
        }
    }
}
